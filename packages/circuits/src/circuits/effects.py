"""What scaling a graph's neurons does to the answer, in the model itself (digest 1.9): for the page's side panel.

A case is a set of neuron nodes and a factor (0 ablates, -1 flips, 2 doubles). One forward pass takes a batch of
copies of the prompt, in each of which another case is scaled. Outcomes are the changes of the graph's targets and the
model's likeliest next tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.graph import NEURON, Graph, GraphError
from shared.hooks import edit
from shared.interventions import Intervention
from shared.tokens import pad

if TYPE_CHECKING:
    from shared.models import Model

FACTORS = (0.0, -1.0, 2.0)
MOST = 100  # single nodes of a graph that are tried
ROWS = 32  # copies of the prompt in one forward pass
SHOWN = 3  # tokens named in an outcome


class Outcome(TypedDict):
    """Change of every target's value, and the likeliest next tokens with their probabilities."""

    changes: list[float]
    top: list[dict[str, Any]]


@dataclass(frozen=True, eq=False, kw_only=True)
class ScaleEntries(Intervention):
    """Multiplies single entries (row of the batch, column, neuron) by factors of their own."""

    entries_3n: Int[Tensor, "3 n"]
    factors_n: Float[Tensor, " n"]

    def edited(self, x: Tensor) -> Tensor:
        """A copy of x with the entries multiplied."""
        row, column, neuron = self.entries_3n.to(x.device)
        scaled = x.clone()
        scaled[row, column, neuron] = x[row, column, neuron] * self.factors_n.to(x)
        return scaled


def precompute(
    model: "Model",
    graph: Graph,
    groups: Iterable[Sequence[int]] = (),
    factors: Sequence[float] = FACTORS,
    most: int = MOST,
) -> list[dict[str, Any]]:
    """Return what each factor does to each of the strongest neurons, and to each group (node numbers), of a graph.

    Rows are `{"nodes": [number, ...], "outcomes": {factor: Outcome}}`, as the page takes them.
    """
    strength_n = graph.total_nK.abs().sum(1).masked_fill(graph.kind_n != NEURON, -1.0)
    singles = [
        [node] for node in strength_n.argsort(descending=True)[:most].tolist() if strength_n[node] >= 0
    ]
    sets = [*singles, *(sorted(group) for group in groups)]
    found = outcomes(model, graph, [(group, factor) for group in sets for factor in factors])
    names = [f"{factor:g}" for factor in factors]
    return [
        {"nodes": group, "outcomes": dict(zip(names, found[i * len(names) :][: len(names)], strict=True))}
        for i, group in enumerate(sets)
    ]


def outcomes(model: "Model", graph: Graph, cases: Sequence[tuple[Sequence[int], float]]) -> list[Outcome]:
    """Return the outcome of every case (node numbers of neurons, factor); GraphError where the model is another one."""
    check_model(model, graph)
    clean_1V = _last_logits(model, graph, [([], 1.0)])
    value_1K = target_values(graph, clean_1V)
    results: list[Outcome] = []
    for start in range(0, len(cases), ROWS):
        logits_RV = _last_logits(model, graph, cases[start : start + ROWS])
        change_RK = target_values(graph, logits_RV) - value_1K
        best = logits_RV.softmax(-1).topk(min(SHOWN, logits_RV.shape[-1]))
        for change_K, tokens, probabilities in zip(
            change_RK.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        ):
            named = [
                {"token": model.tokenizer.decode([token]), "probability": probability}
                for token, probability in zip(tokens, probabilities, strict=True)
            ]
            results.append({"changes": change_K, "top": named})
    return results


def check_model(model: "Model", graph: Graph) -> None:
    """Refuse to run a graph's prompt on a model with other weights, and a graph that is of several prompts."""
    if min((*graph.header.token_ids, *graph.header.target_ids), default=0) < 0:
        raise GraphError(
            "the graph combines several prompts or targets, so there is no one run of it to change"
        )
    if model.fingerprint != graph.header.fingerprint:
        raise GraphError(
            f"the graph was traced on {graph.header.model} with fingerprint {graph.header.fingerprint}, but "
            f"{model.config.name} has {model.fingerprint}: give the model that it was traced on"
        )


def target_values(graph: Graph, logits_RV: Float[Tensor, "R V"]) -> Float[Tensor, "R K"]:
    """Return the graph's targets out of logits at the position they are read at."""
    header, right_RK = graph.header, logits_RV[:, graph.header.target_ids]
    if header.metric == "logit difference":
        return right_RK - logits_RV[:, header.foil_ids]
    if header.metric == "demeaned logit":
        return right_RK - logits_RV.mean(-1, keepdim=True)
    if header.metric == "logit":
        return right_RK
    if header.metric == "log-probability":
        return logits_RV.log_softmax(-1)[:, header.target_ids]
    raise GraphError(f"targets of the kind {header.metric!r} cannot be read off the logits again")


def _last_logits(
    model: "Model", graph: Graph, cases: Sequence[tuple[Sequence[int], float]]
) -> Float[Tensor, "R V"]:
    """Return the logits at the last position, one row a case, in float64 (differences of them are shown)."""
    ids = list(graph.header.token_ids)
    batch = pad([ids] * len(cases), [len(ids)] * len(cases), 0)
    with torch.no_grad(), edit(model, _edits(graph, cases)):
        return model(batch)[:, -1].double()


def _edits(graph: Graph, cases: Sequence[tuple[Sequence[int], float]]) -> list[ScaleEntries]:
    entries = [(row, node, factor) for row, (nodes, factor) in enumerate(cases) for node in nodes]
    if not entries:
        return []
    row_n, node_n = torch.tensor([entry[:2] for entry in entries]).T
    factor_n = torch.tensor([entry[2] for entry in entries], dtype=torch.float64)
    if not bool((graph.kind_n[node_n] == NEURON).all()):
        raise GraphError("only neurons can be scaled: a token, bias or target is none")
    edits = []
    for layer in graph.layer_n[node_n].unique().tolist():
        here = graph.layer_n[node_n] == layer
        nodes = node_n[here]
        entries_3n = torch.stack([row_n[here], graph.position_n[nodes], graph.index_n[nodes]])
        edits.append(ScaleEntries(f"blocks.{layer}.neurons", entries_3n=entries_3n, factors_n=factor_n[here]))
    return edits
