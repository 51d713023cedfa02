"""`circuits score`: the node scores of many prompts, in one folder that several processes fill together.

Every process takes its share of the batches (`--share 0/2` and `--share 1/2`, or what torchrun and accelerate set), a
batch is one file, and whoever finds the folder complete prints what all prompts have in common.
"""

import argparse
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from circuits.commands.trace import add_model
from shared.commands import output_folder
from shared.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from circuits.batches import PromptScores, Share
    from shared.architecture import Architecture

TABLE = 12  # neurons in the table
LARGE = 0.005  # share of a prompt's absolute effects above which a neuron counts as acting in it


@dataclass(frozen=True)
class PromptRow:
    """One row of a file of prompts."""

    prompt: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add_model(parser)
    add(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="rows (JSONL, JSON, CSV) with a column prompt",
    )
    add(
        "--out",
        type=output_folder,
        required=True,
        metavar="FOLDER",
        help="where the scores go, of all processes",
    )
    add("--estimator", default="relp", help="how nodes are scored (default: %(default)s)")
    add("--top-k", type=int, default=5, help="how many likely tokens are explained (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="prompts at once (default: %(default)s)")
    add("--share", metavar="I/N", help="this is process I of N, from 0 (default: what the launcher says)")


def main(arguments: Namespace) -> int:
    """Score this process's batches; print the strongest neurons where all batches are there."""
    prompts, share = read_prompts(arguments.prompts), parse_share(arguments.share)
    for name in ("top_k", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    from rich.console import Console

    from circuits.attribution import ESTIMATORS, Settings
    from circuits.batches import each_score, missing_batches, score_prompts
    from circuits.metric import top_logits
    from shared.models import ModelConfig, load
    from shared.progress import progress

    if arguments.estimator not in ESTIMATORS:
        raise UserError(f"--estimator is one of {', '.join(ESTIMATORS)}; got {arguments.estimator}")
    model = load(ModelConfig(arguments.model, dtype=arguments.dtype, device=arguments.device))
    folder = score_prompts(
        arguments.out,
        model,
        prompts,
        lambda rows: lambda logits, at: top_logits(logits, at, arguments.top_k),
        f"demeaned logits of the {arguments.top_k} likeliest tokens",
        arguments.estimator,
        batch_size=arguments.batch_size,
        share=share,
        settings=Settings(progress=progress),
    )
    console = Console()
    if missing := missing_batches(folder):
        console.print(f"{len(missing)} batches of other processes are not there yet", highlight=False)
        return 0
    show(each_score(folder), model.architecture, console)
    return 0


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file, none of them empty."""
    from shared.data import read_rows

    prompts = [row.prompt for row in read_rows(path, PromptRow, drop_extra=True)]
    empty = [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]
    if empty or not prompts:
        raise UserError(f"{path}: " + (f"row {empty[0]} has an empty prompt" if empty else "no rows"))
    return prompts


def parse_share(text: str | None) -> "Share":
    """Return the share that I/N names, or that the launcher's environment does."""
    from circuits.batches import Share

    if text is None:
        return Share.from_environment()
    rank, slash, world = text.partition("/")
    if not (slash and rank.isdecimal() and world.isdecimal()):
        raise UserError(f"--share is I/N, for example 0/2 for the first of two processes; got {text!r}")
    return Share(int(rank), int(world))


def show(scores: "Iterable[PromptScores]", architecture: "Architecture", console: "Console") -> None:
    """Print the worst conservation error, and the neurons that act most in all prompts together, beside how often.

    A neuron's share of a prompt is its absolute effect over the sum of all neurons', summed over tokens and targets.
    """
    import torch
    from rich.table import Table

    count, error = 0, 0.0
    total_LN = torch.zeros(architecture.n_layers, architecture.n_neurons, dtype=torch.float64)
    often_LN = torch.zeros_like(total_LN, dtype=torch.long)
    for one in scores:
        size_LN = one.scores_KLTN.abs().sum((0, 2)).double()
        share_LN = size_LN / size_LN.sum().clamp_min(torch.finfo(torch.float64).tiny)
        total_LN += share_LN
        often_LN += share_LN >= LARGE
        count, error = count + 1, max(error, one.conservation_error)
    console.print(f"{count} prompts; relevance conserved to {error:.0e}", highlight=False)
    table = Table("neuron", "mean share", f"prompts above {LARGE:.1%}", box=None, header_style="bold")
    for place in total_LN.flatten().topk(min(TABLE, total_LN.numel())).indices.tolist():
        layer, neuron = divmod(place, architecture.n_neurons)
        name = f"L{layer}/{architecture.neuron_name(layer, neuron)}"
        mean = float(total_LN[layer, neuron]) / count
        table.add_row(name, f"{mean:.2%}", f"{int(often_LN[layer, neuron])} of {count}")
    console.print(table, markup=False, highlight=False)
