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

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

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
    position_S = torch.cat([neurons.position_n, metric.positions_BK[0]])
    row_bytes = COPIES * network.embed_BTD.shape[2] * network.embed_BTD.element_size()
    blocks = tuple(replace(block, attention=block.attention.hold()) for block in network.blocks)
    network = replace(network, blocks=blocks)
    effects = _no_effects(network, neurons, metric)
    start_nD = _starts(network, neurons, effects)
    levels = [_level(block, neurons, layer) for layer, block in enumerate(network.blocks)]
    for targets, stop in _groups(position_S, max_bytes // row_bytes):
        prefix = network.select(slice(None), slice(stop))  # later tokens cannot act on them
        _Sweep(prefix, neurons, metric, targets, effects, start_nD, levels, on_layer).run()
    return effects


class _Sources(NamedTuple):
    """Some wanted sources of a layer by position: their columns, what their m distinct neurons write, which is whose.

    `positions` are those of `position_h`, so that the sources that a prefix has are found without a look at the device.
    """

    source_h: Int[Tensor, " h"]
    position_h: Int[Tensor, " h"]
    write_Dm: Float[Tensor, "D m"]
    place_h: Int[Tensor, " h"]
    positions: list[int]


class _Level(NamedTuple):
    """What a layer holds for all groups: sources, and what its neurons together, and its biases, write."""

    sources: list[_Sources]
    neurons_TD: Float[Tensor, "T D"]
    mlp_bias_TD: Float[Tensor, "T D"] | None
    attn_bias_TD: Float[Tensor, "T D"] | None


def _level(block: FrozenBlock, neurons: Neurons, layer: int) -> _Level:
    return _Level(
        sources=_sources(block, neurons, layer),
        neurons_TD=block.write_forward(block.neurons_BTN[:, None], bias=False)[0, 0],
        mlp_bias_TD=block.mlp_bias()[0] if block.affine else None,
        attn_bias_TD=block.attention_bias()[0] if block.affine else None,
    )


def _sources(block: FrozenBlock, neurons: Neurons, layer: int) -> list[_Sources]:
    """Split a layer's sources so that the products with a part's distinct neurons take no more than the stream."""
    source_h = (neurons.layer_n == layer).nonzero()[:, 0]
    source_h = source_h[neurons.position_n[source_h].argsort(stable=True)]
    index_m, place_h = neurons.index_n[source_h].unique(return_inverse=True)
    down_DN, parts = block.weights.down_DN, []
    width = down_DN.shape[0]
    for first in range(0, len(index_m), width):
        here = (place_h // width == first // width).nonzero()[:, 0]
        position_h = neurons.position_n[source_h[here]]
        write_Dm = down_DN[:, index_m[first : first + width]]
        place = place_h[here] - first
        parts.append(_Sources(source_h[here], position_h, write_Dm, place, position_h.tolist()))
    return parts


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


def _starts(network: FrozenNetwork, neurons: Neurons, effects: DirectEffects) -> Float[Tensor, "n D"]:
    """Return every target neuron's row on the stream that its MLP reads, and enter its own bias."""
    start_nD = network.embed_BTD.new_empty(len(neurons), network.embed_BTD.shape[2])
    for layer, block in enumerate(network.blocks):
        here = (neurons.layer_n == layer).nonzero()[:, 0]
        position, index = neurons.position_n[here], neurons.index_n[here]
        start_nD[here] = input_rows(block, position, index)
        if block.affine:
            effects.own_S[here] = block.neuron_bias()[0, position, index]
    return start_nD


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


class _Sweep:
    """A group of targets going down: their cotangents g (S T D), the latest layers first, and the columns they fill."""

    def __init__(
        self,
        network: FrozenNetwork,
        neurons: Neurons,
        metric: Metric,
        targets: Tensor,
        effects: DirectEffects,
        start_nD: Float[Tensor, "n D"],
        levels: list[_Level],
        on_layer: OnLayer | None,
    ) -> None:
        self.network, self.neurons, self.effects = network, neurons, effects
        self.start_nD, self.levels, self.on_layer = start_nD, levels, on_layer
        n, (_, self.n_positions, width) = len(neurons), network.embed_BTD.shape
        self.depth, n_targets = network.depth(metric), metric.positions_BK.shape[1]
        # Twice the layer, and read-outs just above the blocks below them: the order in which targets join.
        joins_S = torch.cat([2 * neurons.layer_n, neurons.layer_n.new_full((n_targets,), 2 * self.depth - 1)])
        order = joins_S[targets].argsort(descending=True)
        self.targets = targets[order]
        layer_s = neurons.layer_n[targets[targets < n]]
        self.joining = layer_s.bincount(minlength=len(network.blocks)).tolist()
        self.all_STD = network.embed_BTD.new_zeros(len(targets), self.n_positions, width)
        self.layer_SL = network.embed_BTD.new_zeros(len(targets), len(network.blocks))
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
        self.effects.layer_SL[self.targets] = self.layer_SL
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
            self._join(layer)
        if self.active:
            self._read_bias(self.effects.attn_bias_SLT, layer, self.levels[layer].attn_bias_TD)
            block.add_attention_transpose_(self.g_STD[None])
        if block.parallel:
            self._join(layer)

    def _read(self, x_TD: Float[Tensor, "_ D"]) -> Float[Tensor, "S T"]:
        return torch.einsum("std,td->st", self.g_STD, x_TD[: self.n_positions])

    def _read_bias(self, effect_SLT: Tensor, layer: int, bias_TD: Float[Tensor, "T D"] | None) -> None:
        if bias_TD is not None:
            effect_SLT[self.targets[: self.active], layer, : self.n_positions] = self._read(bias_TD)

    def _read_mlp(self, block: FrozenBlock, layer: int) -> None:
        joined, level = self.targets[: self.active], self.levels[layer]
        written_F = level.neurons_TD[: self.n_positions].flatten()
        self.layer_SL[: self.active, layer] = self.g_STD.flatten(1) @ written_F
        self._read_bias(self.effects.mlp_bias_SLT, layer, level.mlp_bias_TD)
        if self.on_layer is not None:
            self.on_layer(joined, layer, block.write_transpose(self.g_STD[None])[0] * block.neurons_BTN[0])
        read_STD = block.mlp_post.transpose(self.g_STD[None])[0]
        for part in level.sources:
            seen = slice(bisect_left(part.positions, self.n_positions))
            unit_Sh = (read_STD @ part.write_Dm)[:, part.position_h[seen], part.place_h[seen]]
            self.effects.unit_Sn[joined[:, None], part.source_h[seen]] = unit_Sh

    def _join_read_outs(self) -> None:
        """Start the metric's targets at the stream that it reads."""
        count = self.metric.positions_BK.shape[1]
        if count:
            self.all_STD[self.active : self.active + count] = self.network.seed(self.metric)[0]
            self.active += count

    def _join(self, layer: int) -> None:
        """Add this block's target neurons, each a row at its position."""
        count = self.joining[layer]
        joining = self.targets[self.active : self.active + count]
        rows = torch.arange(self.active, self.active + count, device=joining.device)
        self.all_STD[rows, self.neurons.position_n[joining]] = self.start_nD[joining]
        self.active += count


def _at(norm: FrozenNorm, position_n: Tensor) -> FrozenNorm:
    """Return the norm of a list of positions."""
    return replace(norm, scale_BTD=norm.scale_BTD[:, position_n])


def input_rows(block: FrozenBlock, position_n: Tensor, index_n: Tensor) -> Float[Tensor, "n D"]:
    """Return c (p W_g + q W_u) for each target: its derivative by the residual stream at its own position."""
    row_nD = block.up_BTN[0, position_n, index_n, None] * block.weights.up_ND[index_n]
    if block.gate_BTN is not None and (gate_ND := block.weights.gate_ND) is not None:
        row_nD = row_nD + block.gate_BTN[0, position_n, index_n, None] * gate_ND[index_n]
    return _at(block.mlp_norm, position_n).transpose(row_nD[None, None])[0, 0]
