"""`preft train-many`: one adapter for every user, in parallel processes, resumable.

    preft train-many --model tinyworld --data users/ --out adapters --jobs 2

Every user has a run folder (`preft.train.run`): OUT/USER/adapter is what is served. A finished user is skipped, a
half-trained one goes on from its last checkpoint, a failed one (for its rows, too) stops nobody and is named at the end
(exit status 1).
OUT/users.json lists all.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from preft.adapters import AdapterConfig, AdapterError
from preft.options import from_options
from preft.train.command import (
    add_shared_arguments,
    chats,
    heldout_source,
    hold_out,
    model_config,
    parse_columns,
)
from preft.train.config import TrainConfig
from preft.train.data import DataRow, Reader, readers
from preft.train.pool import Outcome, Place, run_tasks
from shared.errors import UserError
from shared.models import ModelConfig
from shared.serialize import write_json
from shared.tokens import Message

COLUMNS = ("user", "chats", "steps", "train_loss", "heldout_loss", "base_loss", "adapter", "error")


class UserTask(NamedTuple):
    """One user's chats and run folder."""

    name: str
    train: list[list[Message]]
    heldout: list[list[Message]]
    folder: Path


@dataclass(frozen=True)
class Trainer:
    """Loads the model once and trains one user after the other."""

    model: ModelConfig
    adapter: AdapterConfig
    train: TrainConfig

    def __call__(self) -> Callable[[UserTask], dict[str, Any] | None]:
        """Load the model; returns the function that trains a user."""
        from preft.train.run import train_into
        from shared.models import load

        model = load(self.model)

        def train(user: UserTask) -> dict[str, Any] | None:
            return train_into(
                user.folder, model, user.train, user.heldout, self.adapter, self.train, user.name
            )

        return train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `preft train-many`."""
    parser.add_argument(
        "--data",
        required=True,
        help="a folder with one USER.jsonl a user, one source with a column user, or tinyworld:COUNT",
    )
    parser.add_argument("--heldout", help="held-out chats in the same form")
    parser.add_argument("--jobs", type=int, help="processes (default: one a device)")
    parser.add_argument(
        "--devices", default="", help="GPUs to use in turn, as 0,1,2 (default: all; none: cpu)"
    )
    add_shared_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Train all users; returns 1 where one failed."""
    train = from_options(TrainConfig, arguments)
    if not hasattr(arguments, "save_every"):
        train = replace(train, save_every=max(1, train.steps // 4))
    trainer = Trainer(model_config(arguments), from_options(AdapterConfig, arguments), train)
    tasks = user_tasks(arguments)
    rows: dict[str, dict[str, Any]] = {}
    faults = [task for task in tasks.values() if isinstance(task, Outcome)]
    sound = {name: task for name, task in tasks.items() if isinstance(task, UserTask)}
    for outcome in chain(faults, run_tasks(sound, trainer, places(arguments))):
        rows[outcome.name] = _row(outcome)
        print(_line(rows[outcome.name], f"{len(rows)}/{len(tasks)}"), flush=True)
        write_json(arguments.out / "users.json", [rows[name] for name in tasks if name in rows])
    failed = [name for name in tasks if rows[name]["error"]]
    print(f"{len(tasks) - len(failed)} of {len(tasks)} users trained; {arguments.out / 'users.json'}")
    for name in failed:
        print(f"failed: {name}: {rows[name]['error']}")
    return 1 if failed else 0


def user_tasks(arguments: argparse.Namespace) -> dict[str, UserTask | Outcome]:
    """What is to be trained, by user, before any model is loaded: of a user whose rows will not do, the fault.

    DataError or AdapterError for what concerns all.
    """
    columns = parse_columns(arguments.columns)
    source = heldout_source(arguments)
    users = readers(arguments.data, columns)
    held = readers(source, columns, "test") if source else {}
    if strangers := sorted(set(held) - set(users)):
        raise AdapterError(f"--heldout has users that --data has not: {', '.join(strangers[:8])}")
    tasks: dict[str, UserTask | Outcome] = {}
    for name, read in users.items():
        try:
            kept, out = _parts(read, held.get(name), arguments.heldout_fraction)
            tasks[name] = UserTask(name, chats(kept), chats(out), arguments.out / name)
        except UserError as error:
            tasks[name] = Outcome(name, None, f"{type(error).__name__}: {error}")
    return tasks


def _parts(read: Reader, held: Reader | None, fraction: float) -> tuple[list[DataRow], list[DataRow]]:
    """A user's rows to train on and to hold out."""
    return (read(), held()) if held else hold_out(read(), fraction)


def places(arguments: argparse.Namespace) -> list[Place]:
    """Where the processes run: GPUs in turn, else the processor's cores divided."""
    import torch

    cpu = getattr(arguments, "device", "auto") == "cpu" or not torch.cuda.is_available()
    if cpu and arguments.devices:
        raise AdapterError(f"--devices {arguments.devices}: no GPU is in use here")
    devices = arguments.devices.split(",") if arguments.devices else _visible(torch.cuda.device_count())
    jobs = arguments.jobs or (1 if cpu else len(devices))
    if jobs < 1:
        raise AdapterError(f"--jobs must be at least 1, not {jobs}")
    if cpu:
        return [Place({}, max(1, (os.cpu_count() or 1) // jobs))] * jobs
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return [Place({"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]}, threads) for i in range(jobs)]


def _visible(count: int) -> list[str]:
    """Names of the GPUs this process sees, as its children must name them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(i) for i in range(count)]


def _row(outcome: Outcome) -> dict[str, Any]:
    figures = (outcome.result or {}) | {"user": outcome.name, "error": outcome.error}
    return {name: figures.get(name) for name in COLUMNS}


def _line(row: dict[str, Any], count: str) -> str:
    """One user's figures, aligned with the other users'."""
    if row["error"]:
        return f"{count:>9}  {row['user']:<16} failed: {row['error']}"
    losses = (f"{row[name]:7.4f}" if row[name] is not None else "      -" for name in COLUMNS[3:6])
    return f"{count:>9}  {row['user']:<16} {row['chats']:>6} chats {row['steps']:>6} steps  loss {' '.join(losses)}"
