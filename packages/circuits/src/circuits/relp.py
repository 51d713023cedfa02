"""RelP node sensitivities of every neuron, and the ledger that makes the sum close (paper section 3, Appendix B).

One backward sweep of the frozen network gives, for each target, the total effect of one unit of every neuron, and the
relevance of every source: embeddings, position embeddings, and biases as nodes of their own. Their sum is the
target's value exactly (digest I1); `Ledger.error` says by how much it is missed.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.frozen import FrozenNetwork
from circuits.metric import Metric

CANCELLED = 0.1  # a value below this share of the absolute relevance is what cancellation left: rounding is not its own


@dataclass(frozen=True)
class Ledger:
    """Relevance of every source of K targets: token and position embeddings, and biases by layer and position.

    `attn_bias` holds value, output and norm biases of attention, `neuron_bias` what biases in front of the neurons give
    through them, `mlp_bias` the bias of the down projection.
    """

    value_BK: Float[Tensor, "B K"]
    embed_BKT: Float[Tensor, "B K T"]
    position_BKT: Float[Tensor, "B K T"]
    attn_bias_BKLT: Float[Tensor, "B K L T"]
    neuron_bias_BKLT: Float[Tensor, "B K L T"]
    mlp_bias_BKLT: Float[Tensor, "B K L T"]
    logit_bias_BK: Float[Tensor, "B K"]

    def _parts(self) -> list[Float[Tensor, "B K S"]]:
        tokens = [self.embed_BKT, self.position_BKT]
        return [
            *tokens,
            *(x.flatten(2) for x in (self.attn_bias_BKLT, self.neuron_bias_BKLT, self.mlp_bias_BKLT)),
        ]

    def total(self) -> Float[Tensor, "B K"]:
        """Return the sum over all sources, which conservation makes equal to the value."""
        return torch.stack([part.sum(-1) for part in self._parts()]).sum(0) + self.logit_bias_BK

    def mass(self) -> Float[Tensor, "B K"]:
        """Return the sum of absolute relevance over all sources."""
        return torch.stack([part.abs().sum(-1) for part in self._parts()]).sum(0) + self.logit_bias_BK.abs()

    def error(self) -> float:
        """Return the worst |total - value| relative to |value|, or to the mass where |value| is below a tenth of it."""
        value_BK, mass_BK = self.value_BK.abs(), self.mass()
        scale_BK = torch.where(value_BK < CANCELLED * mass_BK, mass_BK, value_BK)
        scale_BK = scale_BK.clamp_min(torch.finfo(scale_BK.dtype).tiny)
        return float(((self.total() - self.value_BK).abs() / scale_BK).max())


@dataclass(frozen=True)
class Relevance:
    """The total effect of one unit of every neuron on every target, and the ledger of all sources."""

    sensitivity_BKLTN: Float[Tensor, "B K L T N"]
    ledger: Ledger


def relp(network: FrozenNetwork, metric: Metric) -> Relevance:
    """Return sensitivities and ledger of every target in one backward sweep (padding positions get zero)."""
    seed_BKTD = network.seed(metric)
    effects, attn, inside, behind, bottom_BKTD = [], [], [], [], seed_BKTD
    for level in network.sweep(seed_BKTD):
        block = network.blocks[level.layer]
        read_BKTD = level.output_BKTD if block.parallel else level.middle_BKTD
        effects.append(level.neurons_BKTN)
        attn.append(torch.einsum("btd,bktd->bkt", block.attention_bias(), read_BKTD))
        inside.append(torch.einsum("btn,bktn->bkt", block.neuron_bias(), level.neurons_BKTN))
        behind.append(torch.einsum("btd,bktd->bkt", block.mlp_bias(), level.output_BKTD))
        bottom_BKTD = level.input_BKTD
    embed_BKT, position_BKT = _bottom(network, bottom_BKTD)
    ledger = Ledger(
        value_BK=metric.value(network.logits_BTV),
        embed_BKT=embed_BKT,
        position_BKT=position_BKT,
        attn_bias_BKLT=torch.stack(attn[::-1], dim=2),
        neuron_bias_BKLT=torch.stack(inside[::-1], dim=2),
        mlp_bias_BKLT=torch.stack(behind[::-1], dim=2),
        logit_bias_BK=network.logit_bias(metric),
    )
    return Relevance(torch.stack(effects[::-1], dim=2), ledger)


def _bottom(network: FrozenNetwork, g_BKTD: Tensor) -> tuple[Tensor, Tensor]:
    """Split the relevance of the embedding sum into tokens and, where the family learns them, positions."""
    if network.position_BTD is None:
        embed_BKT = torch.einsum("btd,bktd->bkt", network.embed_BTD, g_BKTD)
        return embed_BKT, torch.zeros_like(embed_BKT)
    position_BKT = torch.einsum("btd,bktd->bkt", network.position_BTD, g_BKTD)
    return torch.einsum("btd,bktd->bkt", network.embed_BTD - network.position_BTD, g_BKTD), position_BKT
