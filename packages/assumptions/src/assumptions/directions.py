"""Directions made from others or from other labels: the controls of a probe's direction, and sums of directions.

All are made from the same training rows at the same block as the direction they stand beside, and pushed by the same
alpha (norm-matched: they take over its scales), so that a curve differs in the direction alone.

    bisector       half way between a probe's filter and its pattern: the filter strays where labels are exact and rows
                   few, the pattern holds all that varies with the score; their errors are unlike and partly cancel
    random         Gaussian, normalised (`assumptions.steering.random_directions`)
    shuffled       the probe's own kind of fit, on the labels of other messages
    means          mean of the rows labelled high less mean of those labelled low: outer 30% each
    sycophancy     logistic regression (C = 1, balanced) of whether the unedited reply was judged above the median
    orthogonalised what is left of each direction outside the span of the others
    composite      sum over dimensions of sign times unit direction: raised S+ against lowered S-, or the reverse
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from assumptions.dimensions import SIGNS
from assumptions.families import family
from assumptions.features import Features
from assumptions.probes import Probe
from assumptions.rows import InMemory
from assumptions.steering import (
    Direction,
    Fitted,
    Kind,
    pattern_direction,
    probe_direction,
    unit_vector,
)
from shared.errors import UserError

EXTREME = 0.3


@dataclass(frozen=True)
class Ground:
    """Pooled training activations at a block's output: what directions there are fitted on and scaled by."""

    block: int
    pooled_BD: Float[Tensor, "B D"]

    @classmethod
    def of(cls, features: Features, rows: Sequence[int], block: int) -> "Ground":
        """The given rows of features at one block's output."""
        [pooled_BD] = features.only([f"blocks.{block}.output"]).rows(rows).pooled_LBD
        return cls(block, pooled_BD.double())

    def direction(self, name: str, dimension: str, kind: Kind, vector_D: Float[Tensor, "D"]) -> Direction:
        """A direction with scales of its own, by its projection of these rows."""
        unit_D = unit_vector(vector_D, f"the {kind} direction of {dimension}")
        sd, norm = float((self.pooled_BD @ unit_D).std()), float(self.pooled_BD.norm(dim=1).mean())
        return Direction(name, dimension, kind, self.block, unit_D, sd, norm)

    def beside(self, matched: Direction, kind: Kind, vector_D: Float[Tensor, "D"]) -> Direction:
        """A control of `matched`: another direction under its scales."""
        unit_D = unit_vector(vector_D, f"the {kind} control of {matched.dimension}")
        return replace(matched, name=f"{matched.dimension}.{kind}", kind=kind, unit_D=unit_D)


def fitted_direction(probe: Probe, kind: Fitted, features: Features, rows: Sequence[int]) -> Direction:
    """The probe's own direction, its pattern, or their bisector, scaled by the training `rows` of the features."""
    if kind != "bisector":
        return probe_direction(probe) if kind == "probe" else pattern_direction(probe)
    halves = [
        unit_vector(vector_D, f"a direction of {probe.dimension}")
        for vector_D in (probe.weight_D, probe.pattern_D)
    ]
    name = f"{probe.dimension}.bisector"
    ground = Ground.of(features, rows, probe.block)
    return ground.direction(name, probe.dimension, kind, halves[0] + halves[1])


def shuffled_direction(
    ground: Ground, matched: Direction, probe: Probe, labels_B: Float[Tensor, " B"], seed: int = 0
) -> Direction:
    """The probe's own kind of fit, at its strength, on the ground's rows with their labels (B) permuted."""
    permuted = labels_B[torch.randperm(len(labels_B), generator=torch.Generator().manual_seed(seed))]
    place, rows = InMemory(ground.pooled_BD), range(len(permuted))
    [(_, read)] = family(probe.family).path(place, rows, permuted[:, None], (probe.strength,))
    return ground.beside(matched, "shuffled", read.weight_DK[:, 0])


def means_direction(ground: Ground, matched: Direction, labels_B: Float[Tensor, " B"]) -> Direction:
    """Mean of the ground's rows with the highest labels (outer 30%) less mean of those with the lowest."""
    low, high = (float(labels_B.double().quantile(q)) for q in (EXTREME, 1 - EXTREME))
    if low >= high:
        raise UserError(
            f"{matched.dimension}: the outer {EXTREME:.0%} of the labels meet at {low:g}; there are no two groups to "
            "take means of"
        )
    difference_D = ground.pooled_BD[labels_B >= high].mean(0) - ground.pooled_BD[labels_B <= low].mean(0)
    return ground.beside(matched, "means", difference_D)


def sycophancy_direction(
    ground: Ground, matched: Direction, sycophancy_B: Float[np.ndarray, " B"]
) -> Direction:
    """Logistic regression of whether the judged sycophancy (nan: not judged) of the row's reply is above the median."""
    from sklearn.linear_model import LogisticRegression

    known = np.isfinite(sycophancy_B)
    above = sycophancy_B[known] > np.median(sycophancy_B[known]) if known.any() else np.array([], dtype=bool)
    if len(set(above.tolist())) < 2:
        raise UserError(
            "replies to the training messages were all judged alike: there is no sycophancy to fit a control on"
        )
    model = LogisticRegression(C=1.0, class_weight="balanced", max_iter=2000)
    fitted = model.fit(ground.pooled_BD.numpy()[known], above)
    return ground.beside(matched, "sycophancy", torch.from_numpy(fitted.coef_[0]))


def orthogonalised(directions: Sequence[Direction], ground: Ground) -> list[Direction]:
    """Each direction without its part in the span of the others: it then moves none of their projections."""
    _check_block(directions, ground)
    unit_KD = torch.stack([direction.unit_D.double() for direction in directions])
    found = []
    for k, direction in enumerate(directions):
        others_DK = torch.cat([unit_KD[:k], unit_KD[k + 1 :]]).T
        inside_D = (
            others_DK @ torch.linalg.lstsq(others_DK, unit_KD[k], driver="gelsd").solution
            if others_DK.shape[1]
            else 0
        )
        rest_D = unit_KD[k] - inside_D
        if rest_D.norm() < 1e-6:
            raise UserError(
                f"{direction.name} lies in the span of the other directions: nothing of it is left"
            )
        found.append(
            ground.direction(f"{direction.name}.orthogonal", direction.dimension, direction.kind, rest_D)
        )
    return found


def composite(
    directions: Sequence[Direction],
    ground: Ground,
    signs: Mapping[str, int] = SIGNS,
    name: str = "S+ against S-",
) -> Direction:
    """The sum of the unit directions, each by the sign of its dimension: a positive dose raises S+ and lowers S-."""
    _check_block(directions, ground)
    vector_D = torch.stack([signs[one.dimension] * one.unit_D.double() for one in directions]).sum(0)
    return ground.direction(name, name, "composite", vector_D)


def _check_block(directions: Sequence[Direction], ground: Ground) -> None:
    if {direction.block for direction in directions} != {ground.block}:
        raise UserError(
            f"directions of blocks {sorted({one.block for one in directions})} cannot be combined at block "
            f"{ground.block}: fit them all there (assumptions.control.directions_by_block)"
        )
