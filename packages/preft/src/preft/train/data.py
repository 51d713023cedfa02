"""Chats to train on: JSONL, CSV, Hugging Face datasets (a folder or an id), and TinyWorld's users, in one shape.

A row holds `messages` (a chat that ends with an assistant message), or a `prompt` and a `response`; `user` says whose
it is. A row of another shape is refused with its file and line before anything is computed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from preft.adapters import AdapterError
from shared.data import DataError, read_rows, typed_rows
from shared.tokens import Message

TINYWORLD = "tinyworld:"
SOURCES = (
    "rows.jsonl, rows.csv, a folder of datasets.save_to_disk, a dataset id (owner/name), or tinyworld:user000"
)


@dataclass(frozen=True)
class DataRow:
    """One training chat."""

    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    response: str | None = None
    user: str | None = None

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None) or (self.prompt is None) != (
            self.response is None
        ):
            raise ValueError("a row has either messages, or prompt and response")
        for number, message in enumerate(self.messages or ()):
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise ValueError(f"message {number} needs a text {key!r}, got {message.get(key)!r}")
        if self.messages is not None and (not self.messages or self.messages[-1]["role"] != "assistant"):
            raise ValueError("messages must end with an assistant message: its text is what is learnt")

    def chat(self) -> list[Message]:
        """The row as messages."""
        if self.messages is None:
            return [
                Message(role="user", content=str(self.prompt)),
                Message(role="assistant", content=str(self.response)),
            ]
        return [Message(role=message["role"], content=message["content"]) for message in self.messages]


Reader = Callable[[], list[DataRow]]


def read_data(source: str, columns: Mapping[str, str] | None = None, split: str = "train") -> list[DataRow]:
    """Rows of a source (`SOURCES`), in order; `columns` maps messages, prompt, response and user to other names.

    `split` is the part of a dataset that has parts, and "train" or "test" of a TinyWorld user. DataError names file,
    line and fault.
    """
    if source.startswith(TINYWORLD):
        return _tinyworld(source.removeprefix(TINYWORLD), split)
    path = Path(source)
    if path.exists():
        part = split if (path / "dataset_dict.json").exists() else None
        rows = read_rows(path, DataRow, columns=columns, drop_extra=True, part=part)
    elif path.suffix or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise DataError(f"{source} does not exist; give {SOURCES}")
    else:
        rows = typed_rows(_hub(source, split), DataRow, columns=columns, drop_extra=True)
    if not rows:
        raise DataError(f"{source} has no rows")
    return rows


def by_user(
    source: str, columns: Mapping[str, str] | None = None, split: str = "train"
) -> dict[str, list[DataRow]]:
    """Rows of every user by name (`readers`); DataError where one user's are malformed."""
    return {name: read() for name, read in readers(source, columns, split).items()}


def readers(source: str, columns: Mapping[str, str] | None = None, split: str = "train") -> dict[str, Reader]:
    """How every user's rows are read, by name: USER.jsonl files in a folder, one source with a column user, or
    tinyworld:COUNT. A fault in one user's file is that reader's, all others are raised here."""
    if source.startswith(TINYWORLD):
        count = source.removeprefix(TINYWORLD)
        if not count.isdigit() or int(count) < 1:
            raise DataError(f"{source}: give the number of users, as in tinyworld:8")
        names = [f"user{i:03d}" for i in range(int(count))]
        return {name: partial(read_data, TINYWORLD + name, split=split) for name in names}
    folder = Path(source)
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if files:
        return {file.stem: partial(read_data, str(file), columns) for file in files}
    users: dict[str, list[DataRow]] = {}
    for number, row in enumerate(read_data(source, columns, split), 1):
        if not row.user or row.user != Path(row.user).name or row.user.startswith("."):
            raise DataError(
                f"{source}, row {number}: user must be a plain file name, got {row.user!r}; a folder with one "
                "USER.jsonl a user needs no such column"
            )
        users.setdefault(row.user, []).append(row)
    return {name: partial(list, rows) for name, rows in users.items()}


def _tinyworld(name: str, split: str) -> list[DataRow]:
    from shared.tinyworld.users import make_users

    number = name.removeprefix("user")
    if not number.isdigit():
        raise AdapterError(f"TinyWorld's users are called user000, user001, ...; there is no {name!r}")
    user = make_users(int(number) + 1)[-1]
    return [DataRow(messages=list(chat), user=user.name) for chat in user.rows(split)]


def _hub(name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise DataError(f"the dataset {name!r} (split {split!r}) cannot be loaded: {error}") from error
    for number, values in enumerate(dataset):
        yield f"{name}, row {number}", dict(values)
