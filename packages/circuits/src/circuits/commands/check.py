"""`circuits check`: is the frozen network of this model exact, and how far does relevance miss the metric?"""

import argparse
from argparse import Namespace

from circuits.commands.trace import add_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "model", metavar="MODEL", help="tinyworld, random:FAMILY, a folder, or a Hugging Face id"
    )
    add_model(parser, name=False)


def main(arguments: Namespace) -> int:
    """Print family, precision and conservation error; a model that is not reproduced is refused by component."""
    from circuits.selfcheck import check
    from shared.models import ModelConfig, load

    found = check(load(ModelConfig(arguments.model, dtype=arguments.dtype, device=arguments.device)))
    print(
        f"{arguments.model}: {found.family} in {found.dtype}; every component reproduced; relevance conserved to "
        f"{found.conservation_error:.1e} (allowed {found.allowed:.0e})"
    )
    return 0
