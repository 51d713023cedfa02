"""Splits that keep together what belongs together.

Rows of one group (a user, both sides of a conflict) and rows with the same text, however they are grouped, fall on one
side. Components are ordered by a hash of their content and dealt out to the parts, so a split depends on the seed and
on the rows, not on their order in a file.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from assumptions.chats import Chat, text_key
from shared.data import hash_point
from shared.errors import UserError


@dataclass(frozen=True)
class Split:
    """Row indices of the three parts, disjoint, each ascending."""

    train: list[int]
    validation: list[int]
    test: list[int]

    def __post_init__(self) -> None:
        if not (self.train and self.validation and self.test):
            sizes = f"{len(self.train)}/{len(self.validation)}/{len(self.test)}"
            raise UserError(f"a split of {sizes} rows leaves a part empty: give more rows or groups")


def row_hash(chat: Chat) -> str:
    """16 hexadecimal digits of a row's content: history and turn."""
    content = "\x1e".join([*(f"{m['role']}\x1f{m['content']}" for m in chat.history), chat.turn])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def group_split(chats: Sequence[Chat], seed: int = 0, validation: float = 0.2, test: float = 0.2) -> Split:
    """Split rows into train, validation and test by whole components; shares are of rows, met to within a component."""
    if not (validation > 0 and test > 0 and validation + test < 1):
        raise UserError(
            f"validation={validation} and test={test} must be positive and leave room for training"
        )
    components = _components(chats)
    order = sorted(components, key=lambda rows: _order_key(seed, chats, rows))
    parts: dict[str, list[int]] = {"test": [], "validation": [], "train": []}
    wanted = {"test": test * len(chats), "validation": validation * len(chats), "train": float("inf")}
    names = iter(parts)
    name = next(names)
    for rows in order:
        if len(parts[name]) >= wanted[name]:
            name = next(names)
        parts[name].extend(rows)
    return Split(sorted(parts["train"]), sorted(parts["validation"]), sorted(parts["test"]))


def leave_one_source_out(
    chats: Sequence[Chat], seed: int = 0, validation: float = 0.2
) -> Iterator[tuple[str, Split]]:
    """Yield (source, split), one source being the test part; rows tied to it by group or text are left out."""
    components = _components(chats)
    for source in sorted({chat.source for chat in chats}):
        test = [i for i, chat in enumerate(chats) if chat.source == source]
        clean = [rows for rows in components if not any(chats[i].source == source for i in rows)]
        order = sorted(clean, key=lambda rows: _order_key(seed, chats, rows))
        rest = [i for rows in order for i in rows]
        held: list[int] = []
        cut = validation * len(rest)
        for rows in order:
            if len(held) >= cut:
                break
            held.extend(rows)
        yield source, Split(sorted(set(rest) - set(held)), sorted(held), test)


def component_ids(chats: Sequence[Chat]) -> list[int]:
    """For every row the number of its component: rows that share a group or a text have the same."""
    ids = [0] * len(chats)
    for number, rows in enumerate(_components(chats)):
        for row in rows:
            ids[row] = number
    return ids


def _components(chats: Sequence[Chat]) -> list[list[int]]:
    """Connected components of rows that share a group or a text (union-find)."""
    parent = list(range(len(chats)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, chat in enumerate(chats):
        keys = [("text", text_key(chat.turn))]
        keys += [("group", chat.group)] if chat.group else []
        for key in keys:
            parent[root(i)] = root(first.setdefault(key, i))
    members: dict[int, list[int]] = {}
    for i in range(len(chats)):
        members.setdefault(root(i), []).append(i)
    return list(members.values())


def _order_key(seed: int, chats: Sequence[Chat], rows: Sequence[int]) -> float:
    return hash_point(sorted({row_hash(chats[i]) for i in rows}), seed)
