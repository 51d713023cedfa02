"""What direct edges cost: all of them in one sweep, beside autograd over every pair of layers.

loop_over_edges       the loop over the sweep, 240 nodes and one logit on a prompt of 24 tokens: at least 20
edges_difference      largest difference of the two, as a share of a target's largest edge (float32)
targets_doubled       480 nodes over 240: at most 2.2
prompts_doubled       4 prompts over 2, one after the other: at most 2.2

The loop is what a plain implementation does, and the brute-force reference of the tests: for every layer of targets
and every earlier layer with sources, run the model between the two with everything but the direct path detached, and
pull all targets back at once (`is_grads_batched`).
"""

import time
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution import pose
from circuits.edges import Neurons, direct_effects
from circuits.metric import Metric, logit_difference
from shared.attention import attention_patterns
from shared.blocks import BlockView, NormView
from shared.hooks import capture
from shared.models import Model
from shared.tokens import TokenBatch

TARGETS = {"loop_over_edges": (">=", 20.0), "targets_doubled": ("<=", 2.2), "prompts_doubled": ("<=", 2.2)}
NODES, PROMPT = 240, 24


def loop_over_layer_pairs(
    model: Model, batch: TokenBatch, neurons: Neurons, metric: Metric
) -> Float[Tensor, "S n"]:
    """Return the direct effects among neurons, and on a metric's targets, by autograd: one prompt, a Llama's blocks."""
    n_layers = model.architecture.n_layers
    views = [model.architecture.block(layer) for layer in range(n_layers)]
    with torch.no_grad(), capture(model, ["embed"]) as seen:
        model(batch)
        patterns = [pattern[0] for pattern in attention_patterns(model, batch)]
    n, n_targets = len(neurons), metric.positions_BK.shape[1]
    effect_Sn = seen["embed"].new_zeros(n + n_targets, n)
    for upper in range(1, n_layers + 1):
        last = upper == n_layers
        targets = torch.arange(n, n + n_targets) if last else (neurons.layer_n == upper).nonzero()[:, 0]
        for lower in range(upper if len(targets) else 0):
            sources = (neurons.layer_n == lower).nonzero()[:, 0]
            if not len(sources):
                continue
            x_TD, a_TN = direct_stream(views[:upper], patterns, seen["embed"][0], lower)
            if last:
                logits_TV = normed(model.architecture.final_norm, x_TD) @ model.architecture.W_U.T
                value_S = metric.value(logits_TV[None])[0]
            else:
                x_TD = x_TD + attend(views[upper], patterns[upper], x_TD)
                place = (neurons.position_n[targets], neurons.index_n[targets])
                value_S = surrogate(views[upper], x_TD)[place]
            eye_SS = torch.eye(len(targets), dtype=value_S.dtype)
            [jacobian_STN] = torch.autograd.grad(value_S, a_TN, eye_SS, is_grads_batched=True)
            at, index = neurons.position_n[sources], neurons.index_n[sources]
            effect_Sn[targets[:, None], sources] = jacobian_STN[:, at, index] * a_TN.detach()[at, index]
    return effect_Sn


def direct_stream(
    views: list[BlockView], patterns: list[Tensor], embed_TD: Tensor, lower: int
) -> tuple[Tensor, Tensor]:
    """The residual stream after some blocks, and one layer's neurons, on which it depends along direct paths only."""
    x_TD, leaf_TN = embed_TD, embed_TD
    for layer, view in enumerate(views):
        x_TD = x_TD + attend(view, patterns[layer], x_TD)
        a_TN = surrogate(view, x_TD).detach()
        if layer == lower:
            leaf_TN = a_TN = a_TN.requires_grad_()
        x_TD = x_TD + a_TN @ view.W_down.T
    return x_TD, leaf_TN


def normed(norm: NormView | None, x_TD: Tensor) -> Tensor:
    """The norm with its scale detached."""
    assert norm is not None
    return x_TD * norm.scale(x_TD.detach()).to(x_TD) * norm.gain


def attend(view: BlockView, pattern_HTT: Tensor, x_TD: Tensor) -> Tensor:
    """What attention adds with its pattern held."""
    value_TGd = (normed(view.attn_norm, x_TD) @ view.W_v.T).unflatten(
        -1, (-1, view.W_o.shape[1] // len(pattern_HTT))
    )
    value_THd = value_TGd.repeat_interleave(len(pattern_HTT) // value_TGd.shape[1], dim=1)
    return torch.einsum("hqt,thd->qhd", pattern_HTT.to(x_TD), value_THd).flatten(1) @ view.W_o.T


def surrogate(view: BlockView, x_TD: Tensor) -> Tensor:
    """Neurons whose sigmoid is detached and whose two factors take half the credit each (values unchanged)."""
    assert view.W_gate is not None
    normed_TD = normed(view.mlp_norm, x_TD)
    z_TN, u_TN = normed_TD @ view.W_gate.T, normed_TD @ view.W_up.T
    linear_TN = z_TN * torch.sigmoid(z_TN.detach())
    return 0.5 * (linear_TN * u_TN.detach() + linear_TN.detach() * u_TN)


def spread(model: Model, n: int, positions: int) -> Neurons:
    """Neurons spread evenly over layers and positions, at changing indices."""
    layers, width = model.architecture.n_layers, model.architecture.n_neurons
    place: Int[Tensor, " n"] = torch.linspace(0, layers * positions * width - 1, n).long()
    return Neurons(*torch.stack(torch.unravel_index(place, (layers, positions, width))))


def measure(rounds: int) -> list[dict[str, float]]:
    """Return the ratios of every round, the loop once a round (it is the slow side)."""
    from _circuits_models import prompts, random_llama

    model = random_llama("small")
    batch = prompts(model, 4, PROMPT)
    problem = pose(model, batch, lambda logits, at: logit_difference(logits, at, [7] * 4, [11] * 4))
    first = prompts(model, 1, PROMPT)
    metric = problem.metric.row(0, torch.arange(PROMPT))

    def sweep(n: int, count: int = 1) -> Any:
        neurons = spread(model, n, PROMPT)
        parts = [
            direct_effects(problem.network.row(i), neurons, problem.metric.row(i, torch.arange(PROMPT)))
            for i in range(count)
        ]
        return parts[0].neuron_Sn

    def loop() -> Any:
        return loop_over_layer_pairs(model, first, spread(model, NODES, PROMPT), metric)

    sweep(NODES)
    results = []
    for _ in range(rounds):
        took: dict[str, float] = {}
        found: dict[str, Tensor] = {}
        sides = {"edges": (NODES, 1), "twice": (2 * NODES, 1), "two": (NODES, 2), "four": (NODES, 4)}
        for name, (n, count) in sides.items():
            start = time.perf_counter()
            found[name] = sweep(n, count)
            took[name] = time.perf_counter() - start
        start = time.perf_counter()
        looped_Sn = loop()
        took["loop"] = time.perf_counter() - start
        largest_S1 = looped_Sn.abs().amax(1, keepdim=True).clamp_min(torch.finfo(looped_Sn.dtype).tiny)
        results.append(
            {
                "loop_over_edges": took["loop"] / took["edges"],
                "edges_difference": float(((found["edges"] - looped_Sn).abs() / largest_S1).max()),
                "targets_doubled": took["twice"] / took["edges"],
                "prompts_doubled": took["four"] / took["two"],
            }
        )
    return results
