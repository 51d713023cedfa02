"""Rows to train on: TinyWorld's tasks by name, or a JSONL file.

A task gives rows of a split ("train" or "test"; the splits never share a question) and names the reward that fits it.

    user        a user's instructions in chat; reward `user_style`. The base model was trained on every style equally
                often and cannot know this user's: there is room above it, and every style is sampled now and then.
    addition    x + y as plain text; reward `answers_first`
    capitals    state to capital as plain text; reward `answers_first`
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from preft.adapters import AdapterError
from preft.rl.rewards import Row


class Task(NamedTuple):
    """Rows of a split, `n` of them, drawn by a seed; and the name of the reward."""

    rows: Callable[[str, int, int], list[Row]]
    reward: str


def user_rows(split: str, n: int, seed: int) -> list[Row]:
    """Instructions of one TinyWorld user, who is drawn by the seed, with what the user wishes to read."""
    from shared.tinyworld.users import INSTRUCTIONS, make_users

    [user] = make_users(1, seed)
    by_prompt = {instruction.prompt: instruction for instruction in INSTRUCTIONS}
    rows = []
    for question, answer in user.rows(split, n, seed):
        instruction, wishes = by_prompt[question["content"]], user.preferences
        answers = instruction.answers
        facts = wishes._asdict() | {
            "sentence": answers.get("") or answers.get(wishes.units) or answers[wishes.drink],
            "more": instruction.more.format(wishes.drink),
        }
        rows.append(Row([{"role": "user", "content": question["content"]}], answer["content"], facts))
    return rows


def _questions(name: str) -> Callable[[str, int, int], list[Row]]:
    def rows(split: str, n: int, seed: int) -> list[Row]:
        from shared.tinyworld import tasks

        return [Row(question.prompt, question.answer) for question in getattr(tasks, name)(split, n, seed)]

    return rows


TASKS = {
    "user": Task(user_rows, "user_style"),
    "addition": Task(_questions("addition_questions"), "answers_first"),
    "capitals": Task(_questions("capital_questions"), "answers_first"),
}


def task_named(name: str) -> Task:
    """The task of a name; AdapterError lists the known ones."""
    if name not in TASKS:
        raise AdapterError(f"no task named {name!r}; known are {', '.join(TASKS)}, or give a data file")
    return TASKS[name]


@dataclass(frozen=True)
class FileRow:
    """A line of a data file: `prompt` (text) or `messages` (a chat), `answer` and `facts` where the reward asks."""

    prompt: str = ""
    messages: list[dict[str, str]] | None = None
    answer: str = ""
    facts: dict[str, Any] | None = None


def file_rows(path: Path | str) -> list[Row]:
    """Rows of a JSONL or CSV file; AdapterError for a line with neither prompt nor messages, or with both."""
    from shared.data import read_rows

    rows = []
    for number, row in enumerate(read_rows(path, FileRow), 1):
        if bool(row.prompt) == bool(row.messages):
            raise AdapterError(f"{path}: row {number} needs either a prompt or messages")
        messages: Any = row.messages
        rows.append(Row(messages or row.prompt, row.answer, row.facts or {}))
    return rows
