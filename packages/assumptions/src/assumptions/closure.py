"""Causal closure: steer along a dimension, elicit again, and see whether the model says so, and says nothing else.

1. At every dose of every direction all messages are elicited again, under the edit: `scores_under(edits)` -> B x K.
2. The slope of the mean score on the dose, direction by score, is the specificity matrix: its diagonal was meant to
   move, the rest is off target. Specificity is the mean diagonal over the mean absolute off-diagonal element.
3. Rho is Spearman's correlation of dose and mean score of a direction's own dimension.

Slopes are per unit of dose; directions of equal norm, dosed alike, can be compared.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from assumptions.steering import Direction, Scope, Unit
from shared.errors import UserError
from shared.interventions import Intervention
from shared.stats import Interval, bootstrap_interval, spearman

ScoresUnder = Callable[[Sequence[Intervention]], Float[ndarray, "B K"]]


@dataclass(frozen=True)
class Closure:
    """The scores (K) of every message (B) under every direction (C) at every dose (M), and what follows from them."""

    directions: list[str]  # names, one a row of the matrix
    targets: list[str]  # the dimension of each direction
    dimensions: list[str]  # columns
    doses: list[float]
    scores_CMBK: Float[ndarray, "C M B K"]

    @property
    def slopes_CBK(self) -> Float[ndarray, "C B K"]:
        """Least-squares slope on the dose, message by message."""
        centred_M = np.array(self.doses) - np.mean(self.doses)
        return np.asarray(np.einsum("m,cmbk->cbk", centred_M, self.scores_CMBK) / (centred_M**2).sum())

    @property
    def matrix(self) -> Float[ndarray, "C K"]:
        """Slope of every score on the dose of every direction."""
        return known_mean(self.slopes_CBK, axis=1)

    def on_target(self) -> dict[str, Interval]:
        """Slope of each direction's own dimension, with a bootstrap interval over messages."""
        columns = [self.dimensions.index(target) for target in self.targets]
        return {
            name: _interval(slopes[np.isfinite(slopes)])
            for name, slopes in (
                (self.directions[c], self.slopes_CBK[c, :, k]) for c, k in enumerate(columns)
            )
        }

    def off_target(self) -> dict[str, float]:
        """Mean absolute slope of the other dimensions, by direction."""
        own = np.array([[target == name for name in self.dimensions] for target in self.targets])
        return {
            name: float(np.abs(row[~mine]).mean())
            for name, row, mine in zip(self.directions, self.matrix, own, strict=True)
        }

    def specificity(self) -> float:
        """Mean slope on target over mean absolute slope off target; inf where nothing else moves."""
        on = float(np.mean([one.estimate for one in self.on_target().values()]))
        off = float(np.mean(list(self.off_target().values())))
        return on / off if off else float("inf")

    def rho(self) -> dict[str, float]:
        """Spearman's correlation of dose and mean score of each direction's own dimension."""
        columns = [self.dimensions.index(target) for target in self.targets]
        means_CMK = known_mean(self.scores_CMBK, axis=2)
        return {
            name: float(spearman(self.doses, means_CMK[c, :, k]))
            for c, (name, k) in enumerate(zip(self.directions, columns, strict=True))
        }


def close(
    directions: Sequence[Direction],
    doses: Sequence[float],
    scores_under: ScoresUnder,
    dimensions: Sequence[str],
    *,
    unit: Unit = "proj_sd",
    scope: Scope = "all",
    progress: Callable[[Sequence[Direction]], Iterable[Direction]] = iter,
) -> Closure:
    """Elicit again under every direction at every dose; the unedited scores are asked for once.

    Raises UserError for fewer than two doses. Scores that could not be read are nan and leave the means.
    """
    if len(set(doses)) < 2:
        raise UserError("a slope needs at least two doses")
    unedited_BK = scores_under(()) if 0.0 in doses else None
    scores_CMBK = np.array(
        [
            [
                unedited_BK if dose == 0 else scores_under(direction.interventions(dose, unit, scope))
                for dose in doses
            ]
            for direction in progress(directions)
        ]
    )
    return Closure(
        [direction.name for direction in directions],
        [direction.dimension for direction in directions],
        list(dimensions),
        list(doses),
        scores_CMBK,
    )


def known_mean(values: Float[ndarray, "..."], axis: int) -> Float[ndarray, "..."]:
    """Mean over an axis of the values that are known; nan where none is."""
    known = np.isfinite(values)
    count = known.sum(axis)
    total = np.where(known, values, 0.0).sum(axis)
    return np.asarray(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0))


def _interval(slopes_B: Float[ndarray, " B"]) -> Interval:
    return bootstrap_interval(slopes_B) if len(slopes_B) else Interval(np.nan, np.nan, np.nan)


def closure_figures(closure: Closure) -> dict[str, object]:
    """What metrics.json keeps of a closure."""
    on = {name: one.estimate for name, one in closure.on_target().items()}
    return {
        "slope": dict(zip(closure.targets, on.values(), strict=True)),
        "slope_mean": float(np.mean(list(on.values()))),
        "off_target": dict(zip(closure.targets, closure.off_target().values(), strict=True)),
        "off_target_mean": float(np.mean(list(closure.off_target().values()))),
        "specificity": closure.specificity(),
        "right_sign": int(sum(slope > 0 for slope in on.values())),
        "rho": dict(zip(closure.targets, closure.rho().values(), strict=True)),
        "matrix": {
            target: dict(zip(closure.dimensions, row.tolist(), strict=True))
            for target, row in zip(closure.targets, closure.matrix, strict=True)
        },
    }
