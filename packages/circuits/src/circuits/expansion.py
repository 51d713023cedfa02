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
        rows = _Strongest.none(self, len(neurons) + metric.positions_BK.shape[1])
        effects = direct_effects(self.network, neurons, metric, self.max_bytes, rows.add)
        sum_S = rows.sum_S + _other_mass(effects)
        share_Sr = rows.size_Sr / sum_S.clamp_min(torch.finfo(sum_S.dtype).tiny)[:, None]
        if logits:
            value_K = effects.value_S.abs()
            omega_K = value_K / value_K.sum().clamp_min(torch.finfo(value_K.dtype).tiny)
            self.by_layer[self.shape[0]] = [(omega_K, rows.source_Sr, share_Sr)]
            return
        flat_n = torch.stack([neurons.layer_n, neurons.position_n, neurons.index_n])
        flat_n = (flat_n[0] * self.shape[1] + flat_n[1]) * self.shape[2] + flat_n[2]
        for layer in neurons.layer_n.unique().tolist():
            here = neurons.layer_n == layer
            self.by_layer.setdefault(layer, []).append((flat_n[here], rows.source_Sr[here], share_Sr[here]))

    def influence(self) -> Float[Tensor, " F"]:
        """Return every neuron's influence along the rows taken, the highest layers of targets first."""
        total_F = self.network.embed_BTD.new_zeros(self.shape[0] * self.shape[1] * self.shape[2])
        for layer in sorted(self.by_layer, reverse=True):
            for target_S, source_Sr, share_Sr in self.by_layer[layer]:
                weight_S = target_S if layer == self.shape[0] else total_F[target_S]
                total_F.index_add_(0, source_Sr.flatten(), (weight_S[:, None] * share_Sr).flatten())
        return total_F


@dataclass
class _Strongest:
    """The r largest absolute entries of S rows and their sources (flat L T N), and the sum of all, layer by layer.

    Whole rows are never kept: those of a few targets on a long prompt would not fit.
    """

    layer_size: int
    size_Sr: Float[Tensor, "S r"]
    source_Sr: Int[Tensor, "S r"]
    sum_S: Float[Tensor, " S"]

    @classmethod
    def none(cls, rows: _Rows, n_targets: int) -> "_Strongest":
        """Nothing seen yet."""
        n_layers, n_positions, n_neurons = rows.shape
        layer_size = n_positions * n_neurons
        size_Sr = rows.network.embed_BTD.new_zeros(n_targets, min(rows.row_sources, n_layers * layer_size))
        return cls(
            layer_size, size_Sr, torch.zeros_like(size_Sr, dtype=torch.long), size_Sr.new_zeros(n_targets)
        )

    def add(self, targets: Int[Tensor, " S"], layer: int, effect_STN: Float[Tensor, "S T N"]) -> None:
        """See one layer's effects on some targets (of a prefix of the tokens)."""
        here_SF = effect_STN.abs().flatten(1)
        self.sum_S[targets] += here_SF.sum(1)
        n_kept = self.size_Sr.shape[1]
        here = here_SF.topk(min(n_kept, here_SF.shape[1]), dim=1)
        sizes = torch.cat([self.size_Sr[targets], here.values], dim=1)
        sources = torch.cat([self.source_Sr[targets], here.indices + layer * self.layer_size], dim=1)
        best = sizes.topk(n_kept, dim=1)
        self.size_Sr[targets], self.source_Sr[targets] = best.values, sources.gather(1, best.indices)


def _other_mass(effects: DirectEffects) -> Float[Tensor, " S"]:
    """Return what tokens and biases send to each target, absolutely."""
    biases_S = effects.attn_bias_SLT.abs().sum((-1, -2)) + effects.mlp_bias_SLT.abs().sum((-1, -2))
    return effects.embed_ST.abs().sum(-1) + effects.position_ST.abs().sum(-1) + biases_S + effects.own_S.abs()
