"""Node scores from gradients of the unmodified model: AtP, integrated gradients, conductance (digest 1.5).

With v a node, v' its reference and m the metric:

    atp             (v - v') * dm/dv at the observed point                                  1 forward, K backward
    ig_activations  (v - v') * mean of dm/dv on the straight line from v' to v, one layer   L n forward, L n K backward
                    moved at a time; sums over a layer to m(x) - m(x; that layer at its reference)
    ig_inputs       (v - v') * mean of dm/dv while the embeddings go from their reference   n forward, n K backward
                    to the prompt; sums to m(x) - m(x') in the basis of embeddings
    conductance     sum of dm/dv * (change of v) on that path, so that a whole cut          2 n + 1 forward, n K
                    (the residual basis, any layer) sums to m(x) - m(x')                    backward

Means over a path are Gauss-Legendre quadrature: a few points close a sum that a left sum (the paper's release) misses
by a tenth. Conductance takes gradients at the middle of each step and the nodes at its ends: at a reference of zeros,
where a norm has no useful derivative, none is taken.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.layers import working
from circuits.problem import Problem
from shared.hooks import capture, edit
from shared.interventions import Interchange, Intervention

if TYPE_CHECKING:
    from circuits.attribution import Settings


@dataclass(frozen=True, eq=False, kw_only=True)
class Offset(Intervention):
    """x + offset; with a leaf of zeros its gradient is the metric's gradient by the site."""

    offset_BTX: Float[Tensor, "B T X"]

    def edited(self, x: Tensor) -> Tensor:
        """X plus the offset."""
        return x + self.offset_BTX.to(x)


def offsets(problem: Problem) -> list[Offset]:
    """Return an edit at every site of the basis that changes nothing and whose offset is a leaf for autograd."""
    layers = problem.activations_BLTN.to(problem.model.dtype).unbind(1)
    return [
        Offset(site, offset_BTX=torch.zeros_like(layer).requires_grad_())
        for site, layer in zip(problem.sites, layers, strict=True)
    ]


def gradients(value_BK: Float[Tensor, "B K"], leaves: Sequence[Tensor]) -> Float[Tensor, "B K L T X"]:
    """Return every target's gradient by each leaf (one a layer; zero where a target does not depend on it).

    In working precision, float32 or float64, whatever the model's.
    """
    rows = []
    for target, value_B in enumerate(value_BK.unbind(1)):
        last = target == value_BK.shape[1] - 1
        row = torch.autograd.grad(
            value_B.sum(), leaves, retain_graph=not last, allow_unused=True, materialize_grads=True
        )
        rows.append(working(torch.stack(row, dim=1)))
    return torch.stack(rows, dim=1)


def atp(problem: Problem, settings: "Settings") -> Float[Tensor, "B K L T N"]:
    """Attribution patching: gradient times difference at the observed point."""
    edits = offsets(problem)
    with torch.enable_grad(), edit(problem.model, edits):
        value_BK = problem.values()
    return problem.scores(gradients(value_BK, [one.offset_BTX for one in edits]))


def quadrature(steps: int) -> list[tuple[float, float]]:
    """Return the points in (0, 1) and the weights of Gauss-Legendre quadrature."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    return [((1 + x) / 2, w / 2) for x, w in zip(points.tolist(), weights.tolist(), strict=True)]


def layer_path(problem: Problem, layer: int, steps: int) -> Iterator[tuple[Interchange, float]]:
    """Yield the points of one layer's straight path from its reference, as edits (leaves of autograd), and weights."""
    delta_BTX, site = problem.delta_BLTN[:, layer], problem.sites[layer]
    start_BTX = problem.activations_BLTN[:, layer] - delta_BTX
    for share, weight in quadrature(steps):
        point_BTX = (start_BTX + share * delta_BTX).to(problem.model.dtype)
        yield Interchange(site, point_BTX.requires_grad_()), weight


def ig_activations(problem: Problem, settings: "Settings") -> Float[Tensor, "B K L T N"]:
    """Integrated gradients on the activations of one layer at a time."""
    layers = []
    for layer in settings.progress(range(len(problem.sites)), "layers"):
        mean_BKTX: Tensor | float = 0.0
        for point, weight in layer_path(problem, layer, settings.steps):
            with torch.enable_grad(), edit(problem.model, point):
                value_BK = problem.values()
            mean_BKTX = mean_BKTX + weight * gradients(value_BK, [point.source_BTX])[:, :, 0]
        layers.append(torch.as_tensor(mean_BKTX))
    return problem.scores(torch.stack(layers, dim=2))


def _at(problem: Problem, share: float) -> Interchange:
    """The embeddings that far from their reference."""
    point_BTD = problem.network.embed_BTD - (1 - share) * problem.embed_delta_BTD
    return Interchange("embed", point_BTD.to(problem.model.dtype))


def ig_inputs(problem: Problem, settings: "Settings") -> Float[Tensor, "B K L T N"]:
    """Integrated gradients while the embeddings move; one pass a step for all layers."""
    mean_BKLTX: Tensor | float = 0.0
    for share, weight in settings.progress(quadrature(settings.steps), "steps"):
        edits = offsets(problem)
        with torch.enable_grad(), edit(problem.model, [_at(problem, share), *edits]):
            value_BK = problem.values()
        mean_BKLTX = mean_BKLTX + weight * gradients(value_BK, [one.offset_BTX for one in edits])
    return problem.scores(torch.as_tensor(mean_BKLTX))


def conductance(problem: Problem, settings: "Settings") -> Float[Tensor, "B K L T N"]:
    """Gradient times the change of each node along the path of the embeddings (midpoint rule)."""
    total_BKLTX: Tensor | float = 0.0
    before_BLTX = _nodes_at(problem, 0.0)
    for step in settings.progress(range(settings.steps), "steps"):
        edits = offsets(problem)
        with torch.enable_grad(), edit(problem.model, [_at(problem, (step + 0.5) / settings.steps), *edits]):
            value_BK = problem.values()
        after_BLTX = _nodes_at(problem, (step + 1) / settings.steps)
        gradient_BKLTX = gradients(value_BK, [one.offset_BTX for one in edits])
        total_BKLTX = total_BKLTX + gradient_BKLTX * (after_BLTX - before_BLTX)[:, None]
        before_BLTX = after_BLTX
    real_BT = problem.network.real_BT
    scores_BKLTX = torch.as_tensor(total_BKLTX).masked_fill(~real_BT[:, None, None, :, None], 0.0)
    return problem.basis.sum(scores_BKLTX, problem.model.architecture)


def _nodes_at(problem: Problem, share: float) -> Float[Tensor, "B L T X"]:
    """The nodes' coordinates with the embeddings that far from their reference."""
    with (
        torch.no_grad(),
        edit(problem.model, _at(problem, share)),
        capture(problem.model, problem.sites) as acts,
    ):
        problem.model(problem.batch)
    return torch.stack([acts[site] for site in problem.sites], dim=1)
