"""The `circuits` command: its subcommands, run by `shared.commands`."""

from collections.abc import Sequence

from shared.allocator import keep_freed_memory
from shared.commands import run_command

# Name of the subcommand -> (module that implements it, one line for the help). Imported when it is asked for.
COMMANDS: dict[str, tuple[str, str]] = {
    "trace": ("circuits.commands.trace", "trace the circuit of one prompt: graph, page, table of neurons"),
    "score": ("circuits.commands.score", "score the neurons of many prompts, in one process or several"),
    "view": ("circuits.commands.view", "look at a folder of graphs in a browser, trace and steer live"),
    "check": ("circuits.commands.check", "is the attribution exact for this model: its conservation error"),
    "plot": ("circuits.commands.plot", "faithfulness curves of a run, or a metric over a sweep"),
    "export": ("circuits.commands.export", "write a graph in the format of another program"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    keep_freed_memory()
    return run_command("circuits", "Neuron circuits: trace them, look at them, test them.", COMMANDS, argv)
