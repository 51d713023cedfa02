"""Statistics of experiments: intervals, rank correlation, AUROC, logit difference, seeds.

Intervals are percentile bootstrap intervals (Efron 1979). Resampling is joint over the given samples (paired) and, with
`clusters`, draws whole clusters: the right choice when rows share a user, a conversation or a template.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

Numbers = Sequence[Any] | NDArray[Any] | Tensor
Statistic = Callable[..., NDArray[Any] | float]


class Interval(NamedTuple):
    """An estimate and the two ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def mean(values: NDArray[Any]) -> NDArray[Any] | float:
    """Mean over the last axis, the default statistic of `bootstrap_interval`."""
    return values.mean(axis=-1)


def bootstrap_interval(
    *samples: Numbers,
    statistic: Statistic = mean,
    clusters: Numbers | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of `statistic(*samples)`; the samples (each of n rows) are resampled together.

    The statistic reduces the last axis and keeps leading ones (as `mean`, `spearman` and `auroc` do). `clusters` gives
    each row's cluster: clusters are drawn instead of rows. Raises ValueError on empty samples or unequal lengths.
    """
    arrays = [np.asarray(sample, dtype=float) for sample in samples]
    sizes = {array.shape for array in arrays}
    if len(sizes) != 1 or len(arrays[0].shape) != 1 or not arrays[0].size:
        raise ValueError(
            f"bootstrap_interval needs samples of one equal, positive length; got shapes {sizes}"
        )
    if not 0 < level < 1:
        raise ValueError(f"level is a probability between 0 and 1, got {level}")
    rng = np.random.default_rng(seed)
    if clusters is None:
        rows = rng.integers(arrays[0].size, size=(resamples, arrays[0].size))
        draws = np.asarray(statistic(*(array[rows] for array in arrays)))
    else:
        draws = _cluster_draws(arrays, statistic, np.asarray(clusters), resamples, rng)
    tail = (1 - level) / 2
    # A resample on which the statistic is undefined (one class only, say) says nothing about its spread.
    low, high = np.nanquantile(draws, [tail, 1 - tail]) if np.isfinite(draws).any() else (np.nan, np.nan)
    return Interval(float(statistic(*arrays)), float(low), float(high))


def _cluster_draws(
    arrays: list[NDArray[Any]],
    statistic: Statistic,
    clusters: NDArray[Any],
    resamples: int,
    rng: np.random.Generator,
) -> NDArray[Any]:
    """The statistic on `resamples` draws of whole clusters with replacement; draws differ in length, hence a loop."""
    if clusters.shape != arrays[0].shape:
        raise ValueError(f"clusters has shape {clusters.shape}, the samples {arrays[0].shape}")
    labels = np.unique(clusters, return_inverse=True)[1]
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    chosen = rng.integers(len(members), size=(resamples, len(members)))
    rows = (np.concatenate([members[i] for i in draw]) for draw in chosen)
    return np.array([float(statistic(*(array[index] for array in arrays))) for index in rows])


def _ranks(values: NDArray[Any]) -> NDArray[Any]:
    from scipy.stats import rankdata  # slow to import

    return rankdata(values, axis=-1)


def spearman(x: Numbers, y: Numbers) -> NDArray[Any] | float:
    """Spearman's rank correlation over the last axis (ties get their mean rank); nan where one side is constant."""
    x_rank, y_rank = _ranks(np.asarray(x)), _ranks(np.asarray(y))
    if x_rank.shape != y_rank.shape:
        raise ValueError(f"spearman needs equal shapes, got {x_rank.shape} and {y_rank.shape}")
    x_rank = x_rank - x_rank.mean(axis=-1, keepdims=True)
    y_rank = y_rank - y_rank.mean(axis=-1, keepdims=True)
    norm = np.sqrt((x_rank**2).sum(axis=-1) * (y_rank**2).sum(axis=-1))
    covariance = (x_rank * y_rank).sum(axis=-1)
    rho = np.divide(covariance, norm, out=np.full_like(norm, np.nan), where=norm > 0)
    return float(rho) if rho.ndim == 0 else rho


def auroc(scores: Numbers, labels: Numbers) -> NDArray[Any] | float:
    """Chance that a positive scores above a negative, ties 1/2, over the last axis; nan where a class is empty.

    This is the Mann-Whitney U statistic divided by the number of pairs; `labels` are 0/1 or bool.
    """
    ranks, positive = _ranks(np.asarray(scores)), np.asarray(labels).astype(float)
    if ranks.shape != positive.shape:
        raise ValueError(f"auroc needs equal shapes, got {ranks.shape} and {positive.shape}")
    if not np.isin(positive, (0.0, 1.0)).all():
        raise ValueError("auroc needs labels that are 0 or 1")
    n_positive = positive.sum(axis=-1)
    pairs = n_positive * (positive.shape[-1] - n_positive)
    wins = (ranks * positive).sum(axis=-1) - n_positive * (n_positive + 1) / 2
    area = np.divide(wins, pairs, out=np.full_like(pairs, np.nan), where=pairs > 0)
    return float(area) if area.ndim == 0 else area


def logit_difference(
    logits_BV: Float[Tensor, "B V"], answers_B: Int[Tensor, "B"], wrong_B: Int[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """logit(answer) - logit(wrong answer) of each row; differentiable."""
    rows_B = torch.arange(len(logits_BV), device=logits_BV.device)
    return logits_BV[rows_B, answers_B] - logits_BV[rows_B, wrong_B]


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - third parties draw from the global generator
    torch.manual_seed(seed)
