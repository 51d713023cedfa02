"""`circuits export`: one graph in the format of another program."""

import argparse
from argparse import Namespace
from pathlib import Path

from circuits.commands.trace import add_model
from circuits.formats import FORMATS
from shared.errors import UserError

MIB = "mib"  # of whole components, so it needs the model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("graph", type=Path, metavar="GRAPH", help="a folder that `circuits trace` or `make circuits` wrote")
    add("--to", required=True, choices=sorted([*FORMATS, MIB]), help="the format")
    add("--out", type=Path, required=True, metavar="FILE", help="the file to write (csv: a folder)")
    add("--edges", type=int, default=200, help="of mib: most edges in the circuit (default: %(default)s)")
    add_model(parser, default=None)


def main(arguments: Namespace) -> int:
    """Write the file and print its path."""
    from circuits.folder import open_folder

    if arguments.out.is_dir() and arguments.to != "csv":
        raise UserError(f"--out {arguments.out} is a folder; give a file")
    if arguments.edges < 1:
        raise UserError(f"--edges must be at least 1, got {arguments.edges}")
    content = open_folder(arguments.graph)
    if arguments.to == "neuronpedia":  # the one format that has supernodes
        print(content.write_neuronpedia(arguments.out))
    elif arguments.to == MIB:
        from circuits.components import write_mib
        from shared.models import ModelConfig, load

        name = arguments.model or content.graph.header.model
        model = load(ModelConfig(name, dtype=arguments.dtype, device=arguments.device))
        print(write_mib(model, content.graph, arguments.out, arguments.edges))
    else:
        print(FORMATS[arguments.to](content.graph, arguments.out))
    return 0
