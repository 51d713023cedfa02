"""Uploaded adapters on disk, so that a restart serves them again.

    STORE/index.json    {"serial": n, "adapters": {NAME: {"folder": "000007", "version": 3, "created": ...}}}
    STORE/000007/       one version of one adapter: adapter_config.json, adapter_model.safetensors
    STORE/sums/         sums of adapters that the server has made (`preft.materialise`)
    STORE/.lock         held by the server that uses the store

A version's folder never changes and its number is never used again: requests that run under an old version can still
read it after it was replaced, and no name that a client chose becomes a path. The index alone says what is served;
folders that it does not name are left-overs, removed when the next server starts.
"""

import fcntl
import re
import shutil
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from shared.errors import UserError
from shared.serialize import read_json, write_json

INDEX = "index.json"
SUMS = "sums"
STAGED = ".incoming-"
OURS = re.compile(rf"\d{{6,}}|{re.escape(STAGED)}[0-9a-f]+")


@dataclass(frozen=True)
class Stored:
    """One stored version: its folder, its number among the versions of the name, when it came (ISO 8601, UTC)."""

    folder: Path
    version: int
    created: str


class Store:
    """The store in one folder, for one server at a time; UserError if another one holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.sums = self.folder / SUMS
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / INDEX).exists() and any(path.is_dir() for path in self.folder.iterdir()):
            raise UserError(f"{folder} holds other folders and no {INDEX}: give --store a folder of its own")
        self._lock = _hold(self.folder / ".lock")
        index = read_json(self.folder / INDEX) if (self.folder / INDEX).exists() else {}
        self._serial: int = index.get("serial", 0)
        self.current = {
            name: Stored(self.folder / row["folder"], row["version"], row["created"])
            for name, row in index.get("adapters", {}).items()
        }
        self._sweep()
        self._write()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        """Let another server have the store."""
        self._lock.close()

    def stage(self) -> Path:
        """An empty folder for files that come in."""
        staged = self.folder / f"{STAGED}{uuid.uuid4().hex}"
        staged.mkdir()
        return staged

    def number(self, staged: Path) -> Path:
        """Give staged files the folder of a version; it is served after a restart only once `set_current` names it."""
        self._serial += 1
        folder = self.folder / f"{self._serial:06d}"
        self._write()
        staged.rename(folder)
        return folder

    def set_current(self, name: str, folder: Path, version: int) -> Stored:
        """From now on `name` is the version in `folder`, also after a restart."""
        stored = Stored(folder, version, datetime.now(UTC).isoformat(timespec="seconds"))
        self.current[name] = stored
        self._write()
        return stored

    def forget(self, name: str) -> None:
        """Do not serve a name after a restart; its files stay until `discard`."""
        if self.current.pop(name, None):
            self._write()

    def discard(self, folder: Path) -> None:
        """Remove a folder of this store; other folders are left alone."""
        if folder.parent in (self.folder, self.sums):
            shutil.rmtree(folder)

    def _write(self) -> None:
        rows = {
            name: asdict(stored) | {"folder": stored.folder.name} for name, stored in self.current.items()
        }
        write_json(self.folder / INDEX, {"serial": self._serial, "adapters": rows})

    def _sweep(self) -> None:
        kept = {stored.folder for stored in self.current.values()}
        for folder in self.folder.iterdir():
            if folder == self.sums or (
                folder.is_dir() and folder not in kept and OURS.fullmatch(folder.name)
            ):
                shutil.rmtree(folder)


def _hold(path: Path) -> IO[str]:
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(
            f"another server uses the adapter store {path.parent}; give this one another --store"
        ) from None
    return lock
