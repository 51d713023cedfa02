"""Direct effects between neurons, from all earlier layers at once (paper section 3.3; digest 1.6 and 3.3).

The direct effect of source s on target t runs along paths that meet no other MLP: the residual stream and attention's
OV circuits stay open, and `weight(s -> t) = a_s * da_t/da_s` in the frozen network. All targets share one sweep:

1. a target neuron starts as the row `c (p W_g + q W_u)` at its position, on the stream its MLP reads; a logit target
   starts at the top;
2. going down, each block applies its attention step only; the targets of each block passed join in;
3. at the output of each block, the weights of the wanted sources are inner products with their write directions, and
   one inner product a position gives the in-flow from all of the block's neurons together, wanted or not;
4. at the bottom the embeddings are read; biases are read on the way.

Time is linear in the targets, and memory is bounded: targets are independent, so they go down in groups whose
cotangents fit `max_bytes`. No token after a target can reach it, so a group of early targets sees a short prompt.

For every target, embeddings + biases + all neurons = the activation (or the logit): digest I2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.frozen import FrozenNetwork
from circuits.layers import FrozenBlock, FrozenNorm
from circuits.metric import Metric

# What a caller may look at on the way down: targets, layer, and the effect of all of the layer's neurons on them.
OnLayer = Callable[[Int[Tensor, " S"], int, Float[Tensor, "S T N"]], None]
COPIES = 6  # cotangents alive at once in an attention step: the stream, heads, values and their products


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


def direct_effects(
    network: FrozenNetwork,
    neurons: Neurons,
    metric: Metric,
    max_bytes: int = 1 << 30,
    on_layer: OnLayer | None = None,
) -> DirectEffects:
    """Return all direct effects among `neurons`, and on the metric's targets, of a network with one example.

    Targets are swept in groups whose cotangents take at most about `max_bytes` (at least one target a group).
    `on_layer` sees the effects of all neurons, wanted or not, which are never kept together.
    """
    if len(network.embed_BTD) != 1:
        raise ValueError("edges are traced one example at a time: use network.row(index)")
    effects = _no_effects(network, neurons, metric)
    position_S = torch.cat([neurons.position_n, metric.positions_BK[0]])
    row_bytes = COPIES * network.embed_BTD.shape[2] * network.embed_BTD.element_size()
    written = [_Written.of(block) for block in network.blocks]
    for targets, stop in _groups(position_S, max_bytes // row_bytes):
        _Sweep(_prefix(network, stop), neurons, metric, targets, effects, written, on_layer).run()
    return effects


@dataclass(frozen=True)
class _Written:
    """What all neurons of a block together, and its biases where it has some, write into the stream."""

    neurons_TD: Float[Tensor, "T D"]
    mlp_bias_TD: Float[Tensor, "T D"] | None
    attn_bias_TD: Float[Tensor, "T D"] | None

    @classmethod
    def of(cls, block: FrozenBlock) -> "_Written":
        """Compute it once for all groups."""
        biases = (block.mlp_bias()[0], block.attention_bias()[0])
        neurons_TD = block.write_forward(block.neurons_BTN[:, None], bias=False)[0, 0]
        return cls(neurons_TD, *(bias_TD if bias_TD.any() else None for bias_TD in biases))


def _no_effects(network: FrozenNetwork, neurons: Neurons, metric: Metric) -> DirectEffects:
    n, n_targets = len(neurons), metric.positions_BK.shape[1]
    n_layers, n_positions = len(network.blocks), network.embed_BTD.shape[1]
    new = network.embed_BTD.new_zeros
    source_n, observed_BTX = new(n), network.observed(metric)
    for layer, block in enumerate(network.blocks):
        here = neurons.layer_n == layer
        source_n[here] = block.neurons_BTN[0, neurons.position_n[here], neurons.index_n[here]]
    return DirectEffects(
        value_S=torch.cat([source_n, metric.value(observed_BTX)[0]]),
        source_n=source_n,
        unit_Sn=new(n + n_targets, n),
        embed_ST=new(n + n_targets, n_positions),
        position_ST=new(n + n_targets, n_positions),
        attn_bias_SLT=new(n + n_targets, n_layers, n_positions),
        mlp_bias_SLT=new(n + n_targets, n_layers, n_positions),
        own_S=torch.cat([new(n), network.logit_bias(metric)[0] + metric.rest(observed_BTX)[0]]),
        layer_SL=new(n + n_targets, n_layers),
    )


def _groups(position_S: Tensor, max_rows: int) -> Iterator[tuple[Tensor, int]]:
    """Yield groups of targets, the latest first, with the tokens they see; at most max_rows of targets times tokens.

    A group's earliest target sees at least half of what its latest one sees, so that little is swept in vain.
    """
    order, start = position_S.argsort(descending=True, stable=True), 0
    tokens_S = position_S[order] + 1
    while start < len(order):
        stop = int(tokens_S[start])
        late = int((2 * tokens_S[start:] >= stop).sum())
        size = max(1, min(late, max_rows // stop))
        yield order[start : start + size], stop
        start += size


def _prefix(network: FrozenNetwork, stop: int) -> FrozenNetwork:
    """Return the network of the first `stop` tokens: later ones cannot act on them."""
    if stop == network.embed_BTD.shape[1]:
        return network
    earlier_T = torch.arange(network.embed_BTD.shape[1], device=network.real_BT.device) < stop
    return replace(network, real_BT=network.real_BT & earlier_T).row(0)


class _Sweep:
    """A group of targets going down: their cotangents g (S T D), the latest layers first, and the columns they fill."""

    def __init__(
        self,
        network: FrozenNetwork,
        neurons: Neurons,
        metric: Metric,
        targets: Tensor,
        effects: DirectEffects,
        written: list[_Written],
        on_layer: OnLayer | None,
    ) -> None:
        self.network, self.neurons, self.effects = network, neurons, effects
        self.written, self.on_layer = written, on_layer
        n, (_, self.n_positions, width) = len(neurons), network.embed_BTD.shape
        self.depth, n_targets = network.depth(metric), metric.positions_BK.shape[1]
        # Twice the layer, and read-outs just above the blocks below them: the order in which targets join.
        joins_S = torch.cat([2 * neurons.layer_n, neurons.layer_n.new_full((n_targets,), 2 * self.depth - 1)])
        order = joins_S[targets].argsort(descending=True)
        self.targets, self.joins_S = targets[order], joins_S[targets][order]
        self.all_STD = network.embed_BTD.new_zeros(len(targets), self.n_positions, width)
        self.active = 0
        read_outs = self.targets[self.targets >= n] - n
        self.metric = replace(
            metric,
            weights_BKV=metric.weights_BKV[:, read_outs],
            positions_BK=metric.positions_BK[:, read_outs],
        )

    @property
    def g_STD(self) -> Float[Tensor, "S T D"]:
        """The cotangents of the targets that have joined."""
        return self.all_STD[: self.active]

    def run(self) -> None:
        """Walk all blocks from the last to the first, then read the embeddings."""
        for layer in reversed(range(len(self.network.blocks))):
            self._pass_block(layer)
        embed_TD, learned_BTD = self.network.embed_BTD[0], self.network.position_BTD
        position_TD = torch.zeros_like(embed_TD) if learned_BTD is None else learned_BTD[0]
        seen = slice(self.n_positions)
        self.effects.embed_ST[self.targets, seen] = self._read(embed_TD - position_TD)
        if learned_BTD is not None:
            self.effects.position_ST[self.targets, seen] = self._read(position_TD)

    def _pass_block(self, layer: int) -> None:
        """Read the sources of this block, then let its own targets join, then step through its attention."""
        block = self.network.blocks[layer]
        if layer == self.depth - 1:
            self._join_read_outs()
        if self.active:
            self._read_mlp(block, layer)
        if not block.parallel:
            self._join(block, layer)
        if self.active:
            self._read_bias(self.effects.attn_bias_SLT, layer, self.written[layer].attn_bias_TD)
            self.all_STD[: self.active] += block.attention_transpose(self.g_STD[None])[0]
        if block.parallel:
            self._join(block, layer)

    def _read(self, x_TD: Float[Tensor, "_ D"]) -> Float[Tensor, "S T"]:
        return torch.einsum("std,td->st", self.g_STD, x_TD[: self.n_positions])

    def _read_bias(self, effect_SLT: Tensor, layer: int, bias_TD: Float[Tensor, "T D"] | None) -> None:
        if bias_TD is not None:
            effect_SLT[self.targets[: self.active], layer, : self.n_positions] = self._read(bias_TD)

    def _read_mlp(self, block: FrozenBlock, layer: int) -> None:
        joined, neurons, effects = self.targets[: self.active], self.neurons, self.effects
        written = self.written[layer]
        effects.layer_SL[joined, layer] = (
            self.g_STD.flatten(1) @ written.neurons_TD[: self.n_positions].flatten()
        )
        self._read_bias(effects.mlp_bias_SLT, layer, written.mlp_bias_TD)
        if self.on_layer is not None:
            self.on_layer(joined, layer, block.write_transpose(self.g_STD[None])[0] * block.neurons_BTN[0])
        here = (neurons.layer_n == layer) & (neurons.position_n < self.n_positions)
        for sources in here.nonzero()[:, 0].split(
            self.n_positions
        ):  # a part takes no more than the stream itself
            position = neurons.position_n[sources]
            raw_hD = block.weights.down_DN[:, neurons.index_n[sources]].T
            write_hD = _at(block.mlp_post, position).forward(raw_hD[None, None], shift=False)[0, 0]
            seen_hSD = self.g_STD.transpose(0, 1)[position]
            effects.unit_Sn[joined[:, None], sources] = torch.bmm(seen_hSD, write_hD[..., None])[..., 0].T

    def _join_read_outs(self) -> None:
        """Start the metric's targets at the stream that it reads."""
        count = self.metric.positions_BK.shape[1]
        if count:
            self.all_STD[self.active : self.active + count] = self.network.seed(self.metric)[0]
            self.active += count

    def _join(self, block: FrozenBlock, layer: int) -> None:
        """Add this block's target neurons as one-hot cotangents pulled back to the stream their MLP reads."""
        joining = self.targets[self.joins_S == 2 * layer]
        if not len(joining):
            return
        position, index = self.neurons.position_n[joining], self.neurons.index_n[joining]
        rows = self.active + torch.arange(len(joining), device=position.device)
        self.all_STD[rows, position] = input_rows(block, position, index)
        self.active += len(joining)
        self.effects.own_S[joining] = block.neuron_bias()[0, position, index]


def _at(norm: FrozenNorm, position_n: Tensor) -> FrozenNorm:
    """Return the norm of a list of positions."""
    return replace(norm, scale_BTD=norm.scale_BTD[:, position_n])


def input_rows(block: FrozenBlock, position_n: Tensor, index_n: Tensor) -> Float[Tensor, "n D"]:
    """Return c (p W_g + q W_u) for each target: its derivative by the residual stream at its own position."""
    row_nD = block.up_BTN[0, position_n, index_n, None] * block.weights.up_ND[index_n]
    if block.gate_BTN is not None and block.weights.gate_ND is not None:
        row_nD = row_nD + block.gate_BTN[0, position_n, index_n, None] * block.weights.gate_ND[index_n]
    return _at(block.mlp_norm, position_n).transpose(row_nD[None, None])[0, 0]
