"""Plain JSON out of the values of an experiment, and files that are either whole or absent."""

import dataclasses
import enum
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.errors import UserError


def plain(value: Any) -> Any:
    """`value` as JSON types: dataclasses, enums, paths, numpy and torch values; nan and infinities become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [plain(item) for item in items]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    raise TypeError(f"cannot write {type(value).__name__} as JSON: {value!r}")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A sibling path to write to; it replaces `path` when the block ends well and is removed when it does not."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    try:
        yield partial
        if partial.is_dir():
            remove(path)
        os.replace(partial, path)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Delete a file or a folder; absent is fine."""
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(plain(value), indent=2, allow_nan=False)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


class DamagedFileError(UserError, ValueError):
    """A file that does not hold what its name promises; the message says which and why."""


def read_json(path: Path) -> Any:
    """What `write_json` wrote; DamagedFileError when the file is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFileError(f"{path} is not JSON: {error}") from error
