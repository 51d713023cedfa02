"""Own conversations from a table: `user_1`, `user_2`, ... a column a turn, or one column `prompt` or `user_text`.

The turns are the user's messages in order; the replies between them are the model's. Empty cells after the last
message end the conversation; an empty cell before a filled one is an error, never a turn that is passed over.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assumptions.corpora.item import Item, asked
from shared.data import DataError, raw_rows

SINGLE = ("prompt", "user_text")
_TURN = re.compile(r"user_(\d+)")


@dataclass(frozen=True)
class _Keys:
    """The columns beside the turns."""

    id: str | None = None
    group: str | None = None


def read_conversations(path: Path | str) -> list[Item]:
    """Read conversations from a table; further columns become `meta`. DataError names file, line and column."""
    path = Path(path)
    items = [
        _item(where, values, number) for number, (where, values) in enumerate(raw_rows(path, _Keys), start=1)
    ]
    if not items:
        raise DataError(f"{path} holds no rows")
    return items


def _item(where: str, values: dict[str, Any], number: int) -> Item:
    columns = _turn_columns(where, values)
    turns = [_text(values[column]) for column in columns]
    last = max((i for i, turn in enumerate(turns) if turn), default=-1)
    if last < 0:
        raise DataError(f"{where}: no user message in {', '.join(columns)}")
    empty = next((i for i in range(last) if not turns[i]), None)
    if empty is not None:
        raise DataError(f"{where}: column {columns[empty]!r} is empty, but {columns[last]!r} is not")
    name = _text(values.get("id")) or str(number)
    meta = {k: v for k, v in values.items() if k not in (*columns, "id", "group")}
    script = tuple(turns[1 : last + 1])
    return Item(
        name, asked(turns[0]), _text(values.get("group")), Path(where.split(",")[0]).stem, script, meta=meta
    )


def _turn_columns(where: str, values: dict[str, Any]) -> list[str]:
    """The columns of the turns in order; they are numbered from 1 without a gap."""
    numbered = {int(match[1]): name for name in values if (match := _TURN.fullmatch(name))}
    single = [name for name in SINGLE if name in values]
    if numbered and not single and sorted(numbered) == list(range(1, len(numbered) + 1)):
        return [numbered[i] for i in sorted(numbered)]
    if len(single) == 1 and not numbered:
        return single
    raise DataError(
        f"{where}: expected columns user_1, user_2, ... or one of {', '.join(SINGLE)}; got {sorted(values)}"
    )


def _text(cell: Any) -> str:
    """The text of a cell; "" for what a table writes in place of nothing."""
    if cell is None or (isinstance(cell, float) and cell != cell):
        return ""
    return str(cell).strip()
