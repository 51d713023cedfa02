"""The pipeline end to end, in process, on a random model and a user's file of pairs."""

import json
import math

import pytest

from circuits.graph import load_graph
from circuits.pipeline import PIPELINE, CircuitTracingConfig
from shared.models import ModelConfig
from shared.runs import start_run

CONFIG = {
    "train_pairs": 8,
    "test_pairs": 6,
    "sizes": [5, 50],
    "max_nodes": 20,
    "max_edges": 60,
    "ablate": 5,
    "examples": 2,
}


@pytest.fixture
def pairs(tmp_path):
    rows = []
    for index, letter in enumerate("abcdefghijklmnop"):
        rows.append({
            "clean_prefix": f"the {letter} is", "patch_prefix": f"the {letter.upper()} is",
            "clean_answer": "x", "patch_answer": "y", "case": str(index),
        })  # fmt: skip
    path = tmp_path / "letters.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_pipeline_on_a_file_of_pairs_writes_what_it_says(pairs, tmp_path):
    config = CircuitTracingConfig(tasks=[str(pairs)], **CONFIG)
    metrics = {}
    for _ in range(2):  # the second time from the files of the first
        with start_run(tmp_path / "run", config) as run:
            metrics = PIPELINE.run(config, ModelConfig("random:llama"), run)
            run.metrics(metrics)
            again, metrics["seen"] = metrics.get("seen"), metrics["faithfulness"]
    assert again is None
    assert metrics["conservation_error"] < 1e-4
    for estimator in ("relp", "atp", "random"):
        curve = metrics["faithfulness"]["letters"][estimator]
        assert list(curve) == ["5", "50"]
        assert all(math.isfinite(value) for value in curve.values())
        assert list(metrics["completeness"]["letters"][estimator]) == ["5", "50"]
    graph = load_graph(tmp_path / "run" / "graph_letters")
    assert metrics["edges"]["letters"] == graph.n_edges == 60
    assert metrics["edge_closure_error"]["letters"] < 1e-4
    assert 0 < metrics["mass_kept"]["letters"]["nodes"] < 1
    assert metrics["ablation"]["letters"]["examples"][0]["answer"] == "x"
    assert (tmp_path / "run" / "graph_letters" / "index.html").exists()
    assert "graph_letters/index.html" in (tmp_path / "run" / "report.html").read_text()


def test_settings_are_checked_before_any_work():
    with pytest.raises(ValueError, match="relp"):
        CircuitTracingConfig(estimators=["atp"])
    with pytest.raises(ValueError, match="shap"):
        CircuitTracingConfig(estimators=["relp", "shap"])
