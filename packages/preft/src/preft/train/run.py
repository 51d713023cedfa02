"""One adapter trained into a run folder: the work behind `preft train`, and behind every user of `preft train-many`.

    adapter/             the adapter, to be served
    metrics.jsonl        loss, gradient norm and learning rate of every step; metrics.json, report.html: the result
    checkpoints/         where training goes on after a kill (with `save_every`)
    manifest.json        settings, versions, model and data

The same call on the same folder keeps a finished adapter and goes on with a half-trained one. Of several processes the
first one decides which, and writes.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from preft.adapters import AdapterConfig, AdapterError
from preft.evaluate import heldout_loss
from preft.formats import load_adapter, save_adapter
from preft.train.config import TrainConfig
from preft.train.sft import Trained, computation, train_adapter
from preft.train.sharding import is_sharded
from shared.models import Model
from shared.plots import subplots
from shared.runs import Run, start_run
from shared.serialize import plain, read_json, remove
from shared.tokens import Message

Chats = Sequence[Sequence[Message]]


@dataclass(frozen=True)
class Settings:
    """What is trained, beside the model's weights: adapter, schedule, the data by name, size and content, and how the
    model computes (`preft.train.sft.computation`)."""

    adapter: AdapterConfig
    train: TrainConfig
    data: str
    chats: int
    heldout: int
    content: str
    computation: dict[str, str]


def train_into(
    folder: Path,
    model: Model,
    chats: Chats,
    heldout: Chats,
    adapter_config: AdapterConfig,
    config: TrainConfig,
    data: str = "",
) -> dict[str, Any] | None:
    """Train an adapter into a run folder, or finish what a former call began; returns the figures of metrics.json.

    chats, steps, train_loss (mean of the last five steps), heldout_loss and base_loss (nats a response token, None
    without held-out chats), adapter (its folder). Every process of a distributed run calls it; the first one writes,
    the others return None. AdapterError for held-out chats under FSDP: these figures need the whole model.
    """
    if heldout and is_sharded():
        raise AdapterError(
            "sharded training (FSDP) leaves no whole model to compute the held-out loss on: train without held-out "
            "chats and measure the saved adapter with preft.heldout_loss, or train with DDP"
        )
    content = hashlib.sha256(json.dumps(plain([chats, heldout])).encode()).hexdigest()[:16]
    settings = Settings(
        adapter_config, config, data, len(chats), len(heldout), content, computation(model.hf)
    )

    def train(run: Run | None) -> Trained:
        return train_adapter(
            model.hf,
            model.tokenizer,
            chats,
            adapter_config,
            config,
            (lambda step, figures: run.log(step, **figures)) if run else None,
            heldout=heldout,
            folder=folder / "checkpoints" if config.save_every else None,
            fingerprint=model.fingerprint,
        )

    if os.environ.get("RANK", "0") != "0":
        if not _agreed(False, model):
            train(None)
        return None
    with start_run(folder, settings, config.seed) as run:
        run.use_model(model)
        stage = run.stage("adapter")
        if not _agreed(stage.done, model):
            adapter, losses = train(run)
            run.json_stage("losses.json", lambda: losses)
            with stage as partial:
                save_adapter(adapter, partial, model.config.name, model.fingerprint)
            remove(folder / "checkpoints")
        losses = read_json(run.path("losses.json"))
        figures = run.json_stage("figures.json", lambda: _figures(model, heldout, stage.path, losses))
        figures |= {"chats": len(chats), "adapter": str(stage.path)}
        run.metrics(figures)
        _report(run, losses, config)
    return figures


def _agreed(done: bool, model: Model) -> bool:
    """What the first process says, on all processes of a distributed run: they train together or not at all."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return done
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=model.device.type == "cpu")  # opens the process group that the Trainer goes on with
    [agreed] = broadcast_object_list([done])
    return bool(agreed)


def _figures(model: Model, heldout: Chats, folder: Path, losses: list[float]) -> dict[str, Any]:
    """Train loss, and held-out loss of the saved adapter and of the base model."""
    figures = {"steps": len(losses), "train_loss": mean(losses[-5:]), "heldout_loss": None, "base_loss": None}
    if not heldout:
        return figures
    adapter = load_adapter(folder, model.hf, model.fingerprint)
    return figures | {
        name: heldout_loss(model.hf, model.tokenizer, which, heldout)
        for name, which in (("heldout_loss", adapter), ("base_loss", None))
    }


def _report(run: Run, losses: list[float], config: TrainConfig) -> None:
    figure, axis = subplots(1, 1, 6.0, 2.6)
    axis.plot(range(1, len(losses) + 1), losses)
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats a response token)")
    run.report.figure(figure, f"Training loss, {config.batch_size} rows a step")
