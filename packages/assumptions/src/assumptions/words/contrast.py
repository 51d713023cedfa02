"""Which words mark one data set against another: log-odds with an informative Dirichlet prior (Monroe et al. 2008).

With y_w the count of word w in a set, n the count of all, and prior counts a_w that sum to a_0 (equation 15):

    delta_w = log (y1_w + a_w) / (n1 + a_0 - y1_w - a_w) - log (y2_w + a_w) / (n2 + a_0 - y2_w - a_w)
    var_w   = 1 / (y1_w + a_w) + 1 / (y2_w + a_w)          z_w = delta_w / sqrt(var_w)

The prior is the pooled word distribution of both sets times `strength` (a_0), which pulls rare words to no difference.
z treats every occurrence as an observation; the interval does not: it resamples whole responses of either set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from assumptions.words.documents import Response, count, resampling_weights
from shared.errors import UserError


@dataclass(frozen=True)
class WordContrast:
    """One n-gram: counts in the two sets, log-odds ratio with its interval over responses, and z."""

    ngram: str
    count_first: int
    count_second: int
    log_odds: float
    low: float
    high: float
    z: float

    @property
    def marked(self) -> bool:
        """True where the interval leaves out no difference."""
        return self.low > 0 or self.high < 0


def contrast(
    first: Sequence[Response],
    second: Sequence[Response],
    n: int = 1,
    *,
    strength: float = 100.0,
    least_count: int = 5,
    drop_stop_words: bool | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> list[WordContrast]:
    """All n-grams with `least_count` occurrences or more in both sets together, those that mark `first` most on top."""
    if strength <= 0:
        raise UserError(f"strength is the prior's number of words and must be positive, got {strength}")
    pooled = count([*first, *second], n, drop_stop_words)
    total_V = np.asarray(pooled.occurrences_RV.sum(axis=0)).ravel().astype(float)
    prior_V = strength * total_V / total_V.sum()
    one_RV, two_RV = pooled.occurrences_RV[: len(first)], pooled.occurrences_RV[len(first) :]
    one_V, two_V = (np.asarray(half.sum(axis=0)).ravel().astype(float) for half in (one_RV, two_RV))
    if not (one_V.sum() and two_V.sum()):
        raise UserError(f"one of the two sets holds no n-gram of {n} words")
    kept = np.flatnonzero(total_V >= least_count)
    prior = Prior(prior_V[kept], strength)
    delta_V, deviation_V = log_odds(one_V[kept], two_V[kept], one_V.sum(), two_V.sum(), prior)
    drawn_SV = _resampled(one_RV, two_RV, prior, kept, resamples, seed)
    low_V, high_V = np.quantile(drawn_SV, [(1 - level) / 2, (1 + level) / 2], axis=0)
    rows = [
        WordContrast(
            pooled.ngrams[v],
            int(one_V[v]),
            int(two_V[v]),
            float(delta_V[i]),
            float(low_V[i]),
            float(high_V[i]),
            float(delta_V[i] / deviation_V[i]),
        )
        for i, v in enumerate(kept)
    ]
    return sorted(rows, key=lambda row: (-row.z, row.ngram))


class Prior(NamedTuple):
    """Prior counts of the words in question (V), and of all words together."""

    counts_V: Float[np.ndarray, "V"]
    total: float


def log_odds(
    one_V: Float[np.ndarray, "*S V"],
    two_V: Float[np.ndarray, "*S V"],
    total_one: Float[np.ndarray, "*S"] | float,
    total_two: Float[np.ndarray, "*S"] | float,
    prior: Prior,
) -> tuple[Float[np.ndarray, "*S V"], Float[np.ndarray, "*S V"]]:
    """delta and its standard deviation of words (V) counted in two sets of so many words, or in S pairs of sets."""
    first, second = one_V + prior.counts_V, two_V + prior.counts_V
    rest_first = np.asarray(total_one)[..., None] + prior.total - first
    rest_second = np.asarray(total_two)[..., None] + prior.total - second
    delta = np.log(first / rest_first) - np.log(second / rest_second)
    return delta, np.sqrt(1 / first + 1 / second)


def _resampled(
    one_RV: sparse.csr_matrix,
    two_RV: sparse.csr_matrix,
    prior: Prior,
    kept: Int[np.ndarray, "V"],
    resamples: int,
    seed: int,
) -> Float[np.ndarray, "S V"]:
    """delta of the kept words in bootstrap samples of whole responses; the prior stays as it is."""
    counts, totals = [], []
    for side, counts_RV in enumerate((one_RV, two_RV)):
        weights_SR = resampling_weights(counts_RV.shape[0], resamples, seed + side)
        counts.append(np.asarray(weights_SR @ counts_RV[:, kept]))
        totals.append(weights_SR @ np.asarray(counts_RV.sum(axis=1)).ravel())
    return log_odds(counts[0], counts[1], totals[0], totals[1], prior)[0]
