"""`circuits plot`: the curves of a run of circuit_tracing, or a metric against the setting that a sweep varies."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from shared.commands import output_file
from shared.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="a run (with metrics.json), or the folder of a sweep")
    add("--metric", help="of a sweep: dotted name, such as faithfulness.nounpp.relp.200")
    add("--out", type=output_file, required=True, metavar="FILE", help=f"the picture: {', '.join(SUFFIXES)}")


def main(arguments: Namespace) -> int:
    """Draw, write, print the path."""
    if arguments.out.suffix not in SUFFIXES:
        raise UserError(f"--out {arguments.out}: pictures end in {', '.join(SUFFIXES)}")
    figure = _figure(arguments.folder, arguments.metric)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(arguments.out)
    return 0


def _figure(folder: Path, metric: str | None) -> "Figure":
    from circuits.chart import draw_metrics, draw_sweep
    from shared.collect import collect
    from shared.serialize import read_json

    path = folder / "metrics.json"
    if metric is None and not path.is_file():
        raise UserError(f"{folder} is no finished run (no metrics.json); of a sweep, say which --metric")
    return draw_metrics(read_json(path)) if metric is None else draw_sweep(collect(folder), metric)
