"""`circuits export`: one graph in the format of another program."""

import argparse
from argparse import Namespace
from pathlib import Path

from circuits.formats import FORMATS
from shared.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("graph", type=Path, metavar="GRAPH", help="a folder that `circuits trace` or `make circuits` wrote")
    add("--to", required=True, choices=sorted(FORMATS), help="the format")
    add("--out", type=Path, required=True, metavar="FILE", help="the file to write (csv: a folder)")


def main(arguments: Namespace) -> int:
    """Write the file and print its path."""
    from circuits.folder import open_folder

    if arguments.out.is_dir() and arguments.to != "csv":
        raise UserError(f"--out {arguments.out} is a folder; give a file")
    content = open_folder(arguments.graph)
    if arguments.to == "neuronpedia":  # the one format that has supernodes
        print(content.write_neuronpedia(arguments.out))
    else:
        print(FORMATS[arguments.to](content.graph, arguments.out))
    return 0
