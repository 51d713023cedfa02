"""Circuits in mixtures of experts: frozen routing, brute force, faithfulness, names of neurons, the command line."""

from collections import Counter

import pytest
import torch

from circuits import load_graph, trace, write_page
from circuits.attribution import attribute
from circuits.cli import main
from circuits.faithfulness import curve
from circuits.graph import NEURON
from circuits.linearize import linearize
from circuits.memory import estimate
from circuits.pathways import mean_reference, neuron_activations
from circuits.relp import relp
from circuits.rules import Rules
from circuits.steering import Node, matched_random, scale_nodes
from shared.families import FAMILIES
from shared.hooks import capture, edit
from shared.interventions import Scale, Set
from shared.tokens import pad

SPARSE = [name for name, row in FAMILIES.items() if row.experts]
PROMPT = "The cats are"


@pytest.fixture(params=SPARSE)
def model(request, random_models):
    from shared.models import ModelConfig, load

    if request.param not in random_models:
        random_models[request.param] = load(ModelConfig(f"random:{request.param}", dtype="float64"))
    return random_models[request.param]


def first_sparse(model):
    return int(model.architecture.sites("routing")[0].split(".")[1])


def test_a_router_is_a_constant_of_the_frozen_network(model, problem_of, relative):
    """Other routing weights are other coefficients: p and q are linear in them, and zero for experts not chosen."""
    layer, batch = first_sparse(model), problem_of(model).batch
    site = f"blocks.{layer}.routing"
    plain = linearize(model, batch).blocks[layer]
    with edit(model, Scale(site, 0.5)):
        halved = linearize(model, batch).blocks[layer]
    with torch.no_grad(), capture(model, [site]) as acts:
        model(batch)
    unchosen_BTN = (model.architecture.spread(layer, acts[site]) == 0) & plain.attention.real_BT[..., None]
    assert unchosen_BTN.any()
    for name in ("gate_BTN", "up_BTN", "neurons_BTN"):
        assert relative(getattr(halved, name), 0.5 * getattr(plain, name)) < 1e-12
        assert not getattr(plain, name)[unchosen_BTN].any()


def test_without_the_half_rule_conservation_breaks(model, problem_of):
    error = {
        half: relp(problem.network, problem.metric).ledger.error()
        for half in (True, False)
        for problem in [problem_of(model, rules=Rules(half=half))]
    }
    assert error[True] < 1e-10
    assert error[False] > 1e-3


def test_exact_patching_is_setting_each_neuron_by_hand(model, problem_of):
    """Against edits one at a time; references are other prompts' means, where experts not chosen here are active."""
    rows = [[1, 40, 77], [1, 90, 13]]
    reference_BLTN = mean_reference(model, pad([[3, 8, 200], [7, 55, 21]], [3, 3], 0))
    problem = problem_of(model, rows[:1], k=1, reference_BLTN=reference_BLTN)
    scores_LTN = attribute(problem, "exact")[0, 0]
    acts_LTN = neuron_activations(model, problem.batch)[0]
    generator = torch.Generator().manual_seed(0)
    moved_LTN = (reference_BLTN[0] - acts_LTN).abs() > 1e-3
    nodes = moved_LTN.nonzero()[torch.randperm(int(moved_LTN.sum()), generator=generator)[:40]]
    layer = first_sparse(model)
    brought_in = ((acts_LTN[layer] == 0) & (reference_BLTN[0, layer] != 0)).nonzero()[:5]
    nodes = torch.cat([nodes, torch.nn.functional.pad(brought_in, (1, 0), value=layer)])
    with torch.no_grad():
        clean = problem.metric.value(model(problem.batch))[0, 0]
        for at in nodes.tolist():
            place, value = Node(*at), float(reference_BLTN[0][tuple(at)])
            one = Set(
                f"blocks.{place.layer}.neurons", value, indices=[place.neuron], positions=[place.position]
            )
            with edit(model, one):
                moved = problem.metric.value(model(problem.batch))[0, 0]
            assert float(scores_LTN[tuple(at)]) == pytest.approx(float(clean - moved), rel=1e-6, abs=1e-6)


def test_gradients_see_the_router_and_experts_that_were_not_chosen(model, problem_of, relative):
    """AtP is the derivative of moving a neuron, also one whose expert was not chosen, and with the routing after it."""
    near = problem_of(model, [[1, 40, 77]], k=1)
    generator = torch.Generator().manual_seed(1)
    step_BLTN = 1e-3 * torch.randn(near.activations_BLTN.shape, dtype=torch.float64, generator=generator)
    problem = problem_of(model, [[1, 40, 77]], k=1, reference_BLTN=near.activations_BLTN - step_BLTN)
    predicted, exact = (attribute(problem, name)[0, 0] for name in ("atp", "exact"))
    for site in model.architecture.sites("routing"):
        layer = int(site.split(".")[1])
        unchosen_TN = near.activations_BLTN[0, layer] == 0
        for chosen_TN in (unchosen_TN, ~unchosen_TN):
            assert exact[layer][chosen_TN].any()
            assert relative(predicted[layer][chosen_TN], exact[layer][chosen_TN]) < 0.05


def test_faithfulness_is_one_with_all_neurons_and_zero_with_none(model, problem_of):
    problem = problem_of(model, [[1, 40, 77, 9], [1, 90, 13, 7]], k=1)
    total = problem.activations_BLTN[0].numel()
    nothing, everything = curve(
        model, problem.batch, problem.metric, attribute(problem)[:, 0], [0, total], problem.reference_BLTN
    )
    assert nothing.faithfulness().estimate == pytest.approx(0, abs=1e-6)
    assert everything.faithfulness().estimate == pytest.approx(1, abs=1e-6)
    assert everything.completeness().estimate == pytest.approx(0, abs=1e-6)


def test_graphs_name_neurons_by_expert(model, tmp_path):
    graph = trace(model, PROMPT, top_k=2, max_nodes=40, max_edges=200)
    assert graph.closure_error() < 1e-9
    again = load_graph(graph.save(tmp_path))
    seen = set()
    for node in (again.kind_n == NEURON).nonzero()[:, 0].tolist():
        layer, index = int(again.layer_n[node]), int(again.index_n[node])
        sizes = model.architecture.experts(layer)
        sign = "+" if again.activation_n[node] >= 0 else "-"
        if sizes is None:
            name = f"N{index}"
        elif index < sizes.n_experts * sizes.n_neurons:
            name = f"E{index // sizes.n_neurons}/N{index % sizes.n_neurons}"
        else:
            name = f"S/N{index - sizes.n_experts * sizes.n_neurons}"
        assert again.label(node) == graph.label(node) == f"L{layer}/{name}{sign}"
        seen.add(name[0])
    assert "E" in seen


def test_ablating_the_strongest_neurons_in_the_model_moves_the_answer(model, problem_of):
    problem = problem_of(model, [[1, 40, 77, 9]], k=1)
    scores_LTN = attribute(problem)[0, 0]
    top = scores_LTN.abs().flatten().topk(20).indices
    nodes = [Node(*place) for place in torch.stack(torch.unravel_index(top, scores_LTN.shape), 1).tolist()]
    with torch.no_grad():
        clean = problem.metric.value(model(problem.batch))
        with (
            edit(model, scale_nodes(nodes, 0.0)),
            capture(model, model.architecture.sites("neurons")) as acts,
        ):
            ablated = problem.metric.value(model(problem.batch))
    assert all(acts[f"blocks.{node.layer}.neurons"][0, node.position, node.neuron] == 0 for node in nodes)
    assert (clean - ablated).abs().max() > 1e-2


def test_memory_counts_the_matrices_of_one_block_and_not_of_all_prompts(model):
    one, many = (estimate(model, rows, 16) for rows in (1, 4))
    block = model.architecture.block(first_sparse(model))
    assert one.experts == many.experts == 2 * block.W_up.numel() * block.W_up.element_size()
    assert one.total - one.experts == (many.total - many.experts) / 4
    assert "experts" in str(one)


def test_random_controls_are_active_neurons_of_the_same_experts(model, problem_of):
    problem = problem_of(model, [[1, 40, 77, 9]], k=1)
    acts_LTN, architecture = problem.activations_BLTN[0], model.architecture
    random_LTN = attribute(problem, "random", seed=3)[0, 0]
    assert torch.equal(random_LTN != 0, acts_LTN != 0)
    assert not (acts_LTN != 0).all()
    nodes = [Node(*place) for place in (acts_LTN != 0).nonzero()[::7].tolist()]
    drawn = matched_random(nodes, architecture, seed=1)

    def places(some):
        return Counter(
            (one.layer, one.position, architecture.siblings(one.layer, one.neuron)) for one in some
        )

    assert places(drawn) == places(nodes)
    assert len({*nodes, *drawn}) == 2 * len(nodes)
    assert all(acts_LTN[one] != 0 for one in drawn)


def test_the_command_line_traces_and_exports(tmp_path, capsys):
    out = tmp_path / "graph"
    options = ["--prompt", "abc", "--out", str(out), "--max-nodes", "20"]
    assert main(["trace", "--model", "random:qwen2_moe", *options]) == 0
    assert "/E" in capsys.readouterr().out
    assert "/E" in (out / "index.html").read_text()
    assert main(["export", str(out), "--to", "neuronpedia", "--out", str(tmp_path / "graph.json")]) == 0
    assert "/E" in (tmp_path / "graph.json").read_text()


def test_the_page_names_neurons_by_expert(browser, random_models, tmp_path):
    from shared.models import ModelConfig, load

    if "qwen2_moe" not in random_models:
        random_models["qwen2_moe"] = load(ModelConfig("random:qwen2_moe", dtype="float64"))
    graph = trace(random_models["qwen2_moe"], PROMPT, top_k=1, max_nodes=20, max_edges=50)
    drawn = """(() => {
        const said = [];
        pen.fillText = (what) => said.push(what);
        view = { ...view, k: 2 };
        for (const item of scene.items.filter(ranks)) drawNode(item);
        return said.sort();
    })()"""
    with browser.open(write_page(graph, tmp_path / "page.html")) as page:
        names = page.evaluate(drawn)
    labels = [graph.label(node) for node in (graph.kind_n == NEURON).nonzero()[:, 0].tolist()]
    assert names == sorted(label[1:-1].replace("N", "") for label in labels)
    assert any("/E" in name for name in names)
