"""Supervised finetuning of one adapter: frozen base model, adapter on its phase, loss on the responses.

AdamW with linear warm-up and linear decay on the transformers Trainer (`preft.train.trainer`); after every step R is
retracted to orthonormal rows (ReFT). The same seed gives the same batches and the same start.

A folder makes training resumable: it keeps checkpoints and `training.json`, which says what is trained. A later call
with the same model, rows and settings goes on from the last checkpoint; any other says what differs, removes the
checkpoints and begins anew. A folder with checkpoints but without that file is refused: they are another program's.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from preft.adapters import Adapter, AdapterConfig, AdapterError
from preft.train.config import TrainConfig
from preft.train.module import AdaptedModel
from preft.train.rows import Layout, Parts, padding_id, schedule, training_rows
from preft.train.trainer import OnLog, adapter_trainer, arguments, last_checkpoint
from shared import fingerprint as fingerprints
from shared.generation.process_state import random_state_kept
from shared.serialize import plain, read_json, remove, write_json
from shared.tokens import Message, TrainingRow

IDENTITY = "training.json"


class Trained(NamedTuple):
    """A trained adapter and its loss per response token at every step (nats)."""

    adapter: Adapter
    losses: list[float]


def train_adapter(
    hf: Any,
    tokenizer: Any,
    chats: Sequence[Sequence[Message]],
    adapter_config: AdapterConfig,
    config: TrainConfig | None = None,
    on_log: OnLog | None = None,
    *,
    heldout: Sequence[Sequence[Message]] = (),
    folder: Path | str | None = None,
    fingerprint: str | None = None,
) -> Trained:
    """Train one adapter on chats that end with an assistant message; the model is left as it was.

    `on_log(step, figures)` is called after every step (loss, grad_norm, learning_rate) and evaluation (heldout_loss, of
    the `heldout` chats every `eval_every` steps). `folder` keeps checkpoints every `save_every` steps and resumes from
    them. `fingerprint` is the model's, computed from its weights if not given. Under FSDP the model stays sharded.
    AdapterError where the chats hold nothing to learn from, and where the adapter ends with values that are no numbers.
    """
    config = config or TrainConfig()
    rows = training_rows(tokenizer, chats, adapter_config.history)
    if not rows:
        raise AdapterError("there is no assistant message to learn from in the training chats")
    if config.save_every and folder is None:
        raise AdapterError("save_every needs a folder to save to")
    held = training_rows(tokenizer, heldout, adapter_config.history)
    model = AdaptedModel(hf, Adapter.create(hf, adapter_config, config.seed))
    layout = Layout(padding_id(tokenizer), config.packing)
    with ExitStack() as stack:
        stack.enter_context(random_state_kept())
        place = Path(folder or stack.enter_context(TemporaryDirectory()))
        args = arguments(config, place, hf.device.type == "cpu", bool(held))
        _check_device(hf, args)
        if folder is not None:
            with args.main_process_first(local=False):
                if args.process_index == 0:
                    weights = fingerprint or fingerprints.fingerprint(hf)
                    _begin(place, _identity(hf, weights, rows, adapter_config, config))
        parts = args.world_size * config.gradient_accumulation
        trainer = adapter_trainer(
            stack.enter_context(model.held(config.gradient_checkpointing)),
            args,
            config,
            Parts(rows, schedule(rows, config.batch_size, config.steps, config.seed), layout, parts),
            _evaluation(held, layout, config, args.world_size) if held else None,
            on_log,
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(place))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(trainer.adapter.requires_grad_(False), losses)


def _evaluation(rows: Sequence[TrainingRow], layout: Layout, config: TrainConfig, parts: int) -> Parts:
    """Every held-out row once, neighbours in length together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    size = config.batch_size * parts
    return Parts(rows, [order[i : i + size] for i in range(0, len(order), size)], layout, parts)


def _check_device(hf: Any, args: Any) -> None:
    """AdapterError where the model is not on the device that the Trainer would move it to."""
    if (hf.device.type, hf.device.index or 0) != (args.device.type, args.device.index or 0):
        raise AdapterError(
            f"the model is on {hf.device}, but this process trains on {args.device}: load the model there, or choose "
            "the device with CUDA_VISIBLE_DEVICES"
        )


def computation(hf: Any) -> dict[str, str]:
    """How a loaded model computes with its weights, whose fingerprint is one for all types and kinds of attention.

    (Quantised weights have a fingerprint of their own.)
    """
    return {"dtype": str(hf.dtype).removeprefix("torch."), "attention": str(hf.config._attn_implementation)}


def _identity(
    hf: Any, weights: str, rows: Sequence[TrainingRow], adapter: AdapterConfig, config: TrainConfig
) -> dict[str, Any]:
    """What determines the trained adapter."""
    digest = hashlib.sha256(json.dumps(plain(list(rows))).encode()).hexdigest()[:16]
    model = {"model": weights, "computation": computation(hf)}
    return model | {"rows": digest, "adapter": plain(adapter), "train": plain(config)}


def _begin(folder: Path, identity: dict[str, Any]) -> None:
    """Keep the folder's checkpoints if they are of the same training, else say what differs and remove them."""
    path, checkpoints = folder / IDENTITY, sorted(folder.glob("checkpoint-*"))
    if checkpoints and not path.exists():
        raise AdapterError(
            f"{folder} holds {checkpoints[0].name}, but no {IDENTITY}: it is not from this kind of training. Name "
            "another folder, or remove the checkpoints"
        )
    former = read_json(path) if path.exists() else {}
    if former == identity:
        return
    if checkpoints:
        other = ", ".join(name for name in identity if former.get(name) != identity[name])
        names = ", ".join(checkpoint.name for checkpoint in checkpoints)
        print(f"{folder}: training begins anew (other {other}); removed: {names}", file=sys.stderr)
    for checkpoint in checkpoints:
        remove(checkpoint)
    write_json(path, identity)
