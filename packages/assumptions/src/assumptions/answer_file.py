"""An append-only file of answers: one header line, one line an answer; safe against being killed at any byte.

A line is whole or it does not count: a torn last line is cut off when the file is opened again. The last record of a
key is the one that counts, so a retry is appended, never written over. A file with another header is refused, and the
message names what differs.
"""

import json
import os
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from shared.errors import UserError
from shared.runs import Run, config_hash
from shared.serialize import plain, read_json, write_json


@runtime_checkable
class Answered(Protocol):
    """One line of the file."""

    @property
    def key(self) -> Hashable:
        """What a later record of the same answer replaces."""
        ...

    @property
    def error(self) -> str | None:
        """Why the engine gave no answer; None where it gave one."""
        ...


R = TypeVar("R", bound=Answered)
File = TypeVar("File", bound="AnswerFile[Any]")


class AnswerFile(Generic[R]):
    """An open file: `records` holds the counting record of each key, `append` adds whole lines.

    `parse` makes a record of a line's object and may raise KeyError, TypeError or ValueError.
    """

    def __init__(self, path: Path, header: dict[str, Any], parse: Callable[[dict[str, Any]], R]) -> None:
        self.path, self.header = path, plain(header)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _cut_torn_line(path)
        if not path.exists() or path.stat().st_size == 0:
            path.write_text(json.dumps(self.header) + "\n", encoding="utf-8")
        _, records = read_answers(path, parse, self.header)
        self.records: dict[Hashable, R] = {record.key: record for record in records}

    def __enter__(self: File) -> File:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, records: Iterable[R]) -> None:
        """Write records and wait until they are on disk."""
        for record in records:
            self._file.write(json.dumps(plain(record)) + "\n")
            self.records[record.key] = record
        self._file.flush()
        os.fsync(self._file.fileno())


def read_answers(
    path: Path, parse: Callable[[dict[str, Any]], R], expected: dict[str, Any] | None = None
) -> tuple[dict[str, Any], list[R]]:
    """Return the header and all whole records in order.

    UserError names what in the header differs from `expected`, or a line that is not a record.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    if not lines:
        raise UserError(f"{path} is empty; it should begin with a header line")
    header, *rows = [_object(line, path, number) for number, line in enumerate(lines, start=1)]
    if expected is not None and header != expected:
        changed = sorted(k for k in {*header, *expected} if header.get(k) != expected.get(k))
        raise UserError(
            f"{path} holds answers made with another {', '.join(changed)}; choose another file or delete it"
        )
    return header, [_parsed(parse, row, path, number) for number, row in enumerate(rows, start=2)]


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, line {number} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number} is not an object")
    return value


def _parsed(parse: Callable[[dict[str, Any]], R], row: dict[str, Any], path: Path, number: int) -> R:
    try:
        return parse(row)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}, line {number} is not a record of this format: {error}") from error


def _cut_torn_line(path: Path) -> None:
    """Remove what follows the last line end: the line that was being written when the process died."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def once(path: Path, question: dict[str, Any], answers: Path) -> None:
    """Note at `path` which question its folder holds `answers` to.

    UserError, naming what differs, where there are answers to another question already.
    """
    asked = plain(question)
    former = read_json(path) if path.exists() and answers.exists() else asked
    if changed := sorted(k for k in {*former, *asked} if former.get(k) != asked.get(k)):
        raise UserError(
            f"{path.parent} holds answers made with another {', '.join(changed)} ({path.name} says which): choose "
            "another folder, or delete it to begin anew"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asked)


def answers_name(kind: str, question: dict[str, Any]) -> str:
    """The name of the file of the answers to one question."""
    return f"{kind}-{config_hash(question)}.jsonl"


def answers_path(run: Run, kind: str, question: dict[str, Any]) -> Path:
    """The file of the answers to one question; without `run.resume` a former run's is removed."""
    path = run.path(answers_name(kind, question))
    if not run.resume:
        path.unlink(missing_ok=True)
    return path
