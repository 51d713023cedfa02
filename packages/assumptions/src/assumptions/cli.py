"""The `assumptions` command: its subcommands, run by `shared.commands`."""

from collections.abc import Sequence

from shared.commands import run_command

# Name of the subcommand -> (module that implements it, one line for the help). Imported when it is asked for.
COMMANDS: dict[str, tuple[str, str]] = {
    "data": ("assumptions.corpora.command", "list the public data sets, turn one into a file of messages"),
    "elicit": ("assumptions.elicit_command", "ask a model what it assumes about the writers of messages"),
    "words": ("assumptions.words.command", "shares, contrast and clusters of open-ended answers on a page"),
    "probe": ("assumptions.commands.probe", "fit probes on a study's scores, and test them beside controls"),
    "steer": (
        "assumptions.commands.steer",
        "steer replies along a study's probes, beside controls, and judge them",
    ),
    "goals": ("assumptions.commands.goals", "follow people who change what they want, turn by turn"),
    "transcripts": ("assumptions.commands.transcripts", "what is assumed at every turn of conversations"),
    "survey": ("assumptions.commands.survey", "what people expect of an assistant and of a person"),
    "report": ("assumptions.commands.report", "write a study's page anew"),
    "monitor": (
        "assumptions.monitor.command",
        "talk with a model on a local page, see what it assumes, steer it",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    return run_command(
        "assumptions",
        "See what a model assumes about its user, and steer it. A study of own messages is elicit, probe, steer and "
        "report over one folder, in this order, then monitor. `assumptions COMMAND --help` has options and examples.",
        COMMANDS,
        argv,
    )
