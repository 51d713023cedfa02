"""The records of an elicitation: what each draw was asked about, what came back and how it was read.

They lie in an append-only file (`answer_file`). A record counts for one draw of one text: its key is (id, sample, row),
`row` being the hash of history and turn. Answers about another text that had the same id stay in the file and never
count for this one. The header says how was asked (instrument, wording, model, sampling, guidance, seed); a file with
another header is refused, so answers to different questions never share one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assumptions.answer_file import AnswerFile, read_answers
from assumptions.parsing import Status

FORMAT = 2
Key = tuple[str, int, str]


@dataclass(frozen=True)
class Record:
    """One answer: what was asked, what came back, how it was read, and the scores (dimension to number)."""

    id: str
    sample: int
    status: Status
    scores: dict[str, float]
    text: str
    row: str = ""  # hash of the history and turn asked about
    finish_reason: str = ""
    order: tuple[str, ...] = ()
    sections: dict[str, str] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    error: str | None = None
    attempt: int = 0
    token_ids: tuple[int, ...] = ()  # where the settings keep them

    @property
    def key(self) -> Key:
        """What a later record of the same answer replaces."""
        return (self.id, self.sample, self.row)


class RecordFile(AnswerFile[Record]):
    """An open elicitation file: `records` holds the counting record of each key, `append` adds whole lines."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        super().__init__(path, {"format": FORMAT, **header}, _record)


def read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Return the header and all whole records in order; UserError names a line that is not a record."""
    return read_answers(path, _record)


def final(records: Iterable[Record]) -> list[Record]:
    """Keep the last record of every key, in order of key."""
    last = {record.key: record for record in records}
    return [last[key] for key in sorted(last)]


def _record(row: dict[str, Any]) -> Record:
    tuples = {name: tuple(row.get(name, ())) for name in ("order", "repairs", "missing", "token_ids")}
    return Record(**{**row, **tuples, "status": Status(row["status"])})
