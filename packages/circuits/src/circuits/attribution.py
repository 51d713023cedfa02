"""Node scores under one interface (paper sections 3 and 4; digest 1.5).

A `Problem` is a batch, a metric and a reference. An estimator returns a score for every node and target, shape B K L
T N:

    relp            (a - ref) * coefficient of the frozen network, one forward and one hand-written backward pass
    atp             (a - ref) * gradient (attribution patching, gradient times activation)
    ig_activations  (a - ref) * mean gradient between reference and a, one layer moved at a time, midpoint rule;
                    sums over a layer to the metric's change when the whole layer goes to its reference
    exact           m(x) - m(x; one node at its reference), one forward pass a node: the ground truth of single nodes
    activation      |a - ref|, a control
    random          uniform noise, a control

Padding scores zero. Estimators other than RelP differentiate the unmodified model through `shared.hooks`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.frozen import FrozenNetwork
from circuits.linearize import linearize
from circuits.metric import Metric
from circuits.pathways import Keep, neuron_sites, zero_reference
from circuits.relp import relp
from circuits.rules import Rules
from shared.errors import UserError
from shared.hooks import edit
from shared.interventions import Interchange, Intervention

if TYPE_CHECKING:
    from shared.models import Model
    from shared.tokens import TokenBatch

MakeMetric = Callable[[Float[Tensor, "B T V"], Int[Tensor, " B"]], Metric]
Scores = Float[Tensor, "B K L T N"]


@dataclass(frozen=True)
class Problem:
    """What is to be explained: a batch at its observed point, the metric, and what nodes are compared with."""

    model: "Model"
    batch: "TokenBatch"
    metric: Metric
    network: FrozenNetwork
    activations_BLTN: Float[Tensor, "B L T N"]
    reference_BLTN: Float[Tensor, "#B L #T N"]

    @property
    def delta_BLTN(self) -> Float[Tensor, "B L T N"]:
        """Activation minus reference, zero at padding."""
        delta_BLTN = self.activations_BLTN - self.reference_BLTN
        return delta_BLTN.masked_fill(~self.network.real_BT[:, None, :, None], 0.0)


def pose(
    model: "Model",
    batch: "TokenBatch",
    make_metric: MakeMetric,
    reference_BLTN: Float[Tensor, "#B L #T N"] | None = None,
    rules: Rules | None = None,
) -> Problem:
    """Run the model once and state the problem; `make_metric(logits_BTV, last_positions_B)` gives the metric.

    The reference is zero unless one is given (`circuits.pathways.mean_reference`, or another run's activations).
    """
    batch = batch.to(model.device)
    network = linearize(model, batch, rules)
    reference_BLTN = zero_reference(model) if reference_BLTN is None else reference_BLTN
    return Problem(
        model=model,
        batch=batch,
        metric=make_metric(network.logits_BTV, batch.last_columns_B),
        network=network,
        activations_BLTN=torch.stack(network.neurons, dim=1),
        reference_BLTN=reference_BLTN.to(network.logits_BTV),
    )


def attribute(problem: Problem, estimator: str = "relp", seed: int = 0) -> Scores:
    """Return the scores of every node for every target by the named estimator (see ESTIMATORS)."""
    if estimator not in ESTIMATORS:
        raise UserError(f"unknown estimator {estimator!r}; there are: {', '.join(ESTIMATORS)}")
    return ESTIMATORS[estimator](problem, seed)


def _relp(problem: Problem, seed: int) -> Scores:
    effect_BKLTN = relp(problem.network, problem.metric).sensitivity_BKLTN
    return effect_BKLTN * problem.delta_BLTN[:, None]


def _atp(problem: Problem, seed: int) -> Scores:
    offsets = [
        Offset(site, offset_BTX=torch.zeros_like(value).requires_grad_())
        for site, value in zip(neuron_sites(problem.model), problem.network.neurons, strict=True)
    ]
    with torch.enable_grad(), edit(problem.model, offsets):
        value_BK = problem.metric.value(problem.model(problem.batch))
    gradient_BKLTN = _gradients(value_BK, [offset.offset_BTX for offset in offsets])
    return gradient_BKLTN * problem.delta_BLTN[:, None]


def _gradients(value_BK: Tensor, leaves: list[Tensor]) -> Float[Tensor, "B K L T N"]:
    """Return every target's gradient by each leaf (one a layer)."""
    rows = [torch.autograd.grad(value_B.sum(), leaves, retain_graph=True) for value_B in value_BK.unbind(1)]
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Offset(Intervention):
    """x + offset; with a leaf of zeros its gradient is the metric's gradient by the site."""

    offset_BTX: Float[Tensor, "B T X"]

    def edited(self, x: Tensor) -> Tensor:
        """X plus the offset."""
        return x + self.offset_BTX.to(x)


def _ig_activations(problem: Problem, seed: int, steps: int = 10) -> Scores:
    layers = [_ig_layer(problem, layer, steps) for layer in range(len(problem.network.blocks))]
    return torch.stack(layers, dim=2) * problem.delta_BLTN[:, None]


def _ig_layer(problem: Problem, layer: int, steps: int) -> Float[Tensor, "B K T N"]:
    """Return the mean gradient by one layer's neurons along the straight line from the reference."""
    delta_BTN, site = problem.delta_BLTN[:, layer], neuron_sites(problem.model)[layer]
    start_BTN = problem.activations_BLTN[:, layer] - delta_BTN
    gradients = []
    for step in range(steps):
        point_BTN = (start_BTN + (step + 0.5) / steps * delta_BTN).requires_grad_()
        with torch.enable_grad(), edit(problem.model, Interchange(site, point_BTN)):
            value_BK = problem.metric.value(problem.model(problem.batch))
        gradients.append(_gradients(value_BK, [point_BTN])[:, :, 0])
    return torch.stack(gradients).mean(0)


def exact_scores(
    problem: Problem, row: int, nodes_n3: Int[Tensor, "n 3"], chunk: int = 64
) -> Float[Tensor, "n K"]:
    """Return m(x) - m(x; node at its reference) for nodes (layer, position, neuron) of one row, `chunk` at a time."""
    batch = _repeat(problem.batch, row, chunk)
    reference_LTN = problem.reference_BLTN[min(row, len(problem.reference_BLTN) - 1)]
    reference_LTN = reference_LTN.expand(problem.activations_BLTN.shape[1:])
    clean_K = problem.metric.value(problem.network.logits_BTV)[row]
    results = []
    for start in range(0, len(nodes_n3), chunk):
        part = nodes_n3[start : start + chunk]
        edits = _single_nodes(problem, part, chunk, reference_LTN)
        with torch.no_grad(), edit(problem.model, edits):
            logits_BTV = problem.model(batch)
        metric = replace(
            problem.metric,
            weights_BKV=problem.metric.weights_BKV[row].expand(chunk, -1, -1),
            positions_BK=problem.metric.positions_BK[row].expand(chunk, -1),
        )
        results.append((clean_K - metric.value(logits_BTV))[: len(part)])
    return torch.cat(results)


def _repeat(batch: "TokenBatch", row: int, times: int) -> "TokenBatch":
    from shared.tokens import TokenBatch

    fields = ("input_ids_BT", "attention_mask_BT", "position_ids_BT", "prompt_lengths_B")
    values = {name: getattr(batch, name)[row : row + 1] for name in fields}
    return TokenBatch(**{name: x.expand(times, *x.shape[1:]).contiguous() for name, x in values.items()})


def _single_nodes(problem: Problem, part_n3: Tensor, chunk: int, reference_LTN: Tensor) -> list[Keep]:
    """Return the edits that put node j of the part, and nothing else, to its reference in row j of the batch."""
    edits = []
    for layer in part_n3[:, 0].unique().tolist():
        chosen = (part_n3[:, 0] == layer).nonzero()[:, 0]
        keep_BTN = torch.ones(chunk, *reference_LTN.shape[1:], dtype=torch.bool, device=reference_LTN.device)
        keep_BTN[chosen, part_n3[chosen, 1], part_n3[chosen, 2]] = False
        site = neuron_sites(problem.model)[layer]
        edits.append(Keep(site, keep_BTX=keep_BTN, reference_BTX=reference_LTN[layer][None]))
    return edits


def _exact(problem: Problem, seed: int) -> Scores:
    n_rows, n_targets = problem.metric.positions_BK.shape
    scores_BKLTN = problem.activations_BLTN.new_zeros(n_rows, n_targets, *problem.activations_BLTN.shape[1:])
    for row in range(n_rows):
        real_LTN = problem.network.real_BT[row][None, :, None].expand(problem.activations_BLTN.shape[1:])
        nodes_n3 = real_LTN.nonzero()
        layer, position, neuron = nodes_n3.T
        scores_BKLTN[row][:, layer, position, neuron] = exact_scores(problem, row, nodes_n3).T.to(
            scores_BKLTN
        )
    return scores_BKLTN


def _activation(problem: Problem, seed: int) -> Scores:
    return problem.delta_BLTN.abs()[:, None].expand(-1, problem.metric.positions_BK.shape[1], -1, -1, -1)


def _random(problem: Problem, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(problem.batch), problem.metric.positions_BK.shape[1], *problem.delta_BLTN.shape[1:])
    noise = torch.rand(shape, generator=generator).to(problem.delta_BLTN)
    return noise.masked_fill(~problem.network.real_BT[:, None, None, :, None], 0.0)


ESTIMATORS: dict[str, Callable[[Problem, int], Scores]] = {
    "relp": _relp,
    "atp": _atp,
    "ig_activations": _ig_activations,
    "exact": _exact,
    "activation": _activation,
    "random": _random,
}


def top_nodes(scores_LTN: Float[Tensor, "L T N"], k: int) -> Bool[Tensor, "L T N"]:
    """Return the mask of the k nodes of largest absolute score (ties broken by order; at most as many as there are)."""
    flat = scores_LTN.abs().flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(min(k, flat.numel())).indices] = True
    return mask.reshape(scores_LTN.shape)
