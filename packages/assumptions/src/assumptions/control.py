"""Choose the block to steer at by dose-response on validation messages: reading is not control (arXiv 2406.07882).

1. At every candidate block the probe of that block gives a direction with its own unit of dose.
2. Validation messages are answered under it at a few doses, and under random directions of the same norm at the same
   block, drawn apart from those that the test uses: a control that helped to choose would look flatter than it is.
3. A block's margin is the absolute slope of the judged outcome on the dose less the steepest random direction's. The
   sign is not presumed: whether it is the expected one is what the test messages show.
4. The block with the largest margin is kept, among those whose replies stay coherent: judged, and ended by themselves,
   nearly as often as the unedited ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Float

from assumptions.directions import fitted_direction
from assumptions.doses import Curve
from assumptions.features import Features
from assumptions.probes import Probe, ProbeSet, fit_probes
from assumptions.splits import Split
from assumptions.steering import Direction, Fitted, random_directions
from shared.errors import UserError

SPREAD = 8  # blocks tried where none are named
LEAST_R2, LEAST_SD, LEAST_EXTREMES = 0.05, 0.05, 25


@dataclass(frozen=True)
class Trial:
    """What steering along a dimension's direction at one block does to the replies to validation messages."""

    block: int
    slope: float
    steepest_random: float
    coherence: float  # lowest share of readable replies at any dose, as a share of the unedited ones

    @property
    def margin(self) -> float:
        """Absolute slope less the steepest random direction's; -inf where no slope could be measured."""
        margin = abs(self.slope) - self.steepest_random
        return margin if math.isfinite(margin) else -math.inf


def candidate_blocks(named: Sequence[int], n_layers: int, reading: int) -> list[int]:
    """The blocks to try, the one chosen for reading first: those named, or at most `SPREAD` evenly over the depth."""
    if unknown := [block for block in named if not 0 <= block < n_layers]:
        raise UserError(
            f"steering.choice.blocks: {unknown} are not blocks of this model, 0 to {n_layers - 1}"
        )
    count = min(SPREAD, n_layers)
    spread = [round(i * (n_layers - 1) / max(count - 1, 1)) for i in range(count)]
    return list(dict.fromkeys([reading, *(named or spread)]))


def directions_by_block(
    features: Features,
    labels_BK: Float[torch.Tensor, "B K"],
    probes: ProbeSet,
    split: Split,
    dimension: str,
    blocks: Sequence[int],
    kind: Fitted,
) -> list[Direction]:
    """The dimension's direction at each block, from a probe fitted there on the rows of `probes`."""
    column = list(probes.probes).index(dimension)
    labels_B1 = labels_BK[:, column : column + 1]
    directions = []
    for block in blocks:
        there = features.only([f"blocks.{block}.output"])
        family = probes.probes[dimension].family
        fitted, _ = fit_probes(there, labels_B1, [dimension], split, probes.labeller, kind=family)
        directions.append(fitted_direction(fitted.probes[dimension], kind, there, split.train))
    return directions


def trial_family(direction: Direction, random: int, seed: int) -> list[Direction]:
    """A candidate and its random controls, named by their block; the controls differ from block to block."""
    family = [direction, *random_directions(direction, random, seed + 1_000_003)]
    return [replace(one, name=f"{one.name}.block{one.block}") for one in family]


def trial(direction: Direction, curves: Sequence[Curve]) -> Trial:
    """The trial of a direction from its own curve and those of its random controls, in this order."""
    own, *controls = curves
    slopes = [abs(curve.slope) for curve in controls if math.isfinite(curve.slope)]
    readable = [min(judged, 1 - cut) for judged, cut in zip(own.judged, own.truncated, strict=True)]
    unedited = readable[own.doses.index(0.0)]
    coherence = min(readable) / unedited if unedited else 1.0
    return Trial(direction.block, own.slope, max(slopes, default=0.0), coherence)


def best(trials: Sequence[Trial], largest_loss: float) -> Trial:
    """The trial of the largest margin among those that keep coherence (all where none does); the first of equals."""
    return max(trials, key=lambda one: (one.coherence >= 1 - largest_loss, one.margin))


def doubts(probe: Probe, labels_B: Float[torch.Tensor, " B"]) -> list[str]:
    """Why a dimension is hardly worth steering on these rows, by the rule of the public replication; else empty.

    Read on validation rows with R2 of at least 0.05, labels that vary (SD at least 0.05), and at least 25 rows below
    0.3 and above 0.7: below that a direction is noise, whatever its curve shows.
    """
    spread = float(labels_B.double().std())
    low, high = int((labels_B < 0.3).sum()), int((labels_B > 0.7).sum())
    found = {
        f"validation R2 {probe.r2_validation:.2f} is below {LEAST_R2}": probe.r2_validation < LEAST_R2,
        f"labels have SD {spread:.2f}, below {LEAST_SD}": spread < LEAST_SD,
        f"{low} labels below 0.3 and {high} above 0.7, fewer than {LEAST_EXTREMES}": min(low, high)
        < LEAST_EXTREMES,
    }
    return [reason for reason, holds in found.items() if holds]


def control_metrics(
    trials: Mapping[str, Sequence[Trial]], chosen: Mapping[str, Direction], probes: ProbeSet
) -> dict[str, dict[str, Any]]:
    """By dimension: the blocks for steering and for reading, and what each block tried has shown."""
    metrics: dict[str, dict[str, Any]] = {}
    for name, direction in chosen.items():
        tried = sorted(trials.get(name, ()), key=attrgetter("block"))
        metrics[name] = {"block": direction.block, "reading_block": probes.probes[name].block}
        for figure in ("slope", "steepest_random", "coherence"):
            metrics[name][figure] = {str(one.block): getattr(one, figure) for one in tried}
    return metrics
