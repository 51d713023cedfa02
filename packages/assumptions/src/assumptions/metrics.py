"""How well a read-out orders and separates rows: rank correlation and AUROC of the extremes, both definitions.

`absolute`: rows below 0.3 against rows above 0.7. `quantile`: the bottom against the top 30% within each source. Scores
in plateaus make quantiles meet (ties swell both classes), so a source whose two thresholds touch is refused; class
sizes are always reported, and an AUROC without two classes is None with the reason, never a number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from shared.stats import auroc

Rule = Literal["absolute", "quantile"]
LOW, HIGH, SHARE = 0.3, 0.7, 0.3


@dataclass(frozen=True)
class Extremes:
    """AUROC of the high against the low rows, the class sizes, and why there is none where there is none."""

    auroc: float | None
    n_low: int
    n_high: int
    refusal: str | None = None


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
