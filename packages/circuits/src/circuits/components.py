"""Circuits of whole components (heads, MLPs) by RelP, and MIB's file of them (digest sections 2 and 6).

A node writes to the residual stream: `input` the embeddings, `a3.h1` head 1 of layer 3, `m3` the MLP of layer 3. An
edge goes to every later component that reads the stream, and to `logits`. In the frozen network its score is exact:

    score(u -> v) = sum over positions of <what u writes, effect on the targets of one unit of what v reads>

which is how much the sum of the graph's targets falls when u's write is taken out of v's input alone (digest I8). What
all nodes and biases give to v adds up to v's relevance (I2). A head reads through its values; queries and keys are
inside the frozen pattern, so that edges to `<q>` and `<k>` are 0.

File: {cfg {n_layers, n_heads, parallel_attn_mlp, d_model}, nodes {name: {in_graph}}, edges {"u->v": {score,
in_graph}}}, every edge listed, `u->a3.h1<v>` for those to heads (https://github.com/hannamw/EAP-IG, `to_json`). In the
circuit are the edges of largest absolute score, less those that lead nowhere or come from nowhere.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.effects import check_model
from circuits.frozen import FrozenNetwork
from circuits.graph import LOGIT, Graph
from circuits.linearize import linearize
from circuits.metric import Metric, log_probability, logit_difference, token_logits
from shared.hooks import capture
from shared.serialize import write_json
from shared.tokens import pad

if TYPE_CHECKING:
    from shared.models import Model
    from shared.tokens import TokenBatch

INPUT, LOGITS = "input", "logits"
MOST_EDGES = 200


class Edge(NamedTuple):
    """One edge between components; `part` is q, k or v where the target is a head, else empty."""

    source: str
    target: str
    part: str = ""

    def __str__(self) -> str:
        return f"{self.source}->{self.target}" + (f"<{self.part}>" if self.part else "")


class Components(NamedTuple):
    """The shape of the circuit, and the score of every edge, in the order of the layers."""

    config: dict[str, Any]
    scores: dict[Edge, float]

    def nodes(self) -> list[str]:
        """Return all names of nodes, the logits last."""
        return list(dict.fromkeys([INPUT, *(edge.source for edge in self.scores), LOGITS]))

    def circuit(self, most: int = MOST_EDGES) -> set[Edge]:
        """Return the strongest edges, at most `most`, that lie on a chain from the input to the logits."""
        ranked = sorted(self.scores, key=lambda edge: -abs(self.scores[edge]))
        kept, before = {edge for edge in ranked[:most] if self.scores[edge]}, -1
        while len(kept) != before:
            before = len(kept)
            reached = {INPUT, *(edge.target for edge in kept)}
            leading = {LOGITS, *(edge.source for edge in kept)}
            kept = {edge for edge in kept if edge.source in reached and edge.target in leading}
        return kept

    def file(self, most: int = MOST_EDGES) -> dict[str, Any]:
        """Return the content of MIB's file."""
        kept = self.circuit(most)
        ends = {LOGITS, *(edge.source for edge in kept)}
        return {
            "cfg": self.config,
            "nodes": {name: {"in_graph": name in ends} for name in self.nodes()},
            "edges": {
                str(edge): {"score": score, "in_graph": edge in kept} for edge, score in self.scores.items()
            },
        }


def write_mib(model: "Model", graph: Graph, path: Path | str, most: int = MOST_EDGES) -> Path:
    """Write the component circuit of a graph's prompt and targets as MIB's file; returns the path."""
    write_json(Path(path), components(model, graph).file(most))
    return Path(path)


def components(model: "Model", graph: Graph) -> Components:
    """Return the scores of a graph's prompt and (summed) targets; GraphError where the model is another one."""
    check_model(model, graph)
    ids = list(graph.header.token_ids)
    batch = pad([ids], [len(ids)], 0)
    network = linearize(model, batch)
    architecture = model.architecture
    config = {
        "n_layers": architecture.n_layers,
        "n_heads": architecture.n_heads,
        "parallel_attn_mlp": architecture.parallel,
        "d_model": architecture.width,
    }
    return Components(config, edge_scores(network, writes(model, batch, network), metric_of(graph, network)))


def metric_of(graph: Graph, network: FrozenNetwork) -> Metric:
    """Return the metric whose targets a graph has, on the network of its prompt."""
    header = graph.header
    at_B = graph.position_n[graph.kind_n == LOGIT][:1].to(network.logits_BTV.device)
    if header.metric == "logit difference":
        return logit_difference(network.logits_BTV, at_B, header.target_ids, header.foil_ids)
    if header.metric == "log-probability":
        return log_probability(network.logits_BTV, at_B, [header.target_ids])
    return token_logits(network.logits_BTV, at_B, [header.target_ids], header.metric == "demeaned logit")


def writes(model: "Model", batch: "TokenBatch", network: FrozenNetwork) -> dict[str, Float[Tensor, "T D"]]:
    """Return what every node writes to the residual stream of the one example, biases left aside."""
    with torch.no_grad(), capture(model, model.architecture.sites("heads")) as acts:
        model(batch)
    found = {INPUT: network.embed_BTD[0]}
    for layer, block in enumerate(network.blocks):
        heads_HTd = (
            acts[f"blocks.{layer}.heads"][0].to(block.neurons_BTN).unflatten(-1, (_heads(network), -1))
        )
        out_HdD = block.weights.out_DY.T.unflatten(0, (_heads(network), -1))
        raw_HTD = heads_HTd.transpose(0, 1) @ out_HdD
        for head, write_TD in enumerate(block.attn_post.forward(raw_HTD[None], shift=False)[0]):
            found[f"a{layer}.h{head}"] = write_TD
        found[f"m{layer}"] = block.write_forward(block.neurons_BTN[:, None], bias=False)[0, 0]
    return found


def edge_scores(
    network: FrozenNetwork, writes: dict[str, Float[Tensor, "T D"]], metric: Metric
) -> dict[Edge, float]:
    """Return the score of every edge, in the order of the layers."""
    names, write_FTD = list(writes), torch.stack(list(writes.values()))
    scores: dict[Edge, float] = {}

    def read(target: str, g_TD: Tensor, sources: list[str], part: str = "") -> None:
        score_F = torch.einsum("ftd,td->f", write_FTD[: len(sources)], g_TD)
        scores.update(
            {Edge(name, target, part): score for name, score in zip(sources, score_F.tolist(), strict=True)}
        )

    seed_BKTD = network.seed(metric).sum(1, keepdim=True)
    levels = {level.layer: level for level in network.sweep(seed_BKTD)}
    for layer, block in enumerate(network.blocks):
        below = names[: names.index(f"a{layer}.h0")]
        for head, g_TD in enumerate(_head_inputs(network, layer, levels[layer].attention_BKTD)):
            for part in "qkv":
                read(f"a{layer}.h{head}", g_TD if part == "v" else torch.zeros_like(g_TD), below, part)
        above = below if block.parallel else names[: names.index(f"m{layer}")]
        read(f"m{layer}", block.neurons_transpose(levels[layer].neurons_BKTN)[0, 0], above)
    read(LOGITS, seed_BKTD[0, 0], names)
    return scores


def _heads(network: FrozenNetwork) -> int:
    return network.blocks[0].attention.query_BHTd.shape[1]


def _head_inputs(network: FrozenNetwork, layer: int, attention_BKTD: Tensor) -> Float[Tensor, "H T D"]:
    """Return the effect on the targets of one unit of what each head's values read."""
    block, n_heads = network.blocks[layer], _heads(network)
    g_TY = block.heads_transpose(attention_BKTD)[0, 0]
    alone_HTY = g_TY.new_zeros(n_heads, *g_TY.shape)
    width = g_TY.shape[-1] // n_heads
    for head in range(n_heads):
        own = slice(head * width, (head + 1) * width)
        alone_HTY[head, :, own] = g_TY[:, own]
    value_BHTX = block.attention.mix_transpose(alone_HTY[None])
    return block.attn_norm.transpose(value_BHTX @ block.weights.value_XD)[0]
