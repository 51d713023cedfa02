"""Exact patching: what the metric loses when one node, and nothing else, is set to its reference (digest 1.5).

The ground truth of single nodes, one forward pass a node, `chunk` nodes a batch. It is brute force on the unmodified
model; no estimator is.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.pathways import Keep
from circuits.problem import Problem, measure
from shared.hooks import edit

if TYPE_CHECKING:
    from circuits.attribution import Settings
    from shared.tokens import TokenBatch


def exact_scores(
    problem: Problem, row: int, nodes_n3: Int[Tensor, "n 3"], chunk: int = 64
) -> Float[Tensor, "n K"]:
    """Return m(x) - m(x; node at its reference) for nodes (layer, position, node) of one row, `chunk` at a time."""
    reference_LTX = problem.reference_BLTN[min(row, len(problem.reference_BLTN) - 1)]
    reference_LTX = reference_LTX.expand(problem.activations_BLTN.shape[1:])
    observed_BTV = problem.network.observed(problem.metric)
    clean_K = problem.metric.value(observed_BTV)[row]
    results = [torch.empty(0, len(clean_K), dtype=clean_K.dtype, device=clean_K.device)]
    for part_n3 in nodes_n3.split(chunk):
        batch = _repeat(problem.batch, row, len(part_n3))
        with torch.no_grad(), edit(problem.model, _single_nodes(problem, part_n3, reference_LTX)):
            value_nK = measure(problem.model, batch, problem.metric.repeated(row, len(part_n3)))
        results.append(clean_K - value_nK)
    return torch.cat(results)


def exact(problem: Problem, settings: "Settings") -> Float[Tensor, "B K L T N"]:
    """Exact patching of every node of every row."""
    nodes = problem.basis.norm(problem.activations_BLTN, problem.model.architecture)
    n_rows, n_layers, n_positions, n_nodes = nodes.shape
    scores_BKLTN = nodes.new_zeros(n_rows, problem.n_targets, n_layers, n_positions, n_nodes)
    for row in settings.progress(range(n_rows), "prompts"):
        real_LTN = problem.network.real_BT[row][None, :, None].expand(nodes.shape[1:])
        nodes_n3 = real_LTN.nonzero()
        found_nK = exact_scores(problem, row, nodes_n3, settings.chunk)
        scores_BKLTN[row][:, *nodes_n3.T] = found_nK.T.to(scores_BKLTN)
    return scores_BKLTN


def _repeat(batch: "TokenBatch", row: int, times: int) -> "TokenBatch":
    from shared.tokens import TokenBatch

    fields = ("input_ids_BT", "attention_mask_BT", "position_ids_BT", "prompt_lengths_B")
    values = {name: getattr(batch, name)[row : row + 1] for name in fields}
    return TokenBatch(**{name: x.expand(times, *x.shape[1:]).contiguous() for name, x in values.items()})


def _single_nodes(problem: Problem, part_n3: Tensor, reference_LTX: Tensor) -> list[Keep]:
    """Return the edits that put node j of the part, and nothing else, to its reference in row j of the batch."""
    architecture, edits = problem.model.architecture, []
    n_nodes = reference_LTX.shape[-1] // problem.basis.group(architecture)
    for layer in part_n3[:, 0].unique().tolist():
        chosen = (part_n3[:, 0] == layer).nonzero()[:, 0]
        shape = (len(part_n3), reference_LTX.shape[1], n_nodes)
        keep_BTN = torch.ones(shape, dtype=torch.bool, device=reference_LTX.device)
        keep_BTN[chosen, part_n3[chosen, 1], part_n3[chosen, 2]] = False
        keep_BTX = problem.basis.spread(keep_BTN, architecture)
        site, reference_BTX = problem.sites[layer], reference_LTX[layer][None]
        edits.append(Keep(site, keep_BTX=keep_BTX, reference_BTX=reference_BTX))
    return edits
