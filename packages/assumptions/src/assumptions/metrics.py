"""How well a read-out fits, orders and separates rows: R2, rank correlation, AUROC of the extremes in two definitions.

Intervals are bootstrap intervals over groups of rows (a user, both sides of a conflict), which belong together.

`absolute`: rows below 0.3 against rows above 0.7. `quantile`: the bottom against the top 30% within each source. Scores
in plateaus make quantiles meet (ties swell both classes), so a source whose two thresholds touch is refused; class
sizes are always reported, and an AUROC without two classes is None with the reason, never a number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from shared.stats import Interval, Statistic, auroc, bootstrap_interval, spearman

Rule = Literal["absolute", "quantile"]
LOW, HIGH, SHARE = 0.3, 0.7, 0.3


@dataclass(frozen=True)
class Extremes:
    """AUROC of the high against the low rows, the class sizes, and why there is none where there is none."""

    auroc: float | None
    n_low: int
    n_high: int
    refusal: str | None = None


class Figures(NamedTuple):
    """How well predictions fit their labels."""

    r2: float
    spearman: float
    auroc: Extremes
    auroc_quantile: Extremes


class Intervals(NamedTuple):
    """95% bootstrap intervals over groups; None where the figure is none."""

    r2: Interval | None
    spearman: Interval | None
    auroc: Interval | None


def figures(
    predicted_B: Float[Tensor, " B"], labels_B: Float[Tensor, " B"], sources: Sequence[str]
) -> Figures:
    """The figures of predictions (B) of labels (B), rows of one source compared by quantile among themselves."""
    ordered, truth = predicted_B.double().numpy(), labels_B.double().numpy()
    return Figures(
        float(_r2(ordered, truth)),
        float(spearman(ordered, truth)),
        extremes_auroc(ordered, truth, "absolute"),
        extremes_auroc(ordered, truth, "quantile", sources),
    )


def intervals(
    predicted_B: Float[Tensor, " B"],
    labels_B: Float[Tensor, " B"],
    groups: Sequence[int],
    resamples: int = 500,
    seed: int = 0,
) -> Intervals:
    """Intervals of R2, Spearman and the AUROC of absolute extremes, whole groups drawn with replacement."""
    ordered, truth = predicted_B.double().numpy(), labels_B.double().numpy()
    extreme_B = (truth < LOW) | (truth > HIGH)

    def interval(
        statistic: Statistic, first: NDArray[Any], second: NDArray[Any], rows_B: Any
    ) -> Interval | None:
        if not rows_B.any() or not np.isfinite(statistic(first[rows_B], second[rows_B])):
            return None
        members = np.asarray(groups)[rows_B]
        single = len(np.unique(members)) == len(members)
        return bootstrap_interval(
            first[rows_B],
            second[rows_B],
            statistic=statistic,
            clusters=None if single else members,
            resamples=resamples,
            seed=seed,
        )

    every_B = np.ones(len(truth), dtype=bool)
    return Intervals(
        interval(_r2, ordered, truth, every_B),
        interval(spearman, ordered, truth, every_B),
        interval(auroc, ordered, (truth > HIGH).astype(float), extreme_B),
    )


def _r2(predicted: NDArray[Any], truth: NDArray[Any]) -> NDArray[Any]:
    """R2 over the last axis; nan where the labels are all alike."""
    residual = np.square(truth - predicted).sum(-1)
    total = np.square(truth - truth.mean(-1, keepdims=True)).sum(-1)
    return np.where(total > 0, 1.0 - residual / np.where(total > 0, total, 1.0), np.nan)


def extremes_auroc(
    predicted_B: Float[np.ndarray, " B"],
    labels_B: Float[np.ndarray, " B"],
    rule: Rule = "absolute",
    sources: Sequence[str] | None = None,
) -> Extremes:
    """AUROC of predictions (B) for high against low labels (B) under a rule; rows between count in neither class."""
    names = np.asarray(sources if sources is not None else [""] * len(labels_B))
    low_B = np.zeros(len(labels_B), dtype=bool)
    high_B = np.zeros(len(labels_B), dtype=bool)
    refused: list[str] = []
    for name in np.unique(names):
        rows_B = names == name
        low, high = (LOW, HIGH) if rule == "absolute" else _quantiles(labels_B[rows_B])
        if low >= high:
            refused.append(f"source {str(name)!r}: both thresholds are {low:.3g}")
            continue
        low_B |= rows_B & (labels_B < low if rule == "absolute" else labels_B <= low)
        high_B |= rows_B & (labels_B > high if rule == "absolute" else labels_B >= high)
    return _area(predicted_B, low_B, high_B, refused)


def _quantiles(labels_B: Float[np.ndarray, " B"]) -> tuple[float, float]:
    return float(np.quantile(labels_B, SHARE)), float(np.quantile(labels_B, 1 - SHARE))


def _area(
    predicted_B: Float[np.ndarray, " B"],
    low_B: Bool[np.ndarray, " B"],
    high_B: Bool[np.ndarray, " B"],
    refused: list[str],
) -> Extremes:
    n_low, n_high = int(low_B.sum()), int(high_B.sum())
    if not (n_low and n_high):
        reason = "; ".join(refused) or f"{n_low} low and {n_high} high rows"
        return Extremes(None, n_low, n_high, reason)
    rows_B = low_B | high_B
    return Extremes(
        float(auroc(predicted_B[rows_B], high_B[rows_B])), n_low, n_high, "; ".join(refused) or None
    )
