"""Whose adapters are trained: users with chats to train on, to choose learning rates by, and to report on.

Users are drawn in one go and split: the first `users` are reported on, the `tuning_users` behind them only choose
learning rates. Validation chats are cut off a user's training chats; held-out chats are met by the report alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preft.adapters import AdapterError
from preft.quality.settings import AdapterQualityConfig
from shared.data import split_rows
from shared.tinyworld.users import Preferences
from shared.tokens import Message

Chats = Sequence[Sequence[Message]]


@dataclass(frozen=True)
class Person:
    """A user's chats; `preferences` where they are known, as TinyWorld's are."""

    name: str
    train: list[list[Message]]
    validation: list[list[Message]]
    heldout: list[list[Message]]
    preferences: Preferences | None


def people(config: AdapterQualityConfig, seed: int) -> tuple[list[Person], list[Person]]:
    """The users that are reported on, and those that choose learning rates; AdapterError where data are too few."""
    count = config.users + config.tuning_users
    found = _tinyworld(config, count, seed) if config.data == "tinyworld" else _files(config, count, seed)
    for person in found:
        if not (person.train and person.validation and person.heldout):
            raise AdapterError(f"{person.name} has too few chats for training, validation and held-out ones")
    return found[: config.users], found[config.users :]


def _tinyworld(config: AdapterQualityConfig, count: int, seed: int) -> list[Person]:
    from shared.tinyworld.users import make_users

    persons = []
    for user in make_users(count, seed):
        rows: Any = user.rows("train", config.train_chats + config.validation_chats)
        heldout: Any = user.rows("test", config.heldout_chats)
        train, validation = rows[: config.train_chats], rows[config.train_chats :]
        persons.append(Person(user.name, train, validation, heldout, user.preferences))
    return persons


def _files(config: AdapterQualityConfig, count: int, seed: int) -> list[Person]:
    """One user a file: USER.jsonl with chats; their parts in the proportion of the settings' counts."""
    from preft.train.data import by_user

    sizes = {name: getattr(config, f"{name}_chats") for name in ("train", "validation", "heldout")}
    shares = {name: size / sum(sizes.values()) for name, size in sizes.items()}
    users = by_user(config.data)
    if len(users) < count:
        raise AdapterError(
            f"{Path(config.data)} has {len(users)} users, users and tuning_users ask for {count}"
        )
    persons = []
    for name in sorted(users)[:count]:
        parts = split_rows([row.chat() for row in users[name]], shares, seed=seed)
        chats = {part: list(rows)[: sizes[part]] for part, rows in parts.items()}
        persons.append(Person(name, chats["train"], chats["validation"], chats["heldout"], None))
    return persons
