"""The `preft` command: one subcommand a task, each a module with `add_arguments(parser)` and `main(arguments)`.

A module that sets a default for `passed_on` gets there the options it does not know; elsewhere they are an error.

A `UserError` ends the command with one line on stderr and status 2; anything else is a defect and keeps its traceback.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from shared.errors import UserError

# Name of the subcommand -> (module that implements it, one line for the help). Imported when it is asked for.
COMMANDS: dict[str, tuple[str, str]] = {
    "adapter": ("preft.adapter_command", "inspect, convert and check adapter folders"),
    "train": ("preft.train.command", "train one adapter on chats"),
    "train-many": ("preft.train.many", "train an adapter for every user of a folder"),
    "serve": ("preft.serve.command", "OpenAI-compatible server; adapters come and go while it serves"),
    "rl": ("preft.rl.command", "train an adapter by reinforcement with verifiable rewards (GRPO)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(argv[0] if argv else "")
    arguments, others = parser.parse_known_args(argv)
    if others:
        if not hasattr(arguments, "passed_on"):
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        arguments.passed_on = others
    if not hasattr(arguments, "main"):
        parser.print_help()
        return 2
    try:
        return int(arguments.main(arguments) or 0)
    except UserError as error:
        print(f"preft: {error}", file=sys.stderr)
        return 2


def _parser(chosen: str) -> argparse.ArgumentParser:
    """The parser of all commands; only the chosen one's module is imported."""
    parser = argparse.ArgumentParser(
        "preft", description="Prefill-only adapters: train, inspect and serve them."
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == chosen:
            module = import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    return parser
