"""A resumed run keeps the adapters of the same data, settings, seed and model, and trains all others anew."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from preft.adapters import AdapterConfig
from preft.pipeline import KINDS, AdapterServingConfig, train_users, user_data
from preft.train import TrainConfig
from shared.models import Model, ModelConfig, load
from shared.runs import start_run

CONFIG = AdapterServingConfig(
    users=1,
    train_chats=4,
    heldout_chats=1,
    lora=AdapterConfig(rank=2, target_modules=("q_proj",)),
    reft=AdapterConfig("direft", rank=2, layers=(0,)),
    train=TrainConfig(steps=1, batch_size=2),
)


def train(folder: Path, model: Model, config: AdapterServingConfig = CONFIG, seed: int = 0) -> dict[str, int]:
    """Train in a run folder; when each adapter's weights were written, by adapter."""
    with start_run(folder, config, seed) as run:
        run.use_model(model)
        folders = train_users(model, user_data(config, seed), config, run)
    return {name: (path / "adapter_model.safetensors").stat().st_mtime_ns for name, path in folders.items()}


def test_the_same_run_keeps_its_adapters(model: Model, tmp_path: Path) -> None:
    first = train(tmp_path, model)
    assert len(first) == len(KINDS)
    assert train(tmp_path, model) == first


@pytest.mark.parametrize(
    "change",
    [
        lambda config: replace(config, train_chats=5),
        lambda config: replace(config, lora=replace(config.lora, alpha=3.0)),
        lambda config: replace(config, train=replace(config.train, learning_rate=0.5)),
    ],
    ids=["data", "adapter", "training"],
)
def test_other_settings_train_anew(
    model: Model, tmp_path: Path, change: Callable[[AdapterServingConfig], AdapterServingConfig]
) -> None:
    first = train(tmp_path, model)
    again = train(tmp_path, model, change(CONFIG))
    assert first.keys() == again.keys()
    assert all(again[name] > first[name] for name in first)


def test_another_seed_and_another_model_train_anew(model: Model, tmp_path: Path) -> None:
    first = train(tmp_path, model)
    other_seed = train(tmp_path, model, seed=1)  # other users, too
    other_model = train(tmp_path, load(ModelConfig("random:llama", seed=1)), seed=1)
    assert all(other_model[name] > other_seed[name] > first[name] for name in first)
