"""`assumptions probe`: fit probes on the elicited scores of a study, and test them."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `assumptions probe`."""
    parser.add_argument("study", type=Path, help="folder that `assumptions elicit` has begun")
    parser.add_argument("--span", choices=("user", "last", "prompt"), help="tokens that are pooled")
    parser.add_argument("--shuffles", type=int, help="searches over shuffled labels beside every probe")


def main(arguments: argparse.Namespace) -> None:
    """Fit, test, and print the figures of every dimension beside its controls."""
    from dataclasses import replace

    from assumptions.commands.study import advance, load_study, table

    study = load_study(arguments.study)
    chosen = {name: getattr(arguments, name) for name in ("span", "shuffles")}
    settings = replace(study.settings, **{name: value for name, value in chosen.items() if value is not None})
    figures = advance(arguments.study, replace(study, settings=settings), "probe")
    shown = ("r2", "spearman", "auroc", "r2_shuffled", "r2_bag_of_words")
    print(table({name: {key: one[key] for key in shown} for name, one in figures["probe"].items()}))
    print(f"next: assumptions steer {arguments.study}")
