"""Does a circuit do what the model does? Faithfulness and completeness with intervals (paper section 4; digest 1.8).

With m(M) the full model, m(0) every node at its reference, m(C) only the circuit clean and m(M \\ C) only the rest
clean:

    faithfulness  f(C) = (m(C) - m(0)) / (m(M) - m(0))        ideal 1
    completeness  c(C) = (m(M \\ C) - m(0)) / (m(M) - m(0))    ideal 0

The headline is the paper's ratio of means over examples; its interval resamples examples. `CurvePoint` keeps the
values of every example, so that other summaries (median of ratios, the gap m(M) - m(0), CPR and CMD in
`circuits.areas`) need no new runs. Sizes are fixed on training data: `smallest_size` of a training curve, then the
test curve at that size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from circuits.attribution import top_nodes
from circuits.metric import Metric
from circuits.pathways import pathway_edits
from circuits.problem import measure
from shared.hooks import edit
from shared.stats import Interval, bootstrap_interval

if TYPE_CHECKING:
    from shared.models import Model
    from shared.tokens import TokenBatch


@dataclass(frozen=True)
class CurvePoint:
    """One circuit's values by example: the circuit alone, the model without it, and the two ends.

    `clusters` says which examples belong together (share a noun): intervals then resample whole clusters.
    """

    size: int
    circuit_B: Float[Tensor, " B"]
    rest_B: Float[Tensor, " B"]
    full_B: Float[Tensor, " B"]
    empty_B: Float[Tensor, " B"]
    clusters: tuple[str, ...] | None = None

    def faithfulness(self, seed: int = 0) -> Interval:
        """Return the ratio of means with its 95 % bootstrap interval over examples (or clusters of them)."""
        return self._ratio(self.circuit_B, seed)

    def completeness(self, seed: int = 0) -> Interval:
        """Return the ratio of means of the model without the circuit, with its interval."""
        return self._ratio(self.rest_B, seed)

    def _ratio(self, part_B: Tensor, seed: int) -> Interval:
        arrays = [x.double().cpu().numpy() for x in (part_B, self.full_B, self.empty_B)]
        if self.clusters is not None:  # a ratio of means is a ratio of sums, and these add up over clusters
            label_B = np.unique(self.clusters, return_inverse=True)[1]
            arrays = [np.bincount(label_B, weights=array) for array in arrays]
        return bootstrap_interval(*arrays, statistic=_ratio, seed=seed)

    def gap(self, seed: int = 0) -> Interval:
        """Return the mean of m(M) - m(0), the denominator of both ratios: where it is small they explode."""
        gap_B = (self.full_B - self.empty_B).double().cpu().numpy()
        return bootstrap_interval(gap_B, clusters=self.clusters, seed=seed)

    def per_example(self) -> Float[Tensor, "2 B"]:
        """Return faithfulness and completeness of every example (unstable where full - empty is small)."""
        gap_B = self.full_B - self.empty_B
        return torch.stack([(self.circuit_B - self.empty_B) / gap_B, (self.rest_B - self.empty_B) / gap_B])


def _ratio(part: NDArray, full: NDArray, empty: NDArray) -> NDArray | float:
    return (part - empty).mean(-1) / (full - empty).mean(-1)


def pathway_values(
    model: "Model",
    batch: "TokenBatch",
    metric: Metric,
    keep_BLTN: Bool[Tensor, "#B L #T N"],
    reference_BLTN: Float[Tensor, "#B L #T N"],
) -> Float[Tensor, "B K"]:
    """Return every target's value with every neuron outside `keep` at its reference."""
    with torch.no_grad(), edit(model, pathway_edits(model, keep_BLTN, reference_BLTN)):
        return measure(model, batch, metric)


def evaluate(
    model: "Model",
    batch: "TokenBatch",
    metric: Metric,
    circuits: Sequence[Bool[Tensor, "#B L T N"]],
    reference_BLTN: Float[Tensor, "#B L #T N"],
) -> list[CurvePoint]:
    """Return the values of every circuit (masks, one for all examples or one each) on one batch with one target."""

    def value_of(keep_BLTN: Tensor) -> Float[Tensor, " B"]:
        return pathway_values(model, batch, metric, keep_BLTN, reference_BLTN)[:, 0]

    nothing = torch.zeros_like(circuits[0])
    full_B, empty_B = value_of(~nothing), value_of(nothing)
    points = []
    for keep_BLTN in circuits:
        size = int(keep_BLTN.sum((-1, -2, -3)).float().mean().round())
        points.append(CurvePoint(size, value_of(keep_BLTN), value_of(~keep_BLTN), full_B, empty_B))
    return points


def curve(
    model: "Model",
    batch: "TokenBatch",
    metric: Metric,
    scores_BLTN: Float[Tensor, "#B L T N"],
    sizes: Sequence[int],
    reference_BLTN: Float[Tensor, "#B L #T N"],
) -> list[CurvePoint]:
    """Return the values of the top-k circuits by absolute score; one score tensor for all examples, or one each."""
    circuits = [torch.stack([top_nodes(row, size) for row in scores_BLTN]) for size in sizes]
    return evaluate(model, batch, metric, circuits, reference_BLTN)


def smallest_size(
    points: Sequence[CurvePoint], faithfulness: float = 0.9, completeness: float | None = None
) -> int | None:
    """Return the smallest size whose estimates reach the targets (completeness: at most), or None where none does.

    Call it on training data and report the test value at that size: a size read off the test curve is optimistic.
    """
    for point in sorted(points, key=lambda point: point.size):
        complete = completeness is None or point.completeness().estimate <= completeness
        if point.faithfulness().estimate >= faithfulness and complete:
            return point.size
    return None
