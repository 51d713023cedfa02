"""What scaling does, against one ordinary edit of the model at a time."""

import dataclasses
from copy import deepcopy

import pytest
import torch

from circuits.effects import FACTORS, outcomes, precompute, target_values
from circuits.graph import ATTN_BIAS, EMBEDDING, LOGIT, MLP_BIAS, NEURON, POSITION, GraphError
from circuits.merge import mean_graph
from circuits.steering import Node, scale_nodes
from circuits.tracing import trace
from shared.hooks import edit
from shared.models import ModelConfig, load

PROMPT = "one two three"


@pytest.fixture(scope="module")
def model():
    return load(ModelConfig("random:qwen3", dtype="float64"))


@pytest.fixture(scope="module")
def graph(model):
    return trace(model, PROMPT, top_k=3, max_nodes=12)


def neuron_numbers(graph):
    return (graph.kind_n == NEURON).nonzero()[:, 0].tolist()


def test_a_batch_of_cases_equals_one_edit_each(model, graph):
    numbers = neuron_numbers(graph)
    groups = [numbers[:1], numbers[3:8], numbers[::2]]
    cases = [(group, factor) for group in groups for factor in (*FACTORS, -4.0)]
    batch = model.encode([graph.header.prompt])
    assert batch.input_ids_BT[0].tolist() == graph.header.token_ids
    clean = target_values(graph, model(batch)[:, -1])[0].detach()
    torch.testing.assert_close(clean, torch.tensor(graph.header.target_values, dtype=clean.dtype))
    for (group, factor), found in zip(cases, outcomes(model, graph, cases), strict=True):
        nodes = [Node(int(graph.layer_n[n]), int(graph.position_n[n]), int(graph.index_n[n])) for n in group]
        with torch.no_grad(), edit(model, scale_nodes(nodes, factor)):
            logits_V = model(batch)[0, -1]
        change = target_values(graph, logits_V[None])[0] - clean
        torch.testing.assert_close(
            torch.tensor(found["changes"], dtype=change.dtype), change, rtol=1e-9, atol=1e-10
        )
        probability, token = logits_V.softmax(-1).max(-1)
        assert found["top"][0]["token"] == model.tokenizer.decode([int(token)])
        assert found["top"][0]["probability"] == pytest.approx(float(probability))


def of_kind(graph, kind, layer=None):
    chosen = (graph.kind_n == kind) & (True if layer is None else graph.layer_n == layer)
    return chosen.nonzero()[:, 0].tolist()


@pytest.fixture(scope="module")
def biased():
    """A family with learned positions and biases everywhere, and one with biases of the values alone."""
    models = [load(ModelConfig(f"random:{family}", dtype="float64")) for family in ("gpt2", "qwen2")]
    return {
        model.architecture.family: (model, trace(model, PROMPT, top_k=3, max_nodes=8)) for model in models
    }


@pytest.mark.parametrize("factor", [0.0, 2.0, -1.0])
def test_tokens_positions_and_biases_scale_as_the_models_own_parameters_would(biased, factor):
    """Against a copy of the model with the embedding, the position or the bias itself multiplied."""
    gpt2, graph = biased["gpt2"]
    layer, at = 1, 2
    ids = torch.tensor([graph.header.token_ids])

    def check(model, graph, nodes, logits_V):
        assert nodes
        (found,) = outcomes(model, graph, [(nodes, factor)])
        after_K = target_values(graph, logits_V[None])[0]
        before_K = torch.tensor(graph.header.target_values, dtype=after_K.dtype)
        assert float((after_K - before_K).abs().max()) > 1e-6
        torch.testing.assert_close(
            torch.tensor(found["changes"], dtype=after_K.dtype), after_K - before_K, rtol=1e-8, atol=1e-9
        )

    with torch.no_grad():
        embeds = gpt2.hf.get_input_embeddings()(ids)
        embeds[0, at] *= factor
        logits = gpt2.hf(inputs_embeds=embeds).logits[0, -1]
        check(gpt2, graph, [of_kind(graph, EMBEDDING)[at]], logits)
        copy = deepcopy(gpt2.hf)
        copy.transformer.wpe.weight[at] *= factor
        check(gpt2, graph, [of_kind(graph, POSITION)[at]], copy(ids).logits[0, -1])
        copy.transformer.h[layer].mlp.c_proj.bias *= factor  # and the position with it: two kinds at once
        both = [of_kind(graph, POSITION)[at], *of_kind(graph, MLP_BIAS, layer)]
        check(gpt2, graph, both, copy(ids).logits[0, -1])
        qwen2, graph = biased["qwen2"]
        copy = deepcopy(qwen2.hf)
        copy.model.layers[layer].self_attn.v_proj.bias *= factor
        ids = torch.tensor([graph.header.token_ids])
        check(qwen2, graph, of_kind(graph, ATTN_BIAS, layer), copy(ids).logits[0, -1])


def test_more_cases_than_a_batch_takes(model, graph, monkeypatch):
    numbers = neuron_numbers(graph)
    cases = [([node], factor) for node in numbers for factor in FACTORS]
    whole = outcomes(model, graph, cases)
    monkeypatch.setattr("circuits.effects.ROWS", 5)
    for one, other in zip(outcomes(model, graph, cases), whole, strict=True):
        assert one["changes"] == pytest.approx(other["changes"], abs=1e-12)


def test_strongest_neurons_and_groups_are_tried(model, graph):
    numbers = neuron_numbers(graph)
    rows = precompute(model, graph, [numbers[2:4]], most=5, most_others=2)
    strength = graph.total_nK.abs().sum(1)
    strongest = sorted(numbers, key=lambda node: -float(strength[node]))[:5]
    tokens = (graph.kind_n == EMBEDDING).nonzero()[:, 0].tolist()
    strongest += sorted(tokens, key=lambda node: -float(strength[node]))[:2]
    assert [row["nodes"] for row in rows] == [*([node] for node in strongest), numbers[2:4]]
    assert all(set(row["outcomes"]) == {"0", "-1", "2"} for row in rows)


def test_a_logit_difference_is_read_again(model):
    words = [model.tokenizer.decode([token]) for token in (17, 23)]
    graph = trace(model, PROMPT, answer=words[0], wrong=words[1], max_nodes=5)
    with torch.no_grad():
        values = target_values(graph, model(model.encode([PROMPT]))[:, -1])
    assert values[0].tolist() == pytest.approx(graph.header.target_values, rel=1e-9)


def test_what_cannot_be_run_is_refused(model, graph):
    other = dataclasses.replace(graph, header=dataclasses.replace(graph.header, fingerprint="0" * 16))
    with pytest.raises(GraphError, match="give the model that it was traced on"):
        precompute(model, other)
    target = (graph.kind_n == LOGIT).nonzero()[0].tolist()
    with pytest.raises(GraphError, match="nothing to scale"):
        outcomes(model, graph, [(target, 0.0)])
    with pytest.raises(GraphError, match="combines several"):
        outcomes(model, mean_graph([graph, graph]), [([], 1.0)])
    direction = dataclasses.replace(graph, header=dataclasses.replace(graph.header, metric="direction"))
    with pytest.raises(GraphError, match="'direction'"):
        precompute(model, direction)
