"""The pipeline end to end, in process, on a random model and a user's file of pairs."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from circuits import pipeline, pipeline_concepts, pipeline_stages
from circuits.faithfulness import smallest_size
from circuits.folder import open_folder
from circuits.graph import load_graph
from circuits.pipeline import PIPELINE, CircuitTracingConfig
from circuits.study import held_out_curve, make_study, mean_scores, pose_pairs, size_on_training
from circuits.supernodes import Supernodes, read_supernodes, write_supernodes
from circuits.tasks import TaskError, draw, find_task
from shared.models import ModelConfig, load
from shared.runs import start_run

CONFIG = {
    "train_pairs": 8,
    "test_pairs": 6,
    "sizes": [5, 50],
    "max_nodes": 20,
    "max_edges": 60,
    "ablate": 5,
    "examples": 2,
    "edge_sizes": [2, 4],
    "edge_pairs": 3,
    "proportions": [0.01, 0.1, 1.0],
}


def write_pairs(path, answers=lambda prompt: ("x", "y")):
    rows = []
    for index, letter in enumerate("abcdefghijklmnop"):
        right, wrong = answers(f"the {letter} is")
        rows.append({
            "clean_prefix": f"the {letter} is", "patch_prefix": f"the {letter.upper()} is",
            "clean_answer": right, "patch_answer": wrong, "case": str(index),
        })  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "letters.jsonl")


def test_the_smallest_size_is_found_on_training_pairs(pairs):
    """What training pairs need, and not what would have done on the test pairs."""
    model = load(ModelConfig("random:llama"))
    halves = draw(model, find_task(str(pairs)), {"train": 8, "test": 6}).parts
    made = make_study(model, "letters", halves["train"], halves["test"])
    scores_LTN, sizes = mean_scores(pose_pairs(made, made.train), "relp"), [1, 5, 20, 100]
    on_train = held_out_curve(replace(made, test=made.train), scores_LTN, sizes)
    on_test = held_out_curve(made, scores_LTN, sizes)
    targets = [point.faithfulness().estimate - 1e-6 for point in (*on_train, *on_test)]
    found = [size_on_training(made, scores_LTN, sizes, target) for target in targets]
    assert found == [smallest_size(on_train, target) for target in targets]
    assert found != [smallest_size(on_test, target) for target in targets]


def run_in(folder, config):
    with start_run(folder, config) as run:
        metrics = PIPELINE.run(config, ModelConfig("random:llama"), run)
        run.metrics(metrics)
    return metrics


def test_pipeline_on_a_file_of_pairs_writes_what_it_says(pairs, tmp_path, monkeypatch):
    config = CircuitTracingConfig(tasks=[str(pairs)], **CONFIG)
    metrics = run_in(tmp_path / "run", config)
    for work in ("mean_scores", "conservation_error", "trace_problem", "edge_scores", "held_out_edge_curve"):
        monkeypatch.setattr(pipeline_stages, work, lambda *args, **options: pytest.fail("was done before"))
    assert run_in(tmp_path / "run", config) == metrics  # from the files of the first
    assert metrics["conservation_error"] < 1e-4
    for estimator in ("relp", "atp", "random"):
        curve = metrics["faithfulness"]["letters"][estimator]
        assert list(curve) == ["5", "50"]
        assert all(math.isfinite(value) for value in curve.values())
        assert list(metrics["completeness"]["letters"][estimator]) == ["5", "50"]
    assert metrics["faithfulness_5"]["letters"] == metrics["faithfulness"]["letters"]["relp"]["5"]
    for found in metrics["areas"]["letters"].values():
        assert list(found) == ["cpr", "cmd", "cpr_log", "cmd_log"]
        assert all(low <= area <= high for area, low, high in found.values())
    always = metrics["always_on"]["letters"]
    assert 0 <= always["share"] <= 1
    assert "Always-on neurons" in (tmp_path / "run" / "report.html").read_text()
    smallest = metrics["smallest"]["letters"]
    if smallest["neurons"] is not None:  # the test value at a size that training pairs chose
        size = str(smallest["neurons"])
        assert smallest["faithfulness"] == metrics["faithfulness"]["letters"]["relp"][size]
    low, high = metrics["completeness_5_ci"]["letters"]
    assert low <= metrics["completeness_5"]["letters"] <= high
    for estimator in ("relp", "magnitude", "random"):
        assert list(metrics["edge_curve"]["letters"]["faithfulness"][estimator]) == ["2", "4"]
    assert (
        metrics["edge_faithfulness"]["letters"]
        == metrics["edge_curve"]["letters"]["faithfulness"]["relp"]["4"]
    )
    (folder,) = (tmp_path / "run").glob("graph_letters-*")
    graph = load_graph(folder)
    assert metrics["edges"]["letters"] == graph.n_edges == 60
    assert metrics["edge_closure_error"]["letters"] < 1e-4
    assert 0 < metrics["mass_kept"]["letters"]["nodes"] < 1
    assert metrics["ablation"]["letters"]["examples"][0]["answer"] == "x"
    assert metrics["graph_prompt"]["letters"] == {
        "prompt": graph.header.prompt,
        "answered_rightly": graph.header.target_values[0] > 0,
    }
    assert (folder / "index.html").exists()
    assert f"{folder.name}/index.html" in (tmp_path / "run" / "report.html").read_text()


def test_concepts_on_a_file_of_pairs(pairs, tmp_path, monkeypatch):
    limits = {"max_nodes": 20, "max_edges": 40, "ablate": 5, "sizes": [5], "estimators": ["relp"]}
    config = CircuitTracingConfig(
        tasks=[str(pairs)],
        train_pairs=10,
        test_pairs=6,
        supernodes=[2, 3],
        hypotheses=50,
        steer=[0.0],
        **limits,
    )
    metrics = run_in(tmp_path / "run", config)
    for work in ("profile", "score_hypotheses"):
        monkeypatch.setattr(pipeline_concepts, work, lambda *args, **options: pytest.fail("was done before"))
    assert run_in(tmp_path / "run", config) == metrics  # from the files of the first
    (folder,) = (tmp_path / "run").glob("graph_letters-*")
    content = read_supernodes(folder / "supernodes.json")
    assert content.number == len(content.supernodes) == metrics["supernodes"]["letters"]["number"]
    assert {layer for one in content.supernodes for layer, *_ in one.nodes} <= {0, 1, 2}
    assert 0 < metrics["supernodes"]["letters"]["coverage"] <= 1
    assert open_folder(folder).supernodes == content
    edited = Supernodes(content.supernodes[:1])
    write_supernodes(folder / "supernodes.json", edited)
    run_in(tmp_path / "run", config)
    assert read_supernodes(folder / "supernodes.json") == edited  # what was saved on the page stays
    assert open_folder(folder).effects
    assert metrics["hypotheses"]["letters"] == {"selected": 0, "hold": 0}  # every row is a class of its own
    assert [point.nodes for point in metrics["steering"]["letters"]] == [
        "chosen",
        "random",
        "strength-matched",
    ]
    assert "supernodes from 10 training prompts" in (tmp_path / "run" / "report.html").read_text()


def test_supernodes_are_at_least_two():
    with pytest.raises(ValueError, match="supernodes"):
        CircuitTracingConfig(supernodes=[1])


def test_areas_are_those_of_the_curve_of_test_pairs(pairs):
    model = load(ModelConfig("random:llama"))
    halves = draw(model, find_task(str(pairs)), {"train": 8, "test": 6}).parts
    study = make_study(model, "letters", halves["train"], halves["test"])
    scores = {"relp": mean_scores(pose_pairs(study, study.train), "relp")}
    total = scores["relp"].numel()
    config = CircuitTracingConfig(tasks=[str(pairs)], estimators=["relp"], proportions=[0.5, 0.1, 1.0])
    found = pipeline._area_figures(study, scores, config)["areas"]["relp"]
    points = held_out_curve(study, scores["relp"], [round(total / 10), total // 2, total])
    low, middle, high = (point.faithfulness().estimate for point in points)
    shares = (round(total / 10) / total, 0.5, 1.0)
    widths = [after - before for before, after in pairwise(shares)]
    assert found["cpr"][0] == pytest.approx(widths[0] * (low + middle) / 2 + widths[1] * (middle + high) / 2)
    assert high == pytest.approx(1.0)


@pytest.mark.parametrize("proportions", [[0.5], [0.0, 1.0], [0.1, 2.0]])
def test_proportions_are_shares(proportions):
    with pytest.raises(ValueError, match="proportions"):
        CircuitTracingConfig(proportions=proportions)


def test_a_resumed_run_whose_pairs_changed_is_done_anew(pairs, tmp_path):
    config = CircuitTracingConfig(tasks=[str(pairs)], **CONFIG)
    before = run_in(tmp_path / "run", config)
    write_pairs(pairs, lambda prompt: ("z", "w"))
    after = run_in(tmp_path / "run", config)
    assert after == run_in(tmp_path / "fresh", config)
    assert after["faithfulness"] != before["faithfulness"]
    (folder,) = (tmp_path / "fresh").glob("graph_letters-*")
    assert load_graph(tmp_path / "run" / folder.name).header.targets == ["z over w"]


def test_edges_are_made_anew_where_other_training_pairs_choose_the_neurons(pairs, tmp_path):
    """Also where the pairs that rank and judge edges, the first ones, are the same."""
    model, config = load(ModelConfig("random:llama")), CircuitTracingConfig(tasks=[str(pairs)], **CONFIG)
    halves = draw(model, find_task(str(pairs)), {"train": 8, "test": 6}).parts
    with start_run(tmp_path / "run", config) as run:
        for count in (8, config.edge_pairs):
            study = make_study(model, "letters", halves["train"][:count], halves["test"])
            pipeline_stages.edge_stage(
                study, mean_scores(pose_pairs(study, study.train), "relp"), config, run
            )
    for made in ("edges_letters", *(f"edge_curve_letters_{name}" for name in config.edge_estimators)):
        assert len(list((tmp_path / "run").glob(f"{made}-*"))) == 2


def test_no_prompt_answered_rightly_is_said(tmp_path):
    model = load(ModelConfig("random:llama"))
    x, y = (model.tokenizer.encode(word, add_special_tokens=False)[0] for word in "xy")

    def worse_first(prompt):
        with torch.no_grad():
            logits_V = model(model.encode([prompt]))[0, -1]
        return ("y", "x") if logits_V[x] > logits_V[y] else ("x", "y")

    path = write_pairs(tmp_path / "wrong.jsonl", worse_first)
    metrics = run_in(tmp_path / "run", CircuitTracingConfig(tasks=[str(path)], **CONFIG))
    assert metrics["accuracy"]["wrong"] == 0
    assert metrics["graph_prompt"]["wrong"]["answered_rightly"] is False
    assert "answers none rightly" in (tmp_path / "run" / "report.html").read_text()


def test_settings_are_checked_before_any_work():
    with pytest.raises(ValueError, match="relp"):
        CircuitTracingConfig(estimators=["atp"])
    with pytest.raises(ValueError, match="shap"):
        CircuitTracingConfig(estimators=["relp", "shap"])
    with pytest.raises(ValueError, match="tasks"):
        CircuitTracingConfig(tasks=[])


@pytest.mark.parametrize("sizes", [[0, 5], [5, 5]])
def test_edge_sizes_are_different_positive_numbers(sizes):
    with pytest.raises(ValueError, match="edge_sizes"):
        CircuitTracingConfig(edge_sizes=sizes)


@pytest.mark.parametrize("sizes", [[], [0, 5], [5, 5]])
def test_sizes_are_different_positive_numbers(sizes):
    with pytest.raises(ValueError, match="sizes"):
        CircuitTracingConfig(sizes=sizes)


@pytest.mark.parametrize(
    "name", ["train_pairs", "test_pairs", "max_nodes", "max_edges", "ablate", "edge_pairs"]
)
def test_counts_are_positive(name):
    with pytest.raises(ValueError, match=name):
        CircuitTracingConfig(**{name: 0})


@pytest.mark.parametrize(
    "tasks", [["nounpp", "mine/nounpp.jsonl"], ["a/pairs.jsonl", "b/pairs.jsonl"], ["rc", "rc"]]
)
def test_tasks_of_one_name_are_refused_before_any_work(tasks):
    with pytest.raises(TaskError, match="one name"):
        CircuitTracingConfig(tasks=tasks)
    CircuitTracingConfig(tasks=["nounpp", "mine/nounpp.v1.jsonl", "mine/nounpp.v2.jsonl"])
