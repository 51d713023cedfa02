"""Which neurons a graph is grown over: by influence, from the targets downwards, under a budget (digest 7).

Ranking all neurons by total effect misses those whose effects cancel later and keeps those that reach the targets along
paths the graph will not show. Expansion follows direct effects instead:

1. take the rows of the targets: the direct effects of every neuron, token and bias on them, as shares of |row|;
2. influence of a neuron = sum over the rows taken of (influence of the row's target) * (its share in the row);
3. take the rows of the `batch` most influential neurons that have none yet, rank again, and so on to the budget.

A row that is taken later adds to the influence of everything below it, so ranks change between batches. Of each row the
`row_sources` largest entries are kept; the row's sum counts all of them, and tokens and biases too.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.edges import DirectEffects, Neurons, direct_effects
from circuits.frozen import FrozenNetwork
from circuits.metric import Metric
from shared.errors import UserError


def expand(
    network: FrozenNetwork,
    metric: Metric,
    budget: int,
    batch: int = 32,
    row_sources: int = 4096,
    max_bytes: int = 1 << 30,
) -> Bool[Tensor, "L T N"]:
    """Return the mask of at most `budget` neurons of one example, the most influential ones found batch by batch."""
    if min(budget, batch, row_sources) < 1:
        raise UserError(f"budget, batch and row_sources are at least 1; got {budget}, {batch}, {row_sources}")
    shape = (len(network.blocks), *network.blocks[0].neurons_BTN.shape[1:])
    nobody = Neurons.from_mask(torch.zeros(shape, dtype=torch.bool, device=network.embed_BTD.device))
    rows = _Rows(network, metric, row_sources, max_bytes)
    rows.take(nobody, logits=True)
    chosen_F = torch.zeros(shape, dtype=torch.bool, device=network.embed_BTD.device).flatten()
    while (left := budget - int(chosen_F.sum())) > 0:
        influence_F = rows.influence().masked_fill(chosen_F, 0.0)
        best = influence_F.topk(min(batch, left, len(influence_F)))
        new = best.indices[best.values > 0]
        if not len(new):
            break
        chosen_F[new] = True
        mask_F = torch.zeros_like(chosen_F).index_fill_(0, new, True)
        rows.take(Neurons.from_mask(mask_F.reshape(shape)), logits=False)
    return chosen_F.reshape(shape)


@dataclass
class _Rows:
    """The rows taken so far, those of one layer of targets together: sources (flat L T N) and shares, r of each."""

    network: FrozenNetwork
    metric: Metric
    row_sources: int
    max_bytes: int
    by_layer: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, tokens, neurons."""
        _, n_positions, n_neurons = self.network.blocks[0].neurons_BTN.shape
        return len(self.network.blocks), n_positions, n_neurons

    def take(self, neurons: Neurons, logits: bool) -> None:
        """Compute and keep the rows of some neurons, or of the logits."""
        metric = self.metric
        if not logits:
            none = slice(0)
            metric = Metric(
                metric.name,
                metric.weights_BKV[:, none],
                metric.positions_BK[:, none],
                metric.tokens,
                metric.site,
            )
        n_rows = len(neurons) + metric.positions_BK.shape[1]
        dense_SLTN = self.network.embed_BTD.new_zeros(n_rows, *self.shape)

        def read(targets: Int[Tensor, " S"], layer: int, effect_STN: Float[Tensor, "S T N"]) -> None:
            dense_SLTN[targets, layer, : effect_STN.shape[1]] = effect_STN.abs()

        effects = direct_effects(self.network, neurons, metric, self.max_bytes, read)
        dense_SF = dense_SLTN.flatten(1)
        sum_S = dense_SF.sum(1) + _other_mass(effects)
        top = dense_SF.topk(min(self.row_sources, dense_SF.shape[1]), dim=1)
        share_Sr = top.values / sum_S.clamp_min(torch.finfo(sum_S.dtype).tiny)[:, None]
        if logits:
            value_K = effects.value_S.abs()
            omega_K = value_K / value_K.sum().clamp_min(torch.finfo(value_K.dtype).tiny)
            self.by_layer[self.shape[0]] = [(omega_K, top.indices, share_Sr)]
            return
        flat_n = torch.stack([neurons.layer_n, neurons.position_n, neurons.index_n])
        flat_n = (flat_n[0] * self.shape[1] + flat_n[1]) * self.shape[2] + flat_n[2]
        for layer in neurons.layer_n.unique().tolist():
            here = neurons.layer_n == layer
            self.by_layer.setdefault(layer, []).append((flat_n[here], top.indices[here], share_Sr[here]))

    def influence(self) -> Float[Tensor, " F"]:
        """Return every neuron's influence along the rows taken, the highest layers of targets first."""
        total_F = self.network.embed_BTD.new_zeros(self.shape[0] * self.shape[1] * self.shape[2])
        for layer in sorted(self.by_layer, reverse=True):
            for target_S, source_Sr, share_Sr in self.by_layer[layer]:
                weight_S = target_S if layer == self.shape[0] else total_F[target_S]
                total_F.index_add_(0, source_Sr.flatten(), (weight_S[:, None] * share_Sr).flatten())
        return total_F


def _other_mass(effects: DirectEffects) -> Float[Tensor, " S"]:
    """Return what tokens and biases send to each target, absolutely."""
    biases_S = effects.attn_bias_SLT.abs().sum((-1, -2)) + effects.mlp_bias_SLT.abs().sum((-1, -2))
    return effects.embed_ST.abs().sum(-1) + effects.position_ST.abs().sum(-1) + biases_S + effects.own_S.abs()
