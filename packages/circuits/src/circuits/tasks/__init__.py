"""Tasks: contrast pairs by name or from files, held out by what they are about, for any tokenizer.

items      what a task yields: pairs in several forms, groups that are held out together, labels
draw       examples for one model: single-token answers, equal lengths, parts without common groups
batch      examples as encoded batches
agreement, assumed, facts, numbers, people   the generators;  files   the public files' format
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from circuits.tasks import agreement, assumed, facts, numbers, people
from circuits.tasks.batch import PairBatch, collate
from circuits.tasks.draw import Drawn, Style, answer_token, draw
from circuits.tasks.files import deduplicate, file_name, file_task, pair_items, read_pairs, subject
from circuits.tasks.items import Example, Item, Task, TaskError

__all__ = [
    "TASKS", "Drawn", "Example", "Item", "PairBatch", "Style", "Task", "TaskError", "answer_token", "collate",
    "deduplicate", "draw", "find_task", "pair_items", "read_pairs", "subject", "task_names",
]  # fmt: skip

TASKS: dict[str, Task] = agreement.TASKS | facts.TASKS | numbers.TASKS | people.TASKS | assumed.TASKS


def find_task(task: str) -> Task:
    """Return a task by name, or of a file of pairs (a path, or a pattern with *); TaskError where there is neither."""
    if task in TASKS:
        return TASKS[task]
    if "*" not in task and not Path(task).suffix:
        raise TaskError(f"unknown task {task!r}; there are: {', '.join(TASKS)}, or a file of pairs")
    return file_task(task)


def task_names(tasks: Sequence[str]) -> dict[str, str]:
    """Return the name of every task or file of pairs (the file's stem); TaskError where two have the same name."""
    names = {task: task if task in TASKS else file_name(task) for task in tasks}
    for name, count in Counter(names[task] for task in tasks).items():
        if count > 1:
            same = ", ".join(task for task in tasks if names[task] == name)
            raise TaskError(
                f"tasks of one name, {name!r}: {same}; list each once and rename files of one name"
            )
    return names
