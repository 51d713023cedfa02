"""Is every node of a circuit needed? Each one taken out, beside nodes from outside put in (digest 1.8).

With C a circuit and the gap m(M) - m(0) as unit (circuits.faithfulness):

    need of v in C       (m(C) - m(C \\ v)) / gap       what is lost when v too goes to its reference
    need of u not in C   (m(C + u) - m(C)) / gap       the control: what a random outsider would add

A circuit is minimal as far as its needs stand out from the control's: `Minimality.minimal_share` is the share of nodes
whose absolute need exceeds the 95 % quantile of the control's. Means over examples; a node's sign tells a node that
works against the answer (negative) from one that works for it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.faithfulness import pathway_values
from circuits.metric import Metric

if TYPE_CHECKING:
    from shared.models import Model
    from shared.tokens import TokenBatch


@dataclass(frozen=True)
class Minimality:
    """The need of each of n circuit nodes and of r random outsiders, in units of the gap (layer, position, neuron)."""

    nodes_n3: Int[Tensor, "n 3"]
    need_n: Float[Tensor, " n"]
    outside_r3: Int[Tensor, "r 3"]
    outside_need_r: Float[Tensor, " r"]

    def minimal_share(self, level: float = 0.95) -> float:
        """Return the share of the circuit's nodes whose |need| exceeds the outsiders' `level` quantile."""
        bar = self.outside_need_r.abs().quantile(level)
        return float((self.need_n.abs() > bar).double().mean())


def minimality(
    model: "Model",
    batch: "TokenBatch",
    metric: Metric,
    keep_LTN: Bool[Tensor, "L T N"],
    reference_BLTN: Float[Tensor, "#B L #T N"],
    controls: int = 100,
    seed: int = 0,
) -> Minimality:
    """Return the need of every node of a circuit and of `controls` random nodes outside: one run of the batch each."""

    def mean_value(mask_LTN: Tensor) -> float:
        return float(pathway_values(model, batch, metric, mask_LTN[None], reference_BLTN)[:, 0].mean())

    def flipped(node_3: Tensor) -> float:
        mask_LTN = keep_LTN.clone()
        mask_LTN[tuple(node_3)] ^= True
        return mean_value(mask_LTN)

    nothing_LTN = torch.zeros_like(keep_LTN)
    gap, circuit = mean_value(~nothing_LTN) - mean_value(nothing_LTN), mean_value(keep_LTN)
    nodes_n3, rest_m3 = keep_LTN.nonzero(), (~keep_LTN).nonzero()
    drawn_r = torch.randperm(len(rest_m3), generator=torch.Generator().manual_seed(seed))[:controls]
    outside_r3 = rest_m3[drawn_r.to(rest_m3.device)]
    need_n = torch.tensor([(circuit - flipped(node_3)) / gap for node_3 in nodes_n3])
    outside_need_r = torch.tensor([(flipped(node_3) - circuit) / gap for node_3 in outside_r3])
    return Minimality(nodes_n3, need_n, outside_r3, outside_need_r)
