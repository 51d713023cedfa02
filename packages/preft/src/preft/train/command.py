"""`preft train`: one adapter from a file of chats, a Hugging Face dataset or a TinyWorld user.

    preft train --model tinyworld --data rows.jsonl --out runs/mine --rank 16 --steps 200

Several processes: `accelerate launch --config_file conf/accelerate/ddp.yaml -m preft train ...`.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from preft.adapters import AdapterConfig, AdapterError
from preft.options import add_options, from_options
from preft.train.config import TrainConfig
from preft.train.data import SOURCES, TINYWORLD, DataRow, read_data
from shared.commands import output_folder
from shared.models import ModelConfig
from shared.tokens import Message

# Options of ModelConfig that training has no use for, or has under another name.
SKIPPED = ("name", "seed", "remote", "device_map")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `preft train`."""
    parser.add_argument("--data", required=True, help=f"the chats: {SOURCES}")
    parser.add_argument(
        "--heldout", help="held-out chats, same kinds of source (a TinyWorld user has its own)"
    )
    parser.add_argument("--split", default="train", help="part of a dataset that has parts (default train)")
    add_shared_arguments(parser)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """What `preft train` and `preft train-many` both take."""
    parser.add_argument(
        "--model", required=True, help="tinyworld, random:FAMILY, a folder or a Hugging Face id"
    )
    parser.add_argument(
        "--out", required=True, type=output_folder, help="folder of the run; the same again resumes it"
    )
    parser.add_argument(
        "--columns", default="", metavar="messages=NAME", help="names of the columns, where they differ"
    )
    parser.add_argument("--heldout-fraction", type=float, default=0.0, help="share of rows that is held out")
    add_options(parser, AdapterConfig)
    add_options(parser, TrainConfig)
    add_options(parser, ModelConfig, skip=SKIPPED)


def main(arguments: argparse.Namespace) -> int:
    """Read and check the data, train, and print the figures."""
    adapter, train = from_options(AdapterConfig, arguments), from_options(TrainConfig, arguments)
    columns = parse_columns(arguments.columns)
    source = heldout_source(arguments)
    rows = read_data(arguments.data, columns, arguments.split)
    if source:
        held = read_data(source, columns, "test")
    else:
        rows, held = hold_out(rows, arguments.heldout_fraction)

    from preft.train.run import train_into
    from shared.models import load

    model = load(model_config(arguments))
    figures = train_into(arguments.out, model, chats(rows), chats(held), adapter, train, arguments.data)
    if figures:
        print(" ".join(f"{name}={_short(value)}" for name, value in figures.items() if value is not None))
    return 0


def model_config(arguments: argparse.Namespace) -> ModelConfig:
    """The model to load, on this process's GPU where several processes train."""
    # `--seed` is the training's: random weights (random:FAMILY) stay the same from one seed to the next.
    config = from_options(ModelConfig, arguments, name=arguments.model, seed=ModelConfig.seed)
    if config.device == "auto" and "LOCAL_RANK" in os.environ:
        import torch

        if torch.cuda.is_available():
            return replace(config, device=f"cuda:{os.environ['LOCAL_RANK']}")
    return config


def parse_columns(text: str) -> Mapping[str, str]:
    """`messages=conversations` as a mapping of fields to columns."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if any(not column for _, _, column in pairs):
        raise AdapterError(f"--columns takes FIELD=COLUMN, separated by commas, not {text!r}")
    return {field: column for field, _, column in pairs}


def heldout_source(arguments: argparse.Namespace) -> str | None:
    """Where the held-out chats come from, or None: from the data itself, by `--heldout-fraction`.

    AdapterError where the fraction is none, or would be ignored.
    """
    fraction = arguments.heldout_fraction
    if not 0 <= fraction < 1:
        raise AdapterError(f"--heldout-fraction must be at least 0 and below 1, not {fraction}")
    source: str | None = arguments.heldout
    if source is None and arguments.data.startswith(TINYWORLD):
        source = arguments.data
    if source and fraction:
        raise AdapterError(f"--heldout-fraction: the held-out chats are those of {source}; leave it out")
    return source


def hold_out(rows: list[DataRow], fraction: float) -> tuple[list[DataRow], list[DataRow]]:
    """Rows to train on and rows to hold out, decided row by row by their content."""
    from shared.data import split_rows

    parts = split_rows(rows, {"train": 1 - fraction, "test": fraction})
    if not parts["train"]:
        raise AdapterError(f"--heldout-fraction {fraction} leaves no row of {len(rows)} to train on")
    return parts["train"], parts["test"]


def chats(rows: list[DataRow]) -> list[list[Message]]:
    """The rows' chats."""
    return [row.chat() for row in rows]


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
