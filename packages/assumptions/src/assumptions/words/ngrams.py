"""Which words stand in the assumptions, as a share of assumptions and as a share of responses (paper, text analysis).

The two shares differ by about k, the number of assumptions in a response: a table holds both, each with its denominator
in the name of the column. Intervals are bootstrap intervals over responses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from assumptions.words.documents import Counts, Response, count, resampling_weights


@dataclass(frozen=True)
class NgramShare:
    """One n-gram: in how many assumptions and responses it stands, and these as shares with intervals."""

    ngram: str
    assumptions: int
    responses: int
    share_of_assumptions: float
    share_of_assumptions_low: float
    share_of_assumptions_high: float
    share_of_responses: float
    share_of_responses_low: float
    share_of_responses_high: float


def ngram_shares(
    responses: Sequence[Response],
    n: int = 1,
    top: int = 30,
    *,
    drop_stop_words: bool | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> list[NgramShare]:
    """The `top` n-grams in most responses, ties in alphabetical order, with both shares and their intervals."""
    counts = count(responses, n, drop_stop_words)
    held = np.asarray(counts.responses_RV.sum(axis=0)).ravel()
    chosen = sorted(range(len(held)), key=lambda v: (-held[v], counts.ngrams[v]))[:top]
    return [
        NgramShare(counts.ngrams[v], *totals, *of_assumptions, *of_responses)
        for v, totals, of_assumptions, of_responses in _shares(counts, chosen, level, resamples, seed)
    ]


def _shares(
    counts: Counts, chosen: list[int], level: float, resamples: int, seed: int
) -> list[tuple[int, tuple[int, int], tuple[float, float, float], tuple[float, float, float]]]:
    """(n-gram, totals, share of assumptions, share of responses), shares as (estimate, low, high)."""
    weights_SR = resampling_weights(len(counts.sizes_R), resamples, seed)
    ends = [(1 - level) / 2, (1 + level) / 2]
    in_assumptions = counts.assumptions_RV[:, chosen].toarray()
    in_responses = counts.responses_RV[:, chosen].toarray()
    drawn_a = (weights_SR @ in_assumptions) / (weights_SR @ counts.sizes_R)[:, None]
    drawn_r = (weights_SR @ in_responses) / len(counts.sizes_R)
    low_a, high_a = np.quantile(drawn_a, ends, axis=0)
    low_r, high_r = np.quantile(drawn_r, ends, axis=0)
    total_a, total_r = in_assumptions.sum(axis=0), in_responses.sum(axis=0)
    return [
        (
            v,
            (int(total_a[i]), int(total_r[i])),
            (float(total_a[i] / counts.sizes_R.sum()), float(low_a[i]), float(high_a[i])),
            (float(total_r[i] / len(counts.sizes_R)), float(low_r[i]), float(high_r[i])),
        )
        for i, v in enumerate(chosen)
    ]
