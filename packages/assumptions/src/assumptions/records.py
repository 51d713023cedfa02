"""The append-only file of an elicitation: one header line, one line an answer; safe against being killed at any byte.

A line is whole or it does not count: a torn last line is cut off when the file is opened again. The last record of an
answer's key (id, sample) is the one that counts, so a retry is appended, never written over. A header that differs
(another instrument, wording, sampling, model) is refused: answers to different questions never share a file.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from assumptions.parsing import Status
from shared.errors import UserError

FORMAT = 1
Key = tuple[str, int]


@dataclass(frozen=True)
class Record:
    """One answer: what was asked, what came back, how it was read, and the scores (dimension to number)."""

    id: str
    sample: int
    status: Status
    scores: dict[str, float]
    text: str
    finish_reason: str = ""
    order: tuple[str, ...] = ()
    sections: dict[str, str] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    error: str | None = None
    attempt: int = 0

    @property
    def key(self) -> Key:
        """What a later record of the same answer replaces."""
        return (self.id, self.sample)


class RecordFile:
    """An open elicitation file: `records` holds the counting record of each key, `append` adds whole lines."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = {"format": FORMAT, **json.loads(json.dumps(header))}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _cut_torn_line(path)
        if not path.exists() or path.stat().st_size == 0:
            path.write_text(json.dumps(self.header) + "\n", encoding="utf-8")
        found, records = read(path)
        if found != self.header:
            changed = sorted(k for k in {*found, *self.header} if found.get(k) != self.header.get(k))
            raise UserError(
                f"{path} holds answers made with another {', '.join(changed)}; choose another file or delete it"
            )
        self.records = {record.key: record for record in records}

    def __enter__(self) -> "RecordFile":
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, records: Iterable[Record]) -> None:
        """Write records and wait until they are on disk."""
        for record in records:
            self._file.write(json.dumps(asdict(record)) + "\n")
            self.records[record.key] = record
        self._file.flush()
        os.fsync(self._file.fileno())


def read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Return the header and all whole records in order; UserError names a line that is not a record."""
    lines = path.read_bytes().split(b"\n")[:-1]
    if not lines:
        raise UserError(f"{path} is empty; it should begin with a header line")
    header, *rows = [_object(line, path, number) for number, line in enumerate(lines, start=1)]
    return header, [_record(row, path, number) for number, row in enumerate(rows, start=2)]


def final(records: Iterable[Record]) -> list[Record]:
    """Keep the last record of every key, in order of key."""
    last = {record.key: record for record in records}
    return [last[key] for key in sorted(last)]


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, line {number} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number} is not an object")
    return value


def _record(row: dict[str, Any], path: Path, number: int) -> Record:
    try:
        tuples = {name: tuple(row[name]) for name in ("order", "repairs", "missing")}
        return Record(**{**row, **tuples, "status": Status(row["status"])})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}, line {number} is not a record of format {FORMAT}: {error}") from error


def _cut_torn_line(path: Path) -> None:
    """Remove what follows the last line end: the line that was being written when the process died."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
