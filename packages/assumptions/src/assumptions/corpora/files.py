"""Files that are no plain table, as (place, values by column): text files side by side, archives, nested results."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.data import DataError, raw_rows

Raw = Iterator[tuple[str, dict[str, Any]]]


def table(path: Path, row_type: type) -> Raw:
    """A .jsonl, .json or .csv file or a saved dataset."""
    return raw_rows(path, row_type)


def pushbacks(path: Path, row_type: type) -> Raw:
    """SYCON-Bench's push_back.csv, with the corrections where questions.txt and corrections.txt lie beside it."""
    questions, corrections = path.with_name("questions.txt"), path.with_name("corrections.txt")
    told: dict[str, str] = {}
    if questions.exists() and corrections.exists():
        told = dict(zip(*_side_by_side(questions, corrections)))
    for place, values in raw_rows(path, row_type):
        yield place, values | {"correction": told.get(str(values.get("Question", "")).strip())}


def arguments(path: Path, row_type: type) -> Raw:
    """SYCON-Bench's debate setting: arguments.txt beside questions.txt, line by line."""
    asked, argued = _side_by_side(path.with_name("questions.txt"), path)
    for number, (question, argument) in enumerate(zip(asked, argued), start=1):
        yield f"{path}, line {number}", {"question": question, "argument": argument}


def chats_in_archive(path: Path, row_type: type) -> Raw:
    """The text files of a zip archive, in order of their names."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".txt") and not name.startswith("__MACOSX"):
                    text = archive.read(name).decode("utf-8-sig")
                    yield f"{path}, {name}", {"name": Path(name).name, "text": text}
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no archive of text files: {error}") from error


def transcripts(path: Path, row_type: type) -> Raw:
    """Every conversation of a Spiral-Bench result: {run: {file: {prompt: [{transcript, ...}]}}}."""
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
        for run, files in runs.items():
            prompts = [
                (name, talks)
                for part in files.values()
                if isinstance(part, dict)
                for name, talks in part.items()
            ]
            for name, talks in prompts:
                for number, talk in enumerate(talks if isinstance(talks, list) else [], start=1):
                    if talk is not None:
                        values = {"prompt_id": name, "transcript": talk["transcript"], "run": run}
                        yield f"{path}, {run}, {name}, conversation {number}", values
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no result of Spiral-Bench: {error!r}") from error


def _side_by_side(first: Path, second: Path) -> tuple[list[str], list[str]]:
    """The lines of two files; DataError when one is missing or their numbers differ."""
    for path in (first, second):
        if not path.exists():
            raise DataError(f"{path} is missing: it belongs beside {second.name}")
    lines = [
        [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        for path in (first, second)
    ]
    if len(lines[0]) != len(lines[1]):
        raise DataError(
            f"{first} has {len(lines[0])} lines and {second} {len(lines[1])}: they belong together line by line"
        )
    return lines[0], lines[1]
