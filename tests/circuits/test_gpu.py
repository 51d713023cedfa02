"""The user's path on a CUDA device: graph, effects, page and edges of a pipeline end on the device they began on."""

import json

import pytest
import torch

from circuits.cli import main
from circuits.pipeline import PIPELINE, CircuitTracingConfig
from shared.models import ModelConfig
from shared.runs import start_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "qwen2_moe"])
def test_trace_and_export(family, tmp_path):
    out = tmp_path / "graph"
    options = ["--model", f"random:{family}", "--device", "cuda", "--max-nodes", "20"]
    assert main(["trace", *options, "--prompt", "abc", "--out", str(out)]) == 0
    assert json.loads((out / "effects.json").read_text())["effects"]
    mib = ["--to", "mib", "--device", "cuda", "--out", str(tmp_path / "mib.json")]
    assert main(["export", str(out), *mib]) == 0


def test_the_pipeline_with_edges(tmp_path):
    config = CircuitTracingConfig(
        tasks=["nounpp"], train_pairs=6, test_pairs=6, sizes=[20], ablate=10, edge_sizes=[5], edge_pairs=3,
        max_nodes=20, supernodes=[2], hypotheses=20, steer=[0.0], min_accuracy=0.0,
    )  # fmt: skip
    with start_run(tmp_path / "run", config) as run:
        metrics = PIPELINE.run(config, ModelConfig("tinyworld", device="cuda"), run)
    assert "nounpp" in metrics["edge_faithfulness"]
