"""Figures over time: metrics.jsonl, one line a step, continued by a run that is resumed.

A step that is done again replaces what a former run logged under the same names from that step on, so that the file
never holds two lines of one step. A last line that a killed process left half is dropped.
"""

import json
import time
from pathlib import Path
from typing import Any

from shared.serialize import atomic_path, plain

OWN = {"step", "time"}


class StepLog:
    """The file of a run's figures over time; lines that were there at the start count as a former run's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self._former = [json.loads(line) for line in text.split("\n")[:-1]]
        self._new: list[dict[str, Any]] = []
        if text and not text.endswith("\n"):
            self._rewrite()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line: the step, the seconds since the epoch and the values."""
        line = plain({"step": step, "time": round(time.time(), 3)} | values)
        kept = [former for former in self._former if former["step"] < step or _names(former) != _names(line)]
        if len(kept) < len(self._former):
            self._former = kept
            self._rewrite()
        if self._former:
            self._new.append(line)  # only a later rewrite needs it
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _rewrite(self) -> None:
        with atomic_path(self.path) as partial:
            partial.write_text(
                "".join(f"{json.dumps(line)}\n" for line in [*self._former, *self._new]), encoding="utf-8"
            )


def _names(line: dict[str, Any]) -> set[str]:
    return line.keys() - OWN
