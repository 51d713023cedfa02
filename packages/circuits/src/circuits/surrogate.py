"""RelP by automatic differentiation: the model's own forward pass with each rule put in by a straight-through edit.

Nothing of the user's model is replaced. Edits at the sites leave every value as it is, bit for bit, and change what
autograd sees (y' = y.detach() + f(x) - f(x).detach() has the value of y and the derivative of f):

    queries, keys     detached, so that the pattern is a constant                      (rules.qk "frozen")
    norms             f(x) = frozen scale * x                                          (rules.norm "frozen")
    neurons           f(z, u) = p z + q u with the frozen coefficients of the rules (routing weights are in p and q)
    logits            read through the frozen readout (soft cap)

With all rules at their defaults this is the hand-written sweep of `circuits.relp`, computed by other means; with
attention patterns or norms left open it is the ablation of RelP for which no frozen network exists. One forward pass,
one backward pass a target.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.gradients import gradients, offsets
from circuits.layers import FrozenBlock, FrozenNorm
from circuits.linearize import linearize
from circuits.metric import LOGITS
from circuits.problem import Problem
from circuits.rules import Rules
from shared.hooks import capture, edit
from shared.interventions import Intervention

if TYPE_CHECKING:
    from circuits.frozen import FrozenNetwork

Tape = dict[str, Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class Recorded(Intervention):
    """Leaves the site as it is and notes its tensor on the tape, for edits further up."""

    tape: Tape

    def apply(self, x_BTX: Tensor, mask_BT: Tensor) -> Tensor:
        """Note x and return it."""
        self.tape[self.site] = x_BTX
        return x_BTX


@dataclass(frozen=True, eq=False, kw_only=True)
class Detached(Intervention):
    """A constant of the value that the site has."""

    def edited(self, x: Tensor) -> Tensor:
        """X without its history."""
        return x.detach()


@dataclass(frozen=True, eq=False, kw_only=True)
class Through(Intervention):
    """The site's value with the derivative of another function of what is on the tape."""

    function: Callable[[], Tensor]

    def edited(self, x: Tensor) -> Tensor:
        """X's value, the function's derivative."""
        y = self.function()
        return x.detach() + (y - y.detach()).to(x.dtype)


def relp_by_autograd(problem: Problem, rules: Rules) -> Float[Tensor, "B K L T N"]:
    """Return gradient times difference under the rules, whichever they are."""
    network = _coefficients(problem, rules)
    leaves, metric = offsets(problem), problem.metric
    tape: Tape = {}
    edits = _edits(problem, network, rules, tape)
    recorded = [Recorded(site, tape=tape) for site in _recorded_sites(problem)]
    site = "final_norm" if metric.site == LOGITS else metric.site
    # Order matters at a site: the rule, then the leaf, then what later rules read.
    with (
        torch.enable_grad(),
        edit(problem.model, [*edits, *leaves, *recorded]),
        capture(problem.model, [site]) as acts,
    ):
        problem.model(problem.batch)
    weights_BKD = network.readout(metric)[1] if metric.site == LOGITS else metric.weights_BKV
    value_BK = (metric.gather(acts[site]) * weights_BKD).sum(-1)
    return problem.scores(gradients(value_BK, [leaf.offset_BTX for leaf in leaves]))


def _coefficients(problem: Problem, rules: Rules) -> "FrozenNetwork":
    """The frozen network whose neuron coefficients follow the rules (the posed one if they are its own)."""
    linear = Rules(half=rules.half, gate=rules.gate)
    if linear == problem.network.rules:
        return problem.network
    return linearize(problem.model, problem.batch, linear, checked=False)


def _recorded_sites(problem: Problem) -> list[str]:
    architecture = problem.model.architecture
    kinds = ("input", "heads", "attn_out", "gate", "up", "neurons")
    last = architecture.n_layers - 1
    sites = [
        site for kind in kinds if kind in architecture.block_sites() for site in architecture.sites(kind)
    ]
    return [*sites, f"blocks.{last}.output"]


def _edits(problem: Problem, network: "FrozenNetwork", rules: Rules, tape: Tape) -> list[Intervention]:
    row = problem.model.architecture.row
    edits: list[Intervention] = []
    for layer, block in enumerate(network.blocks):
        at = f"blocks.{layer}."
        if rules.qk == "frozen":
            edits += [Detached(at + "q"), Detached(at + "k")]
        edits.append(Through(at + "neurons", function=_neurons(block, tape, at)))
        if rules.norm == "frozen":
            for kind, path, norm, read in (
                ("attn_norm", row.attn_norm, block.attn_norm, _input),
                ("attn_out", row.attn_post_norm, block.attn_post, _attn_raw),
                ("mlp_norm", row.mlp_norm, block.mlp_norm, _middle),
                ("mlp_out", row.mlp_post_norm, block.mlp_post, _mlp_raw),
            ):
                if path is not None:
                    edits.append(Through(at + kind, function=_normed(norm, read, block, tape, at)))
    if rules.norm == "frozen":
        last = f"blocks.{len(network.blocks) - 1}.output"
        function = _normed(network.final_norm, lambda block, tape, at: tape[last], None, tape, "")
        edits.append(Through("final_norm", function=function))
    return edits


def _neurons(block: FrozenBlock, tape: Tape, at: str) -> Callable[[], Tensor]:
    def function() -> Tensor:
        value_BTN = block.up_BTN * tape[at + "up"]
        return value_BTN if block.gate_BTN is None else value_BTN + block.gate_BTN * tape[at + "gate"]

    return function


def _normed(
    norm: FrozenNorm, read: Callable[..., Tensor], block: FrozenBlock | None, tape: Tape, at: str
) -> Callable[[], Tensor]:
    return lambda: norm.forward(read(block, tape, at).to(norm.scale_BTD)[:, None])[:, 0]


def _input(block: FrozenBlock, tape: Tape, at: str) -> Tensor:
    return tape[at + "input"]


def _middle(block: FrozenBlock, tape: Tape, at: str) -> Tensor:
    return tape[at + "input"] if block.parallel else tape[at + "input"] + tape[at + "attn_out"]


def _attn_raw(block: FrozenBlock, tape: Tape, at: str) -> Tensor:
    return tape[at + "heads"].to(block.weights.out_DY) @ block.weights.out_DY.T


def _mlp_raw(block: FrozenBlock, tape: Tape, at: str) -> Tensor:
    return tape[at + "neurons"].to(block.weights.down_DN) @ block.weights.down_DN.T
