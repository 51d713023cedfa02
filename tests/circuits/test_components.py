"""Component circuits: scores equal finite edits of the frozen network, sums close, and MIB's file lists every edge."""

import json

import pytest
import torch

from circuits.cli import main
from circuits.components import INPUT, LOGITS, Components, Edge, components, edge_scores, metric_of, writes
from circuits.graph import GraphError
from circuits.linearize import linearize
from circuits.tracing import trace
from shared.models import ModelConfig, load

PROMPT = "one two"


def posed(model):
    graph = trace(model, PROMPT, top_k=2, max_nodes=5)
    batch = model.encode([PROMPT])
    network = linearize(model, batch)
    return graph, network, writes(model, batch, network), metric_of(graph, network)


def without(network, metric, edge, write_TD):
    """The summed targets when one write is taken out of one component's input, in the frozen network."""
    x, n_heads = network.embed_BTD[:, None], network.blocks[0].attention.query_BHTd.shape[1]
    for layer, block in enumerate(network.blocks):
        attn = block.attention_forward(x)
        if edge.target.startswith(f"a{layer}.h"):
            head = int(edge.target.split("h")[1])
            cut_X = block.attn_norm.forward(write_TD[None, None], shift=False) @ block.weights.value_XD.T
            heads = block.attention.mix(cut_X).unflatten(-1, (n_heads, -1))
            only = torch.zeros_like(heads)
            only[..., head, :] = heads[..., head, :]
            attn = attn - block.attn_post.forward(only.flatten(-2) @ block.weights.out_DY.T, shift=False)
        read = x if block.parallel else x + attn
        a = block.neurons_forward(read - write_TD if edge.target == f"m{layer}" else read)
        x = x + attn + block.write_forward(a)
    x = x - write_TD if edge.target == LOGITS else x
    return float(network.value(x.expand(-1, metric.positions_BK.shape[1], -1, -1), metric).sum())


def test_a_score_is_the_effect_of_a_finite_edit(any_model):
    _, network, write, metric = posed(any_model)
    scores = edge_scores(network, write, metric)
    clean = without(network, metric, Edge(INPUT, "none"), write[INPUT])
    assert clean == pytest.approx(float(metric.value(network.logits_BTV).sum()), rel=1e-9)
    parts = [edge for edge in scores if edge.part not in ("q", "k")]
    scale = max(abs(scores[edge]) for edge in parts)
    for edge in [*parts[:: max(1, len(parts) // 25)], parts[-1]]:
        effect = clean - without(network, metric, edge, write[edge.source])
        assert scores[edge] == pytest.approx(effect, abs=1e-9 * max(1.0, scale))
    assert not any(score for edge, score in scores.items() if edge.part in ("q", "k"))


def test_what_reaches_the_logits_adds_up(llama):
    """Without biases all writes together are the stream: their edges to the logits sum to the targets."""
    graph = trace(llama, PROMPT, top_k=2, max_nodes=5)
    scores = components(llama, graph).scores
    into = sum(score for edge, score in scores.items() if edge.target == LOGITS)
    assert into == pytest.approx(sum(graph.header.target_values), rel=1e-9)


def test_the_circuit_leads_from_the_input_to_the_logits():
    chain = {Edge(INPUT, "m0"): 3.0, Edge("m0", "m1"): -2.0, Edge("m1", LOGITS): 1.0}
    loose = {Edge("m2", LOGITS): 9.0, Edge(INPUT, "a1.h0", "v"): 8.0, Edge("m0", LOGITS): 0.5}
    found = Components({}, loose | chain)
    assert found.circuit(5) == set(chain)
    assert found.circuit(2) == set()
    assert {name for name, node in found.file(5)["nodes"].items() if node["in_graph"]} == {
        INPUT,
        "m0",
        "m1",
        LOGITS,
    }


def test_the_command_writes_mibs_file(tmp_path, capsys):
    model = load(ModelConfig("random:gpt_neox"))  # attention and MLP read the same stream
    folder = trace(model, PROMPT, top_k=2, max_nodes=5).save(tmp_path / "graph")
    out = tmp_path / "mib.json"
    assert main(["export", str(folder), "--to", "mib", "--edges", "30", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    content = json.loads(out.read_text())
    cfg = content["cfg"]
    assert cfg["parallel_attn_mlp"] is True
    n_layers, n_heads = cfg["n_layers"], cfg["n_heads"]
    names = [
        INPUT,
        *(name for i in range(n_layers) for name in [*(f"a{i}.h{h}" for h in range(n_heads)), f"m{i}"]),
    ]
    assert list(content["nodes"]) == [*names, LOGITS]
    expected = [f"{name}->{LOGITS}" for name in names]
    for layer in range(n_layers):
        below = names[: names.index(f"a{layer}.h0")]
        expected += [
            f"{name}->a{layer}.h{h}<{part}>" for name in below for h in range(n_heads) for part in "qkv"
        ]
        expected += [f"{name}->m{layer}" for name in below]
    assert sorted(content["edges"]) == sorted(expected)
    assert 0 < sum(edge["in_graph"] for edge in content["edges"].values()) <= 30
    other = load(ModelConfig("random:gpt_neox", seed=1))
    with pytest.raises(GraphError, match="give the model"):
        components(other, trace(model, PROMPT, top_k=2, max_nodes=5))
