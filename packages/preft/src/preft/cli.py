"""The `preft` command: its subcommands, run by `shared.commands`."""

from collections.abc import Sequence

from shared.commands import run_command

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
    return run_command("preft", "Prefill-only adapters: train, inspect and serve them.", COMMANDS, argv)
