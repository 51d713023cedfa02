"""Mixture-of-experts MLPs as one wide MLP, whose neurons can be read and edited like any other's.

With E experts of N neurons, routing weights pi (zero for every expert that the router did not choose) and, in some
families, a shared expert of S neurons that is always chosen with a weight of its own:

    neuron (e, i), index e N + i     a = pi_e act(W_gate^e[i] x) (W_up^e[i] x), zero where expert e is not chosen
    neuron i of the shared expert    index E N + i, the same with its weight pi_E
    the MLP                          sum of a times the columns of all W_down side by side

1. `add_taps` gives every sparse MLP four modules without parameters, through which the routing weights (B T E, one more
   with a shared expert), both pre-activations and the neurons pass. They are modules so that hooks can see them.
2. They are passed only while a hook looks at one of them (`listening`). Otherwise the MLP is transformers' own code.
3. The router is the model's own. Only chosen experts are computed; an edit may bring another one in, by its routing
   weight or by its neurons.

Shape letters: B batch, T token, D width, E experts, R experts and the shared one, N neurons of one expert, S tokens of
all rows one after another, W all neurons side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, pad

if TYPE_CHECKING:
    from shared.families import Family

TAPS = "taps"


@dataclass(frozen=True)
class ExpertSizes:
    """How many experts a sparse MLP has, the neurons of each, and those of its shared expert (0: it has none)."""

    n_experts: int
    n_neurons: int
    n_shared: int

    @classmethod
    def of(cls, mlp: Any) -> ExpertSizes:
        """Those of one sparse MLP."""
        n_experts, _, n_neurons = mlp.experts.down_proj.shape
        shared = getattr(mlp, "shared_expert", None)
        return cls(n_experts, n_neurons, 0 if shared is None else shared.down_proj.in_features)

    @property
    def total(self) -> int:
        """All neurons side by side."""
        return self.n_experts * self.n_neurons + self.n_shared

    @property
    def n_routed(self) -> int:
        """Entries of the routing: the experts, and the shared one."""
        return self.n_experts + bool(self.n_shared)

    def siblings(self, index: int) -> range:
        """The neurons of a neuron's own expert among all."""
        expert = min(index // self.n_neurons, self.n_experts)
        start = expert * self.n_neurons
        return range(start, start + self.n_neurons if expert < self.n_experts else self.total)

    def name(self, index: int) -> str:
        """Short name of a neuron by its index among all: `E2/N17`, or `S/N17` in the shared expert."""
        start = self.siblings(index).start
        expert = start // self.n_neurons
        return f"{f'E{expert}' if expert < self.n_experts else 'S'}/N{index - start}"

    def spread(self, routing: Float[Tensor, "*B R"]) -> Float[Tensor, "*B W"]:
        """Each neuron's routing weight, that of its expert."""
        wide = routing[..., : self.n_experts].repeat_interleave(self.n_neurons, dim=-1)
        if not self.n_shared:
            return wide
        return torch.cat([wide, routing[..., -1:].expand(*routing.shape[:-1], self.n_shared)], dim=-1)

    def part(self, expert: int) -> slice:
        """The neurons of one expert (E: the shared one) among all."""
        own = self.siblings(expert * self.n_neurons)
        return slice(own.start, own.stop)


class Taps(nn.Module):
    """What a sparse MLP's routing weights, pre-activations and neurons pass through while `live`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = False
        self.routing = nn.Identity()
        self.gate = nn.Identity()
        self.up = nn.Identity()
        self.neurons = nn.Identity()


def add_taps(hf: Any, row: Family) -> None:
    """Give every sparse MLP of a model its taps; parameters and results stay as they are."""
    if not row.experts:
        return
    if hf.dtype == torch.float64:  # torch's grouped product, transformers' default, has no float64 kernel
        hf.set_experts_implementation("eager")
    for layer in hf.get_submodule(row.layers):
        mlp = layer.get_submodule(row.sparse_mlp)
        if hasattr(mlp, "experts") and not hasattr(mlp, TAPS):
            setattr(mlp, TAPS, Taps())
            mlp.forward = MethodType(_forward, mlp)


@contextmanager
def listening(hf: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Let the MLPs whose taps are among the module paths pass through them inside."""
    parents = {path.rpartition(".")[0] for path in paths}
    taps = [cast(Taps, hf.get_submodule(path)) for path in parents if path.rpartition(".")[2] == TAPS]
    for one in taps:
        one.live = True
    try:
        yield
    finally:
        for one in taps:
            one.live = False


def _forward(mlp: Any, hidden_states: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """The MLP of a sparse block: its class's own code, or the same sums through the taps."""
    if not mlp.taps.live:
        return type(mlp).forward(mlp, hidden_states)
    sizes, taps = ExpertSizes.of(mlp), mlp.taps
    routing_BTR = taps.routing(_routing(mlp, hidden_states))
    gate_BTW, up_BTW = _preactivations(mlp, sizes, hidden_states, routing_BTR)
    gate_BTW, up_BTW = taps.gate(gate_BTW), taps.up(up_BTW)
    neurons_BTW = mlp.experts.act_fn(gate_BTW) * up_BTW * sizes.spread(routing_BTR)
    return _write(mlp, sizes, taps.neurons(neurons_BTW.to(hidden_states.dtype)))


def _routing(mlp: Any, x_BTD: Tensor) -> Float[Tensor, "B T R"]:
    """The router's weights by expert, in the precision the router gives them."""
    _, weights_Sk, chosen_Sk = mlp.gate(x_BTD.flatten(0, 1))
    routing_SE = weights_Sk.new_zeros(len(weights_Sk), mlp.experts.num_experts).scatter(
        1, chosen_Sk, weights_Sk
    )
    routing_BTR = routing_SE.unflatten(0, x_BTD.shape[:2])
    if not hasattr(mlp, "shared_expert"):
        return routing_BTR
    return torch.cat([routing_BTR, mlp.shared_expert_gate(x_BTD).sigmoid()], dim=-1)


def _preactivations(
    mlp: Any, sizes: ExpertSizes, x_BTD: Tensor, routing_BTR: Tensor
) -> tuple[Float[Tensor, "B T W"], Float[Tensor, "B T W"]]:
    """W_gate x and W_up x of every expert that has a token, zero for its other tokens."""
    x_SD, routing_SR = x_BTD.flatten(0, 1), routing_BTR.flatten(0, 1)
    gates: list[Tensor] = []
    ups: list[Tensor] = []
    for expert in range(sizes.n_experts):
        tokens = routing_SR[:, expert].nonzero()[:, 0]
        chosen = linear(x_SD[tokens], mlp.experts.gate_up_proj[expert]).chunk(2, dim=-1)
        for parts, values in zip((gates, ups), chosen, strict=True):
            parts.append(values.new_zeros(len(x_SD), sizes.n_neurons).index_copy(0, tokens, values))
    if sizes.n_shared:
        gates.append(mlp.shared_expert.gate_proj(x_SD))
        ups.append(mlp.shared_expert.up_proj(x_SD))
    gate_SW, up_SW = torch.cat(gates, dim=-1), torch.cat(ups, dim=-1)
    return gate_SW.unflatten(0, x_BTD.shape[:2]), up_SW.unflatten(0, x_BTD.shape[:2])


def _write(mlp: Any, sizes: ExpertSizes, a_BTW: Tensor) -> Float[Tensor, "B T D"]:
    """What all neurons write; experts and tokens without any activation are left out, unless a gradient wants them."""
    a_SW = a_BTW.flatten(0, 1)
    out_SD = a_SW.new_zeros(len(a_SW), mlp.experts.down_proj.shape[1])
    for expert in range(sizes.n_experts):
        part_SN = a_SW[:, sizes.part(expert)]
        active_S = torch.ones_like(part_SN[:, 0]) if a_SW.requires_grad else part_SN.any(-1)
        tokens = active_S.nonzero()[:, 0]
        out_SD = out_SD.index_add(0, tokens, linear(part_SN[tokens], mlp.experts.down_proj[expert]))
    if sizes.n_shared:
        out_SD = out_SD + mlp.shared_expert.down_proj(a_SW[:, sizes.part(sizes.n_experts)])
    return out_SD.unflatten(0, a_BTW.shape[:2])


@dataclass(frozen=True)
class SparseMlp:
    """The weights of a sparse MLP as those of a wide one, put side by side anew whenever they are read.

    `width` is that of the widest MLP of the model: neurons beyond the last expert have weights of zero.
    """

    mlp: Any
    width: int
    b_gate: None = None
    b_up: None = None
    b_down: None = None

    def _rows(self, half: int, name: str) -> Float[Tensor, "W D"]:
        """One half of the fused projection of all experts, and the shared expert's."""
        rows = self.mlp.experts.gate_up_proj.chunk(2, dim=1)[half].flatten(0, 1)
        if hasattr(self.mlp, "shared_expert"):
            rows = torch.cat([rows, getattr(self.mlp.shared_expert, name).weight])
        missing = self.width - len(rows)
        return pad(rows, (0, 0, 0, missing)) if missing else rows

    @property
    def W_gate(self) -> Float[Tensor, "W D"]:
        """Gate projections."""
        return self._rows(0, "gate_proj")

    @property
    def W_up(self) -> Float[Tensor, "W D"]:
        """Up projections."""
        return self._rows(1, "up_proj")

    @property
    def W_down(self) -> Float[Tensor, "D W"]:
        """Down projections."""
        columns = self.mlp.experts.down_proj.transpose(0, 1).flatten(1)
        if hasattr(self.mlp, "shared_expert"):
            columns = torch.cat([columns, self.mlp.shared_expert.down_proj.weight], dim=1)
        missing = self.width - columns.shape[1]
        return pad(columns, (0, missing)) if missing else columns
