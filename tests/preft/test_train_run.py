"""A run folder: what is trained anew, and what cannot be run."""

from dataclasses import replace
from pathlib import Path

import pytest
from preft_cases import chats

from preft.adapters import AdapterConfig, AdapterError
from preft.train import TrainConfig
from preft.train.run import train_into
from shared.models import Model, load

ADAPTER, TRAIN = AdapterConfig(rank=2, target_modules=("q_proj",)), TrainConfig(steps=1, batch_size=2)


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"attn_implementation": "eager"}], ids=str)
def test_another_way_of_computing_trains_anew(model: Model, tmp_path: Path, change: dict[str, str]) -> None:
    """The fingerprint of the weights is the same."""
    other = load(replace(model.config, **change))  # type: ignore[arg-type]
    assert other.fingerprint == model.fingerprint
    weights = tmp_path / "adapter/adapter_model.safetensors"
    stamps = []
    for which in (model, model, other, other):
        train_into(tmp_path, which, chats(4), [], ADAPTER, TRAIN)
        stamps.append(weights.stat().st_mtime_ns)
    assert stamps[0] == stamps[1] < stamps[2] == stamps[3]


def test_heldout_chats_are_refused_where_the_model_will_be_sharded(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(AdapterError, match="leaves no whole model to compute the held-out loss on"):
        train_into(tmp_path / "run", model, chats(4), chats(1), ADAPTER, TRAIN)
    assert not (tmp_path / "run").exists()
