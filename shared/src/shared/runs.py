"""Runs: a folder with everything that made a result and everything that came out of it.

    manifest.json   configuration, seed, versions, machine, git state, model fingerprint, status
    metrics.json    the figures; metrics.jsonl: the same over time
    report.html     one self-contained page
    stages.json     which stage wrote its file, under which configuration, by which code

A stage writes one file (or folder), atomically. Opening the folder again with the same configuration skips the stages
that finished; another configuration, seed or model does them anew. Other code does not: a commit seldom changes what
a stage computes, and redoing long work is the user's choice (`resume=False`). But the manifest and the report say which
stages came from another commit, from other uncommitted changes or from other package versions.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from shared import manifest
from shared.progress import progress
from shared.report import Report
from shared.serialize import atomic_path, plain, read_json, remove, write_json
from shared.stats import seed_everything
from shared.step_log import StepLog

if TYPE_CHECKING:
    from shared.models import Model, ModelConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Pipeline:
    """One experiment: `run(config, model_config, run)` returns the metrics; found by the entry point `name`."""

    name: str
    config_class: type
    run: "Callable[[Any, ModelConfig, Run], dict[str, Any]]"


def config_hash(config: Any) -> str:
    """16 hex digits of the configuration's canonical JSON."""
    text = json.dumps(plain(config), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Stage:
    """One step of a run and the one file (or folder) it leaves; `done` says whether a former run left it already.

    `with stage as path:` write to `path`; it becomes `stage.path` when the block ends well.
    """

    def __init__(self, run: "Run", name: str) -> None:
        self.run, self.name, self.path = run, name, run.path(name)
        self._key = run.key
        former = run.finished_stages().get(name, {})
        self.done = self.path.exists() and former.get("key") == self._key
        if self.done:
            run.reuse_stage(name, former.get("code"))

    def __enter__(self) -> Path:
        self._started = time.perf_counter()
        self._context = atomic_path(self.path)
        return self._context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, error, trace)
        if kind is None:
            self.done = True
            self.run.finish_stage(self.name, self._key, time.perf_counter() - self._started)


class Run:
    """An open run folder; made by `start_run`."""

    def __init__(self, folder: Path, config: Any, seed: int, resume: bool) -> None:
        self.folder, self.config, self.seed, self.resume = folder, config, seed, resume
        self.report = Report(folder.name)
        self._metrics: dict[str, Any] = {}
        self._manifest: dict[str, Any] = {"status": "running", "started": _now(), "seed": seed}
        self._manifest |= {"config": plain(config), "model": None} | manifest.describe()
        self._config_key = config_hash({"config": plain(config), "seed": seed})
        self._code = {name: self._manifest[name] for name in ("git", "versions")}
        self._clear(keep_stages=resume and self._continues())
        self._steps = StepLog(self.path("metrics.jsonl"))
        write_json(self.path("manifest.json"), self._manifest)

    def _continues(self) -> bool:
        """Whether the folder holds a run of the same configuration and seed."""
        path = self.folder / "manifest.json"
        former = read_json(path) if path.exists() else {}
        return all(former.get(name) == self._manifest[name] for name in ("config", "seed"))

    def _clear(self, keep_stages: bool) -> None:
        """Remove what a former run concluded and, unless it is continued, what its stages left."""
        for name in (
            "metrics.json",
            "report.html",
            *(() if keep_stages else ("stages.json", "metrics.jsonl")),
        ):
            remove(self.folder / name)

    @property
    def key(self) -> str:
        """Identity of the configuration, the seed and (once `use_model` was called) the model."""
        model = self._manifest["model"]
        return f"{self._config_key}-{model['fingerprint']}" if model else self._config_key

    def path(self, name: str) -> Path:
        """The path of a file in the run folder; its parent folder exists."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def use_model(self, model: "Model") -> "Model":
        """Record the model's fingerprint and return the model; stages asked for later depend on it."""
        self._manifest["model"] = {"fingerprint": model.fingerprint, "config": plain(model.config)}
        write_json(self.path("manifest.json"), self._manifest)
        return model

    def stage(self, name: str) -> Stage:
        """The stage that writes the file `name`; do its work only if it is not `done`."""
        return Stage(self, name)

    def json_stage(self, name: str, compute: Callable[[], Any]) -> Any:
        """The content of the JSON file `name`: from a former run, or computed and written now."""
        stage = self.stage(name)
        if not stage.done:
            with stage as path:
                write_json(path, compute())
        return read_json(stage.path)

    def finished_stages(self) -> dict[str, dict[str, Any]]:
        """Key, seconds and code of every finished stage, by name."""
        path = self.path("stages.json")
        return read_json(path) if path.exists() else {}

    def finish_stage(self, name: str, key: str, seconds: float) -> None:
        """Note that a stage's file is whole, and by which code."""
        entry = {"key": key, "seconds": round(seconds, 3), "code": self._code}
        write_json(self.path("stages.json"), self.finished_stages() | {name: entry})
        self._note_code(name, None)

    def reuse_stage(self, name: str, code: dict[str, Any] | None) -> None:
        """Note that a former run's stage is used; the manifest names it if other code wrote it."""
        self._note_code(name, manifest.code_difference(code, self._code))

    def _note_code(self, name: str, difference: str | None) -> None:
        noted: dict[str, str] = self._manifest.get("stages_of_other_code", {})
        others = {key: value for key, value in noted.items() if key != name}
        others |= {name: difference} if difference else {}
        if others != noted:
            self._manifest["stages_of_other_code"] = others
            write_json(self.path("manifest.json"), self._manifest)

    def metrics(self, values: dict[str, Any]) -> None:
        """Merge `values` into metrics.json (top-level keys; nan becomes null)."""
        self._metrics |= plain(values)
        write_json(self.path("metrics.json"), self._metrics)

    def log(self, step: int, **values: float) -> None:
        """Append one line to metrics.jsonl: the step, the seconds since the epoch and the values.

        In a continued run it replaces the former run's lines of the same names from this step on.
        """
        self._steps.write(step, values)

    def progress(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Iterate with a progress bar on stderr; silent where stderr is no terminal."""
        return progress(items, label, total)

    def close(self, error: BaseException | None) -> None:
        """Write the final manifest and the report; a failed run keeps its error."""
        self._manifest |= {"status": "failed" if error else "finished", "finished": _now()}
        if error:
            self._manifest["error"] = f"{type(error).__name__}: {error}"
        write_json(self.path("manifest.json"), self._manifest)
        self.report.write(self.path("report.html"), metrics=self._metrics, manifest=self._manifest)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def start_run(folder: Path | str, config: Any, seed: int = 0, resume: bool = True) -> Iterator[Run]:
    """Open a run folder: seeds the generators, writes the manifest, and at the end the final manifest and the report.

    `config` is a dataclass or a mapping of JSON values. With `resume`, stages that finished under the same
    configuration, seed and model are kept; otherwise all are done anew.
    """
    seed_everything(seed)
    run = Run(Path(folder), config, seed, resume)
    try:
        yield run
    except BaseException as error:
        run.close(error)
        raise
    run.close(None)
