"""Nodes found by influence equal a greedy search over the full matrix; token maps forwards equal backwards."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from circuits.attribution import top_nodes
from circuits.edges import Neurons, direct_effects
from circuits.expansion import expand
from circuits.maps import backward_maps, forward_maps, token_maps
from circuits.tracing import trace_problem
from shared.errors import UserError

ROWS = [[1, 40, 77, 9, 120], [1, 90, 13, 55, 7]]


def single(problem, row=0):
    return problem.network.row(row), problem.metric.row(row, torch.arange(5))


def full_matrix(network, metric):
    """Every neuron's normalised row of direct effects, then the targets' rows and weights."""
    everyone = Neurons.from_mask(torch.ones_like(torch.stack(network.neurons, 1)[0], dtype=torch.bool))
    effects = direct_effects(network, everyone, metric)
    other_S = (
        effects.embed_ST.abs().sum(1)
        + effects.position_ST.abs().sum(1)
        + effects.attn_bias_SLT.abs().sum((1, 2))
        + effects.mlp_bias_SLT.abs().sum((1, 2))
        + effects.own_S.abs()
    )
    rows_Sn = effects.neuron_Sn.abs()
    rows_Sn = rows_Sn / (rows_Sn.sum(1) + other_S)[:, None]
    n = len(everyone)
    value_K = effects.value_S[n:].abs()
    return rows_Sn[:n], value_K / value_K.sum() @ rows_Sn[n:]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_expansion_is_greedy_search_in_the_full_matrix(random_models, problem_of, family):
    from shared.models import ModelConfig, load

    if family not in random_models:
        random_models[family] = load(ModelConfig(f"random:{family}", dtype="float64"))
    network, metric = single(problem_of(random_models[family], ROWS))
    rows_nn, start_n = full_matrix(network, metric)
    chosen = torch.zeros(len(start_n), dtype=torch.bool)
    for batch in (5, 5, 3):
        # influence along the rows taken so far: start + sum over taken targets, which is acyclic
        taken_nn = rows_nn * chosen[:, None]
        influence_n, step_n = start_n.clone(), start_n @ taken_nn
        while step_n.any():
            influence_n, step_n = influence_n + step_n, step_n @ taken_nn
        chosen[influence_n.masked_fill(chosen, 0.0).topk(batch).indices] = True
    found_LTN = expand(network, metric, budget=13, batch=5, row_sources=10**6)
    assert torch.equal(found_LTN.flatten(), chosen)
    assert not torch.equal(expand(network, metric, budget=13, batch=13).flatten(), chosen)  # ranks change


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation gives."""

    most = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        sizes = [x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.most = max([self.most, *sizes])
        return made


def test_whole_rows_are_never_kept(llama, problem_of):
    network, metric = single(problem_of(llama, ROWS))
    n_layers, n_rows = len(network.blocks), 64
    row = network.blocks[0].neurons_BTN.numel()
    with Largest() as seen:
        assert int(expand(network, metric, n_rows, batch=n_rows, row_sources=50).sum()) == n_rows
    assert seen.most < n_layers * n_rows * row


def test_budgets_are_kept_and_few_sources_come_close(llama, problem_of):
    network, metric = single(problem_of(llama, ROWS))
    exact = expand(network, metric, 40, batch=8)
    assert int(exact.sum()) == 40
    sparse = expand(network, metric, 40, batch=8, row_sources=50)
    assert int((exact & sparse).sum()) >= 30
    everyone = expand(network, metric, 10**6, batch=10**6)
    assert int(everyone.sum()) < everyone.numel()  # last-layer neurons of other tokens reach no target
    assert not everyone[-1, :-1].any()
    with pytest.raises(UserError, match="at least 1"):
        expand(network, metric, 0)


def test_graphs_over_influential_nodes_close(llama, problem_of):
    problem = problem_of(llama, ROWS)
    graph = trace_problem(problem, 0, max_nodes=25, max_edges=400, select="influence")
    assert len(graph.neurons()) == 25
    assert graph.closure_error() < 1e-10
    assert graph.header.settings["select"] == "influence"
    assert 0 < graph.header.node_mass_kept < 1
    assert graph.neurons() != trace_problem(problem, 0, max_nodes=25, max_edges=400).neurons()


def test_token_maps_forwards_equal_backwards(any_model, problem_of, relative):
    network, _ = single(problem_of(any_model, ROWS))
    acts_LTN = torch.stack(network.neurons, 1)[0]
    noise_LTN = torch.rand(acts_LTN.shape, generator=torch.Generator().manual_seed(0))
    neurons = Neurons.from_mask(top_nodes(noise_LTN, 30))
    forward_nT, backward_nT = forward_maps(network, neurons), backward_maps(network, neurons)
    assert relative(backward_nT, forward_nT) < 1e-10
    assert torch.equal(token_maps(network, neurons), forward_nT)
    torch.testing.assert_close(backward_maps(network, neurons, max_bytes=1), backward_nT)
    torch.testing.assert_close(forward_maps(network, neurons, max_bytes=1), forward_nT)
    after_nT = torch.arange(5) > neurons.position_n[:, None]
    assert not forward_nT[after_nT].any()
    if not any_model.architecture.family.startswith(("gpt", "qwen2")):  # no biases, no learned positions
        assert relative(forward_nT.sum(1), neurons.gather(acts_LTN)) < 1e-10
    few = Neurons(*(column[:3] for column in (neurons.layer_n, neurons.position_n, neurons.index_n)))
    assert torch.equal(token_maps(network, few), backward_maps(network, few))
