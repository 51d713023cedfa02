"""The `assumptions` command: one subcommand a task, each a module with `add_arguments(parser)` and `main(arguments)`.

A `UserError` ends the command with one line on stderr and status 2; anything else is a defect and keeps its traceback.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from shared.errors import UserError

# Name of the subcommand -> (module that implements it, one line for the help). Imported when it is asked for.
COMMANDS: dict[str, tuple[str, str]] = {
    "data": ("assumptions.corpora.command", "list the public data sets, turn one into a file of messages"),
    "elicit": ("assumptions.elicit_command", "ask a model what it assumes about the writers of messages"),
    "words": ("assumptions.words.command", "shares, contrast and clusters of open-ended answers on a page"),
    "monitor": (
        "assumptions.monitor.command",
        "talk with a model on a local page, see what it assumes, steer it",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser(argv[0] if argv else "").parse_args(argv)
    if not hasattr(arguments, "main"):
        _parser("").print_help()
        return 2
    try:
        return int(arguments.main(arguments) or 0)
    except UserError as error:
        print(f"assumptions: {error}", file=sys.stderr)
        return 2


def _parser(chosen: str) -> argparse.ArgumentParser:
    """The parser of all commands; only the chosen one's module is imported."""
    parser = argparse.ArgumentParser(
        "assumptions", description="See what a model assumes about its user, and steer it."
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == chosen:
            module = import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    return parser
