"""`assumptions data`: list the public sets, or turn one into a file of chats that every other command reads.

assumptions data                                             the table of sets
assumptions data elephant_oeq OEQ.csv --out chats.jsonl      its last user messages with their histories
"""

import argparse
import json
from dataclasses import dataclass

from assumptions.corpora.loading import load_corpus
from assumptions.corpora.registry import CORPORA, corpus
from shared.commands import output_file
from shared.data import write_rows
from shared.tokens import Message


@dataclass(frozen=True)
class WrittenChat:
    """A line of the file, in the columns of `read_chats`."""

    id: str
    text: str
    group: str
    source: str
    history: tuple[Message, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `assumptions data`."""
    parser.add_argument("name", nargs="?", help="a set of the table; without it the table is shown")
    parser.add_argument(
        "source", nargs="?", help="a file, a folder, hf, or hf:ID; without it: how to get the set"
    )
    parser.add_argument("--part", help="one of the files of a set that has several")
    parser.add_argument("--limit", type=int, help="at most so many items")
    parser.add_argument("--out", type=output_file, help="write the chats here (JSON lines)")


def main(arguments: argparse.Namespace) -> int:
    """Show the table, or load a set, show its card, and write its chats."""
    if arguments.name is None:
        for one in CORPORA.values():
            parts = ", ".join(name for name in one.parts if name)
            print(f"{one.name:22} {one.title}{f' ({parts})' if parts else ''}: {one.licence}; {one.url}")
        return 0
    if arguments.source is None and arguments.name != "goal_switch":
        print(corpus(arguments.name).how_to_get())
        return 0
    loaded = load_corpus(arguments.name, arguments.source, part=arguments.part, limit=arguments.limit)
    print(json.dumps(loaded.card, indent=2))
    if arguments.out is not None:
        chats = loaded.chats()
        write_rows(arguments.out, [WrittenChat(c.id, c.turn, c.group, c.source, c.history) for c in chats])
    return 0
