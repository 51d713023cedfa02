"""The assumptions of open-ended answers as texts, response by response, and word counts over them.

A response holds k assumptions; an assumption's text is its name and its description. `Counts` keeps, for every
response and n-gram, in how many of its assumptions the n-gram stands and how often in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from assumptions.instruments import Instrument
from assumptions.records import Record
from shared.errors import UserError

TOKEN = r"(?u)\b[^\W\d_][\w'-]*\b"


@dataclass(frozen=True)
class Response:
    """One answer: the texts of its assumptions."""

    id: str
    assumptions: tuple[str, ...]


def responses_of(records: Sequence[Record], instrument: Instrument) -> list[Response]:
    """The readable answers of an open-ended elicitation; UserError when its instrument asks for none, or none is read.

    Answers are parsed again from their text, as the file holds scores and sections only.
    """
    if instrument.dimensions or instrument.shape() is None:
        raise UserError(
            f"instrument {instrument.id} asks for no open-ended assumptions: take openended or ten"
        )
    responses = []
    for record in records:
        texts = instrument.parse(record.text).answer.texts if record.text else {}
        items: dict[Any, list[str]] = {}
        for path, text in texts.items():
            items.setdefault(path[1], []).append(text)
        if items:
            responses.append(Response(record.id, tuple(". ".join(items[i]) for i in sorted(items))))
    if not responses:
        raise UserError("no answer holds an assumption that can be read: look into the elicitation file")
    return responses


@dataclass(frozen=True)
class Counts:
    """Counts of V n-grams in R responses: occurrences, assumptions that hold them (both R V, sparse), sizes (R)."""

    ngrams: tuple[str, ...]
    occurrences_RV: sparse.csr_matrix
    assumptions_RV: sparse.csr_matrix
    sizes_R: Int[np.ndarray, "R"]

    @cached_property
    def responses_RV(self) -> sparse.csr_matrix:
        """1 where a response holds an n-gram in any of its assumptions."""
        return (self.assumptions_RV > 0).astype(np.int64)


def count(responses: Sequence[Response], n: int = 1, drop_stop_words: bool | None = None) -> Counts:
    """Count the n-grams of length `n` inside assumptions (none reaches over two of them).

    Stop words (scikit-learn's English list) are dropped from single words and kept in longer n-grams unless
    `drop_stop_words` says otherwise.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    if n < 1:
        raise UserError(f"an n-gram has at least 1 word, got n={n}")
    drop = n == 1 if drop_stop_words is None else drop_stop_words
    vectorizer = CountVectorizer(
        lowercase=True,
        token_pattern=TOKEN,
        stop_words="english" if drop else None,
        ngram_range=(n, n),
    )
    texts = [text for response in responses for text in response.assumptions]
    sizes = np.array([len(response.assumptions) for response in responses])
    try:
        by_assumption = sparse.csr_matrix(vectorizer.fit_transform(texts))
    except ValueError as error:
        raise UserError(f"the assumptions hold no n-gram of {n} words: {error}") from error
    groups = _membership(sizes)
    return Counts(
        tuple(vectorizer.get_feature_names_out().tolist()),
        sparse.csr_matrix(groups @ by_assumption),
        sparse.csr_matrix(groups @ (by_assumption > 0).astype(np.int64)),
        sizes,
    )


def _membership(sizes_R: Int[np.ndarray, "R"]) -> sparse.csr_matrix:
    """R by assumptions: 1 where an assumption belongs to a response."""
    total = int(sizes_R.sum())
    rows = np.repeat(np.arange(len(sizes_R)), sizes_R)
    return sparse.csr_matrix(
        (np.ones(total, dtype=np.int64), (rows, np.arange(total))), shape=(len(sizes_R), total)
    )


def resampling_weights(n_responses: int, resamples: int, seed: int) -> Float[np.ndarray, "S R"]:
    """How often each response is drawn in each of S bootstrap samples of whole responses."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_responses, np.full(n_responses, 1 / n_responses), size=resamples).astype(float)
