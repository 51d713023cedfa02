"""Node scores under one interface (paper sections 3 and 4; digest 1.5).

`attribute(problem, name)` returns a signed score for every node and target, B K L T N, by the named estimator:

    relp                (v - v') * coefficient of the frozen network: one forward, one hand-written backward pass
    relp_no_half, relp_gate_detached, relp_qk_open, relp_norm_open     RelP with one rule taken out
    relp_ig             RelP's coefficients averaged over the path of ig_activations
    atp, ig_activations, ig_inputs, conductance                        gradients of the model (`circuits.gradients`)
    exact               brute force (`circuits.patching`)
    activation          |v - v'|, magnitude |v|, random noise: controls

What each adds up to is tested in tests/circuits/test_estimators.py. Padding scores zero. Only RelP needs the frozen
network; the others run or differentiate the unmodified model through `shared.hooks`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.gradients import atp, conductance, ig_activations, ig_inputs, layer_path
from circuits.linearize import linearize
from circuits.patching import exact, exact_scores
from circuits.problem import Problem, pose
from circuits.relp import relp
from circuits.rules import Rules
from circuits.surrogate import relp_by_autograd
from shared.errors import UserError
from shared.hooks import edit

__all__ = ["ESTIMATORS", "Problem", "Settings", "attribute", "exact_scores", "pose", "top_nodes"]

Scores = Float[Tensor, "B K L T N"]


def quiet(items: Iterable[Any], label: str) -> Iterable[Any]:
    """Progress that shows nothing."""
    return items


@dataclass(frozen=True)
class Settings:
    """Settings of the estimators that have any.

    `seed` of the random control, `steps` of a path, `chunk` nodes patched at once, and `progress(items, label)` (as
    `shared.runs.Run.progress`) around the long loops.
    """

    seed: int = 0
    steps: int = 10
    chunk: int = 64
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = quiet


def attribute(
    problem: Problem, estimator: str = "relp", seed: int = 0, *, settings: Settings | None = None
) -> Scores:
    """Return the scores of every node for every target by the named estimator (see ESTIMATORS)."""
    if estimator not in ESTIMATORS:
        raise UserError(f"unknown estimator {estimator!r}; there are: {', '.join(ESTIMATORS)}")
    return ESTIMATORS[estimator](problem, settings or Settings(seed=seed))


def _relp(problem: Problem, settings: Settings) -> Scores:
    return problem.scores(relp(problem.network, problem.metric, problem.basis).sensitivity_BKLTN)


def _relp_by(rules: Rules) -> Callable[[Problem, Settings], Scores]:
    def scores(problem: Problem, settings: Settings) -> Scores:
        if not rules.linear:
            return relp_by_autograd(problem, rules)
        network = linearize(problem.model, problem.batch, rules, checked=False)
        return problem.scores(relp(network, problem.metric, problem.basis).sensitivity_BKLTN)

    return scores


def _relp_ig(problem: Problem, settings: Settings) -> Scores:
    layers = []
    for layer in settings.progress(range(len(problem.sites)), "layers"):
        mean_BKTX: Tensor | float = 0.0
        for point, weight in layer_path(problem, layer, settings.steps):
            with edit(problem.model, point):  # the frozen network of a run with this layer on its path
                network = linearize(problem.model, problem.batch, problem.network.rules, checked=False)
            effect = relp(network, problem.metric, problem.basis).sensitivity_BKLTN[:, :, layer]
            mean_BKTX = mean_BKTX + weight * effect
        layers.append(torch.as_tensor(mean_BKTX))
    return problem.scores(torch.stack(layers, dim=2))


def _controls(values: Callable[[Problem], Tensor]) -> Callable[[Problem, Settings], Scores]:
    def scores(problem: Problem, settings: Settings) -> Scores:
        size_BLTN = problem.basis.norm(values(problem), problem.model.architecture)
        return size_BLTN[:, None].expand(-1, problem.n_targets, -1, -1, -1)

    return scores


def _random(problem: Problem, settings: Settings) -> Scores:
    architecture = problem.model.architecture
    sizes = problem.delta_BLTN.abs() + problem.activations_BLTN.abs()
    nodes_BLTN = problem.basis.norm(sizes, architecture)
    shape = (len(nodes_BLTN), problem.n_targets, *nodes_BLTN.shape[1:])
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(settings.seed)).to(nodes_BLTN)
    # Neither padding nor what is zero with and without its reference (experts not chosen), which would be no control.
    return noise.masked_fill(nodes_BLTN[:, None] == 0, 0.0)


ESTIMATORS: dict[str, Callable[[Problem, Settings], Scores]] = {
    "relp": _relp,
    "relp_no_half": _relp_by(Rules(half=False)),
    "relp_gate_detached": _relp_by(Rules(gate="detached")),
    "relp_qk_open": _relp_by(Rules(qk="open")),
    "relp_norm_open": _relp_by(Rules(norm="open")),
    "relp_ig": _relp_ig,
    "atp": atp,
    "ig_activations": ig_activations,
    "ig_inputs": ig_inputs,
    "conductance": conductance,
    "exact": exact,
    "activation": _controls(lambda problem: problem.delta_BLTN),
    "magnitude": _controls(lambda problem: problem.activations_BLTN),
    "random": _random,
}


def top_nodes(scores_LTN: Float[Tensor, "L T N"], k: int) -> Bool[Tensor, "L T N"]:
    """Return the mask of the k nodes of largest absolute score (ties broken by order; at most as many as there are)."""
    flat = scores_LTN.abs().flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(min(k, flat.numel())).indices] = True
    return mask.reshape(scores_LTN.shape)
