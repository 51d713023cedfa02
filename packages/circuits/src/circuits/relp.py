"""RelP node sensitivities of every neuron, and the ledger that makes the sum close (paper section 3, Appendix B).

One backward sweep of the frozen network gives, for each target, the total effect of one unit of every neuron (or of
every node of another basis), and the relevance of every source: embeddings, position embeddings, biases as nodes of
their own, and the constant that a metric which is not linear leaves. Their sum is the target's value exactly (digest
I1); `Ledger.error` says by how much it is missed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.bases import NEURONS, Basis
from circuits.frozen import FrozenNetwork, Level
from circuits.layers import FrozenBlock
from circuits.metric import Metric

CANCELLED = 0.1  # a value below this share of the absolute relevance is what cancellation left: rounding is not its own


@dataclass(frozen=True)
class Ledger:
    """Relevance of every source of K targets: token and position embeddings, and biases by layer and position.

    `attn_bias` holds value, output and norm biases of attention, `neuron_bias` what biases in front of the neurons give
    through them, `mlp_bias` the bias of the down projection, `rest` what is no function of the sources
    (`Metric.rest`).
    """

    value_BK: Float[Tensor, "B K"]
    embed_BKT: Float[Tensor, "B K T"]
    position_BKT: Float[Tensor, "B K T"]
    attn_bias_BKLT: Float[Tensor, "B K L T"]
    neuron_bias_BKLT: Float[Tensor, "B K L T"]
    mlp_bias_BKLT: Float[Tensor, "B K L T"]
    logit_bias_BK: Float[Tensor, "B K"]
    rest_BK: Float[Tensor, "B K"]

    def _parts(self) -> list[Float[Tensor, "B K S"]]:
        tokens = [self.embed_BKT, self.position_BKT]
        return [
            *tokens,
            *(x.flatten(2) for x in (self.attn_bias_BKLT, self.neuron_bias_BKLT, self.mlp_bias_BKLT)),
            torch.stack([self.logit_bias_BK, self.rest_BK], dim=-1),
        ]

    def total(self) -> Float[Tensor, "B K"]:
        """Return the sum over all sources, which conservation makes equal to the value."""
        return torch.stack([part.sum(-1) for part in self._parts()]).sum(0)

    def mass(self) -> Float[Tensor, "B K"]:
        """Return the sum of absolute relevance over all sources."""
        return torch.stack([part.abs().sum(-1) for part in self._parts()]).sum(0)

    def error(self) -> float:
        """Return the worst |total - value| relative to |value|, or to the mass where |value| is below a tenth of it."""
        value_BK, mass_BK = self.value_BK.abs(), self.mass()
        scale_BK = torch.where(value_BK < CANCELLED * mass_BK, mass_BK, value_BK)
        scale_BK = scale_BK.clamp_min(torch.finfo(scale_BK.dtype).tiny)
        return float(((self.total() - self.value_BK).abs() / scale_BK).max())


@dataclass(frozen=True)
class Relevance:
    """The total effect of one unit of every node coordinate on every target, and the ledger of all sources."""

    sensitivity_BKLTN: Float[Tensor, "B K L T N"]
    ledger: Ledger


def relp(network: FrozenNetwork, metric: Metric, basis: Basis = NEURONS) -> Relevance:
    """Return sensitivities and ledger of every target in one backward sweep (padding positions get zero)."""
    seed_BKTD = network.seed(metric)
    n_batch, n_targets, n_positions, _ = seed_BKTD.shape
    single = basis.kind == "embed"  # one layer, whose effect is the cotangent at the bottom
    n_layers = 1 if single else len(network.blocks)
    sensitivity_BKLTN: Tensor | None = None
    biases_3BKLT = seed_BKTD.new_zeros(3, n_batch, n_targets, len(network.blocks), n_positions)
    bottom_BKTD = seed_BKTD
    for level in network.sweep(seed_BKTD, network.depth(metric)):
        block, bottom_BKTD = network.blocks[level.layer], level.input_BKTD
        effect_BKTN = basis.effect(network, level)
        if sensitivity_BKLTN is None:
            shape = (n_batch, n_targets, n_layers, n_positions, effect_BKTN.shape[-1])
            sensitivity_BKLTN = seed_BKTD.new_zeros(shape)
        sensitivity_BKLTN[:, :, 0 if single else level.layer] = effect_BKTN
        if block.affine:
            for kind, relevance_BKT in enumerate(_biases(block, level)):
                biases_3BKLT[kind, :, :, level.layer] = relevance_BKT
    assert sensitivity_BKLTN is not None  # a model has a block
    embed_BKT, position_BKT = _bottom(network, bottom_BKTD)
    read_BTX = network.observed(metric)
    attn_bias_BKLT, neuron_bias_BKLT, mlp_bias_BKLT = biases_3BKLT.unbind()
    ledger = Ledger(
        value_BK=metric.value(read_BTX),
        embed_BKT=embed_BKT,
        position_BKT=position_BKT,
        attn_bias_BKLT=attn_bias_BKLT,
        neuron_bias_BKLT=neuron_bias_BKLT,
        mlp_bias_BKLT=mlp_bias_BKLT,
        logit_bias_BK=network.logit_bias(metric),
        rest_BK=metric.rest(read_BTX),
    )
    return Relevance(sensitivity_BKLTN, ledger)


def _biases(block: FrozenBlock, level: Level) -> Iterator[Float[Tensor, "B K T"]]:
    """Yield what the biases of attention, in front of the neurons and behind them give at each position."""
    for bias_BTX, effect_BKTX in (
        (block.attention_bias(), level.attention_BKTD),
        (block.neuron_bias(), level.neurons_BKTN),
        (block.mlp_bias(), level.output_BKTD),
    ):
        yield torch.einsum("btx,bktx->bkt", bias_BTX, effect_BKTX)


def _bottom(network: FrozenNetwork, g_BKTD: Tensor) -> tuple[Tensor, Tensor]:
    """Split the relevance of the embedding sum into tokens and, where the family learns them, positions."""
    if network.position_BTD is None:
        embed_BKT = torch.einsum("btd,bktd->bkt", network.embed_BTD, g_BKTD)
        return embed_BKT, torch.zeros_like(embed_BKT)
    position_BKT = torch.einsum("btd,bktd->bkt", network.position_BTD, g_BKTD)
    return torch.einsum("btd,bktd->bkt", network.embed_BTD - network.position_BTD, g_BKTD), position_BKT
