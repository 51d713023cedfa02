"""What scaling a graph's nodes does to the answer, in the model itself (digest 1.9): for the page's side panel.

A case is a set of nodes and a factor (0 ablates, -1 flips, 2 doubles). One forward pass takes a batch of copies of the
prompt, in each of which another case is scaled. Outcomes are the changes of the graph's targets and the model's
likeliest next tokens. What a factor f does to a node:

    neuron                  its value times f, at the input of the down projection
    embedding, position     (f - 1) times the token's, or the learned position's, vector is added where block 0 begins
    attn_bias, mlp_bias     (f - 1) times the constant that biases and norm shifts write is added to what the
                            attention, or the MLP, of that layer writes (`FrozenBlock.attention_bias`, `.mlp_bias`)

A target is what is read, so there is nothing to scale.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph import ATTN_BIAS, EMBEDDING, LOGIT, MLP_BIAS, NEURON, POSITION, Graph, GraphError, Header
from circuits.linearize import linearize
from shared.hooks import edit
from shared.interventions import Intervention
from shared.tokens import TokenBatch, pad

if TYPE_CHECKING:
    from shared.models import Model

FACTORS = (0.0, -1.0, 2.0)
MOST, MOST_OTHERS = 100, 40  # single neurons, and other nodes, of a graph that are tried
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


@dataclass(frozen=True, eq=False, kw_only=True)
class AddRows(Intervention):
    """Adds vectors at places (row of the batch, column) of their own."""

    places_2n: Int[Tensor, "2 n"]
    vectors_nD: Float[Tensor, "n D"]

    def edited(self, x: Tensor) -> Tensor:
        """A copy of x with the vectors added; those of one place add up."""
        return x.index_put(tuple(self.places_2n.to(x.device)), self.vectors_nD.to(x), accumulate=True)


def precompute(
    model: "Model",
    graph: Graph,
    groups: Iterable[Sequence[int]] = (),
    factors: Sequence[float] = FACTORS,
    most: int = MOST,
    most_others: int = MOST_OTHERS,
) -> list[dict[str, Any]]:
    """Return what each factor does to each of the strongest nodes, and to each group (node numbers), of a graph.

    Nodes are the `most` strongest neurons, then the `most_others` strongest tokens, positions and biases. Rows are
    `{"nodes": [number, ...], "outcomes": {factor: Outcome}}`, as the page takes them.
    """
    others_n = (graph.kind_n != NEURON) & (graph.kind_n != LOGIT)
    singles = _strongest(graph, graph.kind_n == NEURON, most) + _strongest(graph, others_n, most_others)
    sets = [*([node] for node in singles), *(sorted(group) for group in groups)]
    found = outcomes(model, graph, [(group, factor) for group in sets for factor in factors])
    names = [f"{factor:g}" for factor in factors]
    return [
        {"nodes": group, "outcomes": dict(zip(names, found[i * len(names) :][: len(names)], strict=True))}
        for i, group in enumerate(sets)
    ]


def _strongest(graph: Graph, among_n: Bool[Tensor, " n"], most: int) -> list[int]:
    numbers_n = among_n.nonzero()[:, 0]
    strength_n = graph.total_nK.abs().sum(1)[numbers_n]
    return numbers_n[strength_n.argsort(descending=True)[:most]].tolist()


def outcomes(model: "Model", graph: Graph, cases: Sequence[tuple[Sequence[int], float]]) -> list[Outcome]:
    """Return the outcome of every case (node numbers, factor); GraphError where the model is another one."""
    check_model(model, graph)
    writes = _writes(model, graph, sorted({node for nodes, _ in cases for node in nodes}))
    clean_1V = _last_logits(model, graph, [([], 1.0)], writes)
    value_1K = target_values(graph, clean_1V)
    results: list[Outcome] = []
    for start in range(0, len(cases), ROWS):
        logits_RV = _last_logits(model, graph, cases[start : start + ROWS], writes)
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


def refusal(graph: Graph) -> str | None:
    """Return why no node of a graph can be scaled in a model (None: they can)."""
    header = graph.header
    if header.metric not in TARGETS:
        return f"targets of the kind {header.metric!r} cannot be read off the logits again"
    if "combined" in header.settings or min((*header.token_ids, *header.target_ids), default=0) < 0:
        return "the graph combines several prompts or targets, so there is no one run of it to change"
    return None


def check_model(model: "Model", graph: Graph) -> None:
    """Refuse to run a graph's prompt on a model with other weights, and a graph that is of no one run."""
    if reason := refusal(graph):
        raise GraphError(reason)
    if model.fingerprint != graph.header.fingerprint:
        raise GraphError(
            f"the graph was traced on {graph.header.model} with fingerprint {graph.header.fingerprint}, but "
            f"{model.config.name} has {model.fingerprint}: give the model that it was traced on"
        )


def target_values(graph: Graph, logits_RV: Float[Tensor, "R V"]) -> Float[Tensor, "R K"]:
    """Return the graph's targets out of logits at the position they are read at."""
    return TARGETS[graph.header.metric](logits_RV, graph.header)


TARGETS: dict[str, Callable[[Tensor, Header], Tensor]] = {
    "logit": lambda logits, header: logits[:, header.target_ids],
    "demeaned logit": lambda logits, header: logits[:, header.target_ids] - logits.mean(-1, keepdim=True),
    "logit difference": lambda logits, header: logits[:, header.target_ids] - logits[:, header.foil_ids],
    "log-probability": lambda logits, header: logits.log_softmax(-1)[:, header.target_ids],
}


class Write(NamedTuple):
    """What a node that is no neuron adds to the residual stream at its position, and at which site."""

    site: str
    vector_D: Float[Tensor, " D"]


def _writes(model: "Model", graph: Graph, nodes: Sequence[int]) -> dict[int, Write]:
    """Return what each of some nodes writes, neurons left aside; GraphError for a target."""
    others = [node for node in nodes if int(graph.kind_n[node]) != NEURON]
    if not others:
        return {}
    if any(int(graph.kind_n[node]) == LOGIT for node in others):
        raise GraphError("a target is what is read: there is nothing to scale")
    network, found = linearize(model, _batch(graph, 1)), {}
    zero_TD = torch.zeros_like(network.embed_BTD[0])
    position_TD = zero_TD if network.position_BTD is None else network.position_BTD[0]
    for node in others:
        kind, layer, at = (int(column[node]) for column in (graph.kind_n, graph.layer_n, graph.position_n))
        if kind == EMBEDDING:
            found[node] = Write("embed", network.embed_BTD[0, at] - position_TD[at])
        elif kind == POSITION:
            found[node] = Write("embed", position_TD[at])
        else:
            block = network.blocks[layer]
            site, bias_BTD = {
                ATTN_BIAS: ("attn_out", block.attention_bias), MLP_BIAS: ("mlp_out", block.mlp_bias)
            }[kind]  # fmt: skip
            found[node] = Write(f"blocks.{layer}.{site}", bias_BTD()[0, at])
    return found


def _batch(graph: Graph, rows: int) -> TokenBatch:
    ids = list(graph.header.token_ids)
    return pad([ids] * rows, [len(ids)] * rows, 0)


def _last_logits(
    model: "Model",
    graph: Graph,
    cases: Sequence[tuple[Sequence[int], float]],
    writes: Mapping[int, Write],
) -> Float[Tensor, "R V"]:
    """Return the logits at the last position, one row a case, in float64 (differences of them are shown)."""
    entries = [(row, node, factor) for row, (nodes, factor) in enumerate(cases) for node in nodes]
    neurons = [entry for entry in entries if entry[1] not in writes]
    others = [entry for entry in entries if entry[1] in writes]
    with torch.no_grad(), edit(model, [*_scales(graph, neurons), *_adds(graph, others, writes)]):
        return model(_batch(graph, len(cases)))[:, -1].double()


def _scales(graph: Graph, entries: Sequence[tuple[int, int, float]]) -> list[ScaleEntries]:
    """Return the edits that scale neurons, a site each; entries are (row, node, factor)."""
    edits = []
    for layer in sorted({int(graph.layer_n[node]) for _, node, _ in entries}):
        rows, nodes, factors = zip(
            *(one for one in entries if int(graph.layer_n[one[1]]) == layer), strict=True
        )
        at_n = list(nodes)
        columns = (list(rows), graph.position_n[at_n].tolist(), graph.index_n[at_n].tolist())
        entries_3n = torch.tensor(columns)
        factors_n = torch.tensor(factors, dtype=torch.float64)
        edits.append(ScaleEntries(f"blocks.{layer}.neurons", entries_3n=entries_3n, factors_n=factors_n))
    return edits


def _adds(
    graph: Graph, entries: Sequence[tuple[int, int, float]], writes: Mapping[int, Write]
) -> list[AddRows]:
    """Return the edits that scale what other nodes write, a site each; entries are (row, node, factor)."""
    edits = []
    for site in sorted({writes[node].site for _, node, _ in entries}):
        here = [one for one in entries if writes[one[1]].site == site]
        places_2n = torch.tensor([(row, int(graph.position_n[node])) for row, node, _ in here]).T
        vectors_nD = torch.stack([(factor - 1) * writes[node].vector_D for _, node, factor in here])
        edits.append(AddRows(site, places_2n=places_2n, vectors_nD=vectors_nD))
    return edits
