"""Which nodes and edges a graph keeps, and how much of the whole they carry (digest 1.7).

Nodes are ranked by absolute total effect summed over targets; a threshold is relative to |m| (its absolute value: a
negative metric must not keep everything). Edges are ranked by the share of the targets' value that passes through
them, |direct(s -> t)| * |total(t)| / |a_t|, an absolute quantity: relative weights cancel and have no bounded size.
`influence_keep` offers circuit-tracer's pruning by cumulative influence on the same matrices.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Selection(NamedTuple):
    """A mask and the share of the absolute mass it keeps."""

    mask: Bool[Tensor, "..."]
    mass_kept: float


def _share(scores: Tensor, mask: Tensor) -> float:
    total = scores.sum()
    return float(scores[mask].sum() / total) if total > 0 else 1.0


def select_nodes(
    totals_KLTN: Float[Tensor, "K L T N"],
    values_K: Float[Tensor, " K"],
    threshold: float = 0.005,
    max_nodes: int | None = None,
) -> Selection:
    """Keep nodes whose total effect on some target reaches `threshold` of that target's |value|, the largest first.

    `max_nodes` bounds their number by the sum of absolute effects over targets.
    """
    reach_LTN = (totals_KLTN.abs() >= threshold * values_K.abs()[:, None, None, None]).any(0)
    strength_LTN = totals_KLTN.abs().sum(0)
    mask_LTN = reach_LTN & (strength_LTN > 0)
    if max_nodes is not None and int(mask_LTN.sum()) > max_nodes:
        chosen = strength_LTN.masked_fill(~mask_LTN, -1.0).flatten().topk(max_nodes).indices
        mask_LTN = torch.zeros_like(mask_LTN).flatten().index_fill_(0, chosen, True).reshape(mask_LTN.shape)
    return Selection(mask_LTN, _share(strength_LTN, mask_LTN))


def select_edges(strength_Ss: Float[Tensor, "S s"], max_edges: int) -> Selection:
    """Keep the strongest non-zero entries of a targets x sources matrix of absolute strengths."""
    flat = strength_Ss.flatten()
    chosen = flat.topk(min(max_edges, flat.numel())).indices
    mask_Ss = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, chosen, True).reshape(strength_Ss.shape)
    mask_Ss &= strength_Ss > 0
    return Selection(mask_Ss, _share(strength_Ss, mask_Ss))


def influence(
    weight_nn: Float[Tensor, "n n"], logit_weight_n: Float[Tensor, " n"], max_steps: int = 10_000
) -> Float[Tensor, " n"]:
    """Return omega (B + B^2 + ...) with B the row-normalised |weight| (rows are targets), omega the logit weights.

    The graph must be acyclic, so that the series ends; otherwise ValueError.
    """
    rows = weight_nn.abs()
    rows = rows / rows.sum(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    step_n, total_n = logit_weight_n @ rows, torch.zeros_like(logit_weight_n)
    for _ in range(max_steps):
        if not step_n.any():
            return total_n
        total_n, step_n = total_n + step_n, step_n @ rows
    raise ValueError("influence does not end: the weights contain a cycle")


def influence_keep(scores_n: Float[Tensor, " n"], share: float) -> Bool[Tensor, " n"]:
    """Return the smallest set of nodes that holds at least `share` of the summed scores."""
    order = scores_n.argsort(descending=True)
    reached = scores_n[order].cumsum(0)
    count = int((reached < share * reached[-1]).sum()) + 1
    return torch.zeros_like(scores_n, dtype=torch.bool).index_fill_(0, order[:count], True)
