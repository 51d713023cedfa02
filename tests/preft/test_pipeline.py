"""The adapter_serving pipeline end to end on a random model: figures, files, page, and a second run that resumes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from preft.adapters import AdapterConfig, AdapterError
from preft.pipeline import KINDS, PIPELINE, AdapterServingConfig, copies
from preft.throughput import ThroughputConfig
from preft.train import TrainConfig
from shared.history import History
from shared.models import ModelConfig
from shared.runs import start_run
from shared.tokens import Phase

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.slow]
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
    stamps = stamps_of(folder)
    assert len(stamps) == 2 * len(KINDS) + 1
    with start_run(folder, CONFIG) as run:
        again = PIPELINE.run(CONFIG, ModelConfig("random:llama"), run)
    assert stamps_of(folder) == stamps
    assert again["heldout_loss"] == losses
    assert again["match_rate"] == 1.0


def stamps_of(folder: Path) -> dict[Path, int]:
    """When the adapters and their losses were written."""
    files = [*folder.glob("adapters/*/adapter_model.safetensors"), folder / "heldout_loss.json"]
    return {file: file.stat().st_mtime_ns for file in files}


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("count", [1, 3, 1500])
def test_no_two_adapters_of_the_engine_share_an_id(count: int) -> None:
    folders = {f"user{i}-{kind}": Path(f"/{i}/{kind}") for i in range(5) for kind in KINDS}
    found = [lora for kind in KINDS for lora in copies(folders, kind, count)]
    ids = [*range(1, len(folders) + 1), *(lora.lora_int_id for lora in found)]
    assert len(set(ids)) == len(ids) == len(folders) + len(KINDS) * count
    assert all(lora.lora_path.endswith(lora.lora_name.partition("-")[0]) for lora in found)


@pytest.mark.parametrize("name", ["lora", "reft"])
def test_a_history_that_is_not_served_is_refused_before_training(name: str) -> None:
    with pytest.raises(AdapterError, match=rf"{name}\.history: 'sticky' is trained but not served here"):
        replace(CONFIG, **{name: replace(getattr(CONFIG, name), history=History.STICKY)})


def test_lora_is_the_all_token_twin_of_lora_p() -> None:
    config = replace(CONFIG, lora=AdapterConfig(rank=6, target_modules=("q_proj",)))
    assert config.adapter("lora") == replace(config.adapter("lora_p"), phase=Phase.ALL)
