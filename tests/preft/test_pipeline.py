"""The adapter_serving pipeline end to end on a random model: figures, files, page, and a second run that resumes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from preft.adapters import AdapterConfig
from preft.pipeline import KINDS, PIPELINE, AdapterServingConfig
from preft.throughput import ThroughputConfig
from preft.train import TrainConfig
from shared.models import ModelConfig
from shared.runs import start_run
from shared.tokens import Phase

pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.slow]
CONFIG = AdapterServingConfig(
    users=2,
    train_chats=8,
    heldout_chats=2,
    served_chats=1,
    max_tokens=8,
    lora=AdapterConfig(rank=4),
    reft=AdapterConfig("direft", rank=4),
    train=TrainConfig(steps=2, batch_size=4, learning_rate=0.05),
    throughput=ThroughputConfig(requests=4, adapters=3, prompt_tokens=8, new_tokens=4, repeats=1),
)


def test_the_pipeline_runs_and_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start_run(folder, CONFIG) as run:
        metrics = PIPELINE.run(CONFIG, ModelConfig("random:llama"), run)
        run.metrics(metrics)
    assert metrics["match_rate"] == 1.0
    assert metrics["requests_compared"] == 2 * 1 * 4
    for key in ("heldout_loss", "throughput"):
        assert set(metrics[key]) == {"base", *KINDS}
    assert all(speed > 0 for speed in metrics["throughput"].values())
    losses = metrics["heldout_loss"]
    assert all(losses[kind] < losses["base"] for kind in KINDS)
    served = [json.loads(line) for line in (folder / "served.jsonl").read_text().splitlines()]
    by_kind = {kind: [row["served"] for row in served if row["request"]["kind"] == kind] for kind in KINDS}
    assert all(
        rows != [row["served"] for row in served if row["request"]["kind"] == "base"]
        for rows in by_kind.values()
    )
    page = (folder / "report.html").read_text()
    assert "masked Hugging Face reference" in page
    assert "<svg" in page
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("adapters/*/adapter_model.safetensors")}
    assert len(stamps) == 2 * len(KINDS)
    with start_run(folder, CONFIG) as run:
        users = [stage for stage in run.finished_stages() if stage.startswith("adapters/")]
    assert len(users) == len(stamps)


def test_lora_is_the_all_token_twin_of_lora_p() -> None:
    config = replace(CONFIG, lora=AdapterConfig(rank=6, target_modules=("q_proj",)))
    assert config.adapter("lora") == replace(config.adapter("lora_p"), phase=Phase.ALL)
