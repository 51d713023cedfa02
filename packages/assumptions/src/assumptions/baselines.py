"""What a probe must beat: readers of the text alone, put through the same search as the activations.

- `length_format`: lengths, punctuation, capitals, digits, lists, links: what a label can owe to form alone.
- `bag_of_words` and `tfidf` (one and two words): the vocabulary of the training rows, its `VOCABULARY` commonest terms.
- `source`: which data set a row is from; its R2 is that of the source means.
- `sentence_embedding`: the mean last hidden state of an encoder that the caller names (a local folder or a Hugging Face
  id); skipped, with the reason stated, where none is named.
Vectorisers see the training rows only.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from assumptions.chats import Chat
from assumptions.families import Family
from assumptions.rows import InMemory
from assumptions.selection import RIDGE, choose, held_out_r2
from assumptions.splits import Split
from shared.errors import UserError

VOCABULARY = 4096
_WORD = r"(?u)\b\w+\b"


class BaselineScores(NamedTuple):
    """Test R2 of every target by baseline, and why a baseline was skipped."""

    r2: dict[str, list[float]]
    skipped: dict[str, str]


def baseline_scores(
    chats: Sequence[Chat],
    labels_BK: Float[Tensor, "B K"],
    split: Split,
    embedding: str | None = None,
    family: Family = RIDGE,
    strengths: Sequence[float] | None = None,
) -> BaselineScores:
    """Test R2 of every baseline, strength chosen on the validation rows as for the probes."""
    scores, skipped = {}, {}
    for name, read in BASELINES.items():
        scores[name] = _searched(read(chats, split), labels_BK, split, family, strengths)
    if embedding:
        matrix = sentence_embeddings(embedding, [chat.turn for chat in chats])
        scores["sentence_embedding"] = _searched(matrix, labels_BK, split, family, strengths)
    else:
        skipped["sentence_embedding"] = "no encoder was named"
    return BaselineScores(scores, skipped)


def length_format(chats: Sequence[Chat], split: Split | None = None) -> Float[Tensor, "B F"]:
    """Lengths and marks of form of every turn, none of which knows a word's meaning."""
    return torch.tensor([_form(chat.turn) for chat in chats], dtype=torch.float64)


def bag_of_words(chats: Sequence[Chat], split: Split) -> Float[Tensor, "B F"]:
    """Counts of the training rows' commonest words."""
    from sklearn.feature_extraction.text import CountVectorizer

    return _vectorised(CountVectorizer(token_pattern=_WORD, max_features=VOCABULARY), chats, split)


def tfidf(chats: Sequence[Chat], split: Split) -> Float[Tensor, "B F"]:
    """TF-IDF of the training rows' commonest words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        token_pattern=_WORD, ngram_range=(1, 2), sublinear_tf=True, max_features=VOCABULARY
    )
    return _vectorised(vectorizer, chats, split)


def source(chats: Sequence[Chat], split: Split) -> Float[Tensor, "B F"]:
    """One column a source of the training rows."""
    names = sorted({chats[i].source for i in split.train})
    return torch.tensor([[float(chat.source == name) for name in names] for chat in chats]).double()


def sentence_embeddings(name: str, texts: Sequence[str], batch_size: int = 64) -> Float[Tensor, "B F"]:
    """Mean last hidden state over each text's tokens, of unit length, from a Hugging Face encoder."""
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer, encoder = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"no sentence encoder could be loaded from {name!r}: {error}") from error
    pooled = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]), padding=True, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            hidden_BTD = encoder(**batch).last_hidden_state
        mask_BT1 = batch["attention_mask"].unsqueeze(-1)
        mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
        pooled.append(torch.nn.functional.normalize(mean_BD, dim=1).double())
    return torch.cat(pooled)


BASELINES: dict[str, Callable[[Sequence[Chat], Split], Tensor]] = {
    "length_format": length_format,
    "bag_of_words": bag_of_words,
    "tfidf": tfidf,
    "source": source,
}


def _searched(
    matrix_BF: Tensor,
    labels_BK: Float[Tensor, "B K"],
    split: Split,
    family: Family,
    strengths: Sequence[float] | None,
) -> list[float]:
    candidate = [InMemory(matrix_BF)]
    return held_out_r2(
        choose(candidate, labels_BK, split, family, strengths), candidate, labels_BK, split, family
    )


def _vectorised(vectorizer: Any, chats: Sequence[Chat], split: Split) -> Tensor:
    vectorizer.fit([chats[i].turn for i in split.train])
    dense: NDArray[Any] = vectorizer.transform([chat.turn for chat in chats]).toarray()
    return torch.from_numpy(dense.astype(np.float64))


def _form(text: str) -> list[float]:
    words = text.split()
    letters = sum(character.isalpha() for character in text)
    counts = [len(text), len(words), text.count("\n"), len(re.findall(r"[.!?]+", text))]
    marks = [text.count(mark) for mark in ("?", "!", ",", '"', ":", "(")]
    marks += [
        len(re.findall(pattern, text, re.M)) for pattern in (r"https?://", r"^\s*(?:[-*]|\d+\.)\s", r"\d")
    ]
    shares = [
        sum(character.isupper() for character in text) / max(letters, 1),
        sum(map(len, words)) / max(len(words), 1),
        len(set(map(str.lower, words))) / max(len(words), 1),
    ]
    logs = [float(np.log1p(count)) for count in (*counts, *marks)]
    return [*map(float, counts), *logs, *shares]
