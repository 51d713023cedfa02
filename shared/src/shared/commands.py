"""Console scripts with subcommands, each a module with `add_arguments(parser)` and `main(arguments)`.

Only the module of the subcommand asked for is imported. A module that sets a default for `passed_on` gets there the
options it does not know; elsewhere they are an error. A `UserError` ends the command with one line on stderr and status
2; anything else is a defect and keeps its traceback.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from shared.errors import UserError

# Name of a subcommand -> (module that implements it, one line for the help).
Commands = Mapping[str, tuple[str, str]]


def run_command(program: str, description: str, commands: Commands, argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(program, description, commands, argv[0] if argv else "")
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
        print(f"{program}: {error}", file=sys.stderr)
        return 2


def _parser(program: str, description: str, commands: Commands, chosen: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program, description=description)
    choices = parser.add_subparsers(metavar="COMMAND")
    for name, (module_name, summary) in commands.items():
        command = choices.add_parser(name, help=summary, description=summary)
        if name == chosen:
            module = import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    return parser
