"""Console scripts with subcommands, each a module with `add_arguments(parser)` and `main(arguments)`.

Only the module of the subcommand asked for is imported; its docstring is the subcommand's help. A module that sets a
default for `passed_on` gets there the options it does not know; elsewhere they are an error. What is the user's to mend
(`shared.errors.told`) ends the command with one line on stderr and status 2, an interrupt with status 130; anything
else is a defect and keeps its traceback.

`output_file` and `output_folder` are types of options: a place that cannot be written is refused before any work.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from shared.errors import UserError, told

# Name of a subcommand -> (module that implements it, one line for the help).
Commands = Mapping[str, tuple[str, str]]
INTERRUPTED = 130  # as shells have it for a process that SIGINT ended


def run_command(program: str, description: str, commands: Commands, argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _read(program, description, commands, argv)
        status = int(arguments.main(arguments) or 0)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has seen enough (`assumptions data | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (UserError, OSError) as error:
        if (line := told(error)) is None:
            raise
        print(f"{program}: {line}", file=sys.stderr)
        return 2


def output_file(text: str) -> Path:
    """A file to write, as the type of an option; UserError when it cannot be one."""
    path = Path(text)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file to write")
    _check_writable(path, path.parent)
    return path


def output_folder(text: str) -> Path:
    """A folder to write into (made when it is needed), as the type of an option; UserError when it cannot be one."""
    path = Path(text)
    _check_writable(path, path)
    return path


def _check_writable(path: Path, folder: Path) -> None:
    """UserError unless `folder`, or the nearest folder above it that is there, can be written."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{path} cannot be written: {there} is a file, no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: no permission in {there}; give another place")


def _read(program: str, description: str, commands: Commands, argv: list[str]) -> argparse.Namespace:
    """The arguments of the subcommand, its `main` among them; without a subcommand `main` prints the help."""
    parser = _parser(program, description, commands, argv[0] if argv else "")
    arguments, others = parser.parse_known_args(argv)
    if others:
        if not hasattr(arguments, "passed_on"):
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        arguments.passed_on = others
    return arguments


def _parser(program: str, description: str, commands: Commands, chosen: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program, description=description)
    choices = parser.add_subparsers(metavar="COMMAND")

    def show_help(_: argparse.Namespace) -> int:
        parser.print_help()
        return 2

    parser.set_defaults(main=show_help)
    for name, (module_name, summary) in commands.items():
        command = choices.add_parser(name, help=summary, description=summary)
        if name == chosen:
            module = import_module(module_name)
            command.description = module.__doc__
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    return parser
