"""Direct effects between neurons, from all earlier layers at once (paper section 3.3; digest 1.6 and 3.3).

The direct effect of source s on target t runs along paths that meet no other MLP: the residual stream and attention's
OV circuits stay open, and `weight(s -> t) = a_s * da_t/da_s` in the frozen network. All targets share one sweep:

1. a target neuron starts as the row `c (p W_g + q W_u)` at its position, on the stream its MLP reads; a logit target
   starts at the top;
2. going down, each block applies its attention step only; the batch grows by the targets of each block passed;
3. at the output of each block, the weights of the wanted sources are inner products with their write directions, and
   one inner product a position gives the in-flow from all of the block's neurons together, wanted or not;
4. at the bottom the embeddings are read; biases are read on the way.

For every target, embeddings + biases + all neurons = the activation (or the logit): digest I2.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.frozen import FrozenNetwork
from circuits.layers import FrozenBlock
from circuits.metric import Metric


@dataclass(frozen=True)
class Neurons:
    """A set of n nodes of one example as columns, ordered by layer, position, index."""

    layer_n: Int[Tensor, " n"]
    position_n: Int[Tensor, " n"]
    index_n: Int[Tensor, " n"]

    @classmethod
    def from_mask(cls, mask_LTN: Tensor) -> "Neurons":
        """Return the nodes that a mask selects, in order."""
        return cls(*mask_LTN.nonzero().T.contiguous())

    def __len__(self) -> int:
        return len(self.layer_n)

    def gather(self, x_LTN: Float[Tensor, "L T N"]) -> Float[Tensor, " n"]:
        """Return the nodes' entries of a node tensor."""
        return x_LTN[self.layer_n, self.position_n, self.index_n]


@dataclass(frozen=True)
class DirectEffects:
    """Direct effects on S targets (the n neurons in order, then the K logits) of one example.

    `unit_Sn` is the effect of one unit of a wanted source, `neuron_Sn` that of its activation; `layer_SL` is the
    in-flow from *all* neurons of each layer, so that `layer_SL.sum(-1) - neuron_Sn.sum(-1)` is what unwanted neurons
    send. `own_S` is the target's own bias.
    """

    value_S: Float[Tensor, " S"]
    source_n: Float[Tensor, " n"]
    unit_Sn: Float[Tensor, "S n"]
    embed_ST: Float[Tensor, "S T"]
    position_ST: Float[Tensor, "S T"]
    attn_bias_SLT: Float[Tensor, "S L T"]
    mlp_bias_SLT: Float[Tensor, "S L T"]
    own_S: Float[Tensor, " S"]
    layer_SL: Float[Tensor, "S L"]

    @property
    def neuron_Sn(self) -> Float[Tensor, "S n"]:
        """Direct effect of every wanted source: its activation times the effect of one unit."""
        return self.unit_Sn * self.source_n

    def inflow(self) -> Float[Tensor, " S"]:
        """Return the sum over all sources of each target, which equals its value (digest I2)."""
        tokens_S = self.embed_ST.sum(-1) + self.position_ST.sum(-1)
        biases_S = self.attn_bias_SLT.sum((-1, -2)) + self.mlp_bias_SLT.sum((-1, -2)) + self.own_S
        return tokens_S + biases_S + self.layer_SL.sum(-1)

    def remainder(self) -> Float[Tensor, " S"]:
        """Return the in-flow from neurons that are not among the wanted sources."""
        return self.layer_SL.sum(-1) - self.neuron_Sn.sum(-1)


def direct_effects(network: FrozenNetwork, neurons: Neurons, metric: Metric) -> DirectEffects:
    """Return all direct effects among `neurons`, and on the metric's targets, of a network with one example.

    Time is one attention-only sweep of n + K cotangents; memory is their T x D rows.
    """
    seeds = _Sweep(network, neurons, metric)
    for layer in reversed(range(len(network.blocks))):
        seeds.pass_block(layer)
    return seeds.finish()


class _Sweep:
    """The growing batch of cotangents g (S T D), logit targets first, and the columns filled on the way down."""

    def __init__(self, network: FrozenNetwork, neurons: Neurons, metric: Metric) -> None:
        if len(network.embed_BTD) != 1:
            raise ValueError("edges are traced one example at a time: use network.row(index)")
        self.network, self.neurons = network, neurons
        n, n_targets, n_layers = len(neurons), metric.weights_BKV.shape[1], len(network.blocks)
        n_positions = network.embed_BTD.shape[1]
        self.g_STD = network.seed(metric)[0]
        self.targets = torch.arange(n, n + n_targets, device=self.g_STD.device)
        new = self.g_STD.new_zeros
        self.unit_Sn = new(n + n_targets, n)
        self.attn_bias_SLT = new(n + n_targets, n_layers, n_positions)
        self.mlp_bias_SLT = new(n + n_targets, n_layers, n_positions)
        self.layer_SL = new(n + n_targets, n_layers)
        self.own_S, self.value_S = new(n + n_targets), new(n + n_targets)
        self.own_S[n:] = network.logit_bias(metric)[0]
        self.value_S[n:] = metric.value(network.logits_BTV)[0]

    def pass_block(self, layer: int) -> None:
        """Read the sources of this block, then let its own targets join, then step through its attention."""
        block = self.network.blocks[layer]
        wanted = (self.neurons.layer_n == layer).nonzero()[:, 0]
        self._read_neurons(block, layer, wanted)
        if not block.parallel:
            self._join(block, wanted)
        self._read_attention_bias(block, layer)
        self.g_STD = self.g_STD + block.attention_transpose(self.g_STD[None])[0]
        if block.parallel:
            self._join(block, wanted)

    def _read_neurons(self, block: FrozenBlock, layer: int, wanted: Tensor) -> None:
        pulled_STD = block.mlp_post.transpose(self.g_STD[None])[0]
        raw_TD = block.neurons_BTN[0] @ block.weights.down_DN.T
        self.layer_SL[self.targets, layer] = torch.einsum("std,td->s", pulled_STD, raw_TD)
        mlp_bias_ST = torch.einsum("std,td->st", self.g_STD, block.mlp_bias()[0])
        self.mlp_bias_SLT[self.targets, layer] = mlp_bias_ST
        for position in self.neurons.position_n[wanted].unique().tolist():
            sources = wanted[self.neurons.position_n[wanted] == position]
            index = self.neurons.index_n[sources]
            unit_Sn = pulled_STD[:, position] @ block.weights.down_DN[:, index]
            self.unit_Sn[self.targets[:, None], sources] = unit_Sn

    def _read_attention_bias(self, block: FrozenBlock, layer: int) -> None:
        bias_ST = torch.einsum("std,td->st", self.g_STD, block.attention_bias()[0])
        self.attn_bias_SLT[self.targets, layer] = bias_ST

    def _join(self, block: FrozenBlock, wanted: Tensor) -> None:
        """Add this block's target neurons as one-hot cotangents pulled back to the stream their MLP reads."""
        if not len(wanted):
            return
        position, index = self.neurons.position_n[wanted], self.neurons.index_n[wanted]
        row_nD = _input_rows(block, position, index)
        seed_nTD = self.g_STD.new_zeros(len(wanted), *self.g_STD.shape[1:])
        seed_nTD[torch.arange(len(wanted), device=position.device), position] = row_nD
        self.g_STD = torch.cat([self.g_STD, seed_nTD])
        self.targets = torch.cat([self.targets, wanted])
        self.own_S[wanted] = block.neuron_bias()[0, position, index]
        self.value_S[wanted] = block.neurons_BTN[0, position, index]

    def finish(self) -> DirectEffects:
        """Read the embeddings with what is left at the bottom."""
        network, order = self.network, torch.empty_like(self.targets)
        order[self.targets] = torch.arange(len(self.targets), device=self.targets.device)
        g_STD = self.g_STD[order]
        embed_TD = network.embed_BTD[0]
        position_TD = torch.zeros_like(embed_TD) if network.position_BTD is None else network.position_BTD[0]
        return DirectEffects(
            value_S=self.value_S,
            source_n=self.value_S[: len(self.neurons)],
            unit_Sn=self.unit_Sn,
            embed_ST=torch.einsum("std,td->st", g_STD, embed_TD - position_TD),
            position_ST=torch.einsum("std,td->st", g_STD, position_TD),
            attn_bias_SLT=self.attn_bias_SLT,
            mlp_bias_SLT=self.mlp_bias_SLT,
            own_S=self.own_S,
            layer_SL=self.layer_SL,
        )


def _input_rows(block: FrozenBlock, position_n: Tensor, index_n: Tensor) -> Float[Tensor, "n D"]:
    """Return c (p W_g + q W_u) for each target: its derivative by the residual stream at its own position."""
    row_nD = block.up_BTN[0, position_n, index_n, None] * block.weights.up_ND[index_n]
    if block.gate_BTN is not None and block.weights.gate_ND is not None:
        row_nD = row_nD + block.gate_BTN[0, position_n, index_n, None] * block.weights.gate_ND[index_n]
    norm = block.mlp_norm
    row_nD = row_nD * norm.scale_BTD[0, position_n]
    return row_nD - row_nD.mean(-1, keepdim=True) if norm.centred else row_nD
