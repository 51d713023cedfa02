"""A folder of graphs and the model they were traced on: what `circuits view` serves, without the web.

Graphs are found anew for each request, so that what another program writes appears. One model is held, that of the last
request, and one request uses it at a time. A trace of a new prompt is a job with a stage to ask for.
"""

import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.effects import Outcome, outcomes
from circuits.folder import SUPERNODES, GraphFolder, graph_folders, open_folder, with_effects
from circuits.graph import KINDS, Graph, GraphError, load_graph
from circuits.supernodes import Supernodes, write_supernodes
from circuits.tracing import trace
from shared.config import ConfigError, to_dataclass
from shared.errors import UserError
from shared.models import Model, ModelConfig, load

if TYPE_CHECKING:
    from collections.abc import Callable

DOTS = 120  # neurons in a thumbnail

Place = tuple[str, int, int, int]  # kind, layer, position, index


@dataclass
class Job:
    """A trace under way: its stage in words, then the new graph's name or an error."""

    stage: str = "waiting for the model"
    name: str | None = None
    error: str | None = None


@dataclass
class Library:
    """The graphs at or below a folder. `config.name` empty: each graph's own model."""

    root: Path
    config: ModelConfig
    jobs: list[Job] = field(default_factory=list)
    _model: Model | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def graphs(self) -> dict[str, Path]:
        """Return the folders of graphs by name: the path below the root, or the root's own name."""
        try:
            folders = graph_folders(self.root)
        except GraphError:
            return {}
        return {_name(folder, self.root): folder for folder in folders}

    def folder(self, name: str) -> Path:
        """Return a graph's folder; GraphError where the library has none of that name."""
        found = self.graphs().get(name)
        if found is None:
            raise GraphError(f"there is no graph {name!r} here")
        return found

    def open(self, name: str) -> GraphFolder:
        """Read a graph's folder."""
        return open_folder(self.folder(name))

    def summary(self, name: str) -> dict[str, Any]:
        """Return what the index shows of a graph; of one that cannot be read, why."""
        try:
            graph = self.open(name).graph
        except UserError as error:
            return {"name": name, "error": str(error)}
        header = graph.header
        return {
            "name": name,
            "prompt": header.prompt,
            "targets": header.targets,
            "values": header.target_values,
            "metric": header.metric,
            "model": header.model,
            "nodes": len(graph),
            "edges": graph.n_edges,
            "node_mass": header.node_mass_kept,
            "edge_mass": header.edge_mass_kept,
            "dots": thumbnail(graph),
        }

    def save_supernodes(self, name: str, content: dict[str, Any]) -> int:
        """Check and write the content of a graph's supernodes' file; returns how many supernodes there are."""
        try:
            found = to_dataclass(Supernodes, content)
        except ConfigError as error:
            raise UserError(f"no supernodes: {error}") from error
        write_supernodes(self.folder(name) / SUPERNODES, found)
        return len(found.supernodes)

    def scale(self, name: str, places: list[Place], factor: float) -> Outcome:
        """Run the graph's prompt with the nodes at some places multiplied by a factor."""
        graph = self.open(name).graph
        numbers = node_numbers(graph, places)
        with self._lock:
            [found] = outcomes(self._load(graph.header.model), graph, [(numbers, factor)])
        if not all(map(isfinite, found["changes"])):
            raise UserError(f"scaling by {factor:g} leaves no finite logits: take a smaller factor")
        return found

    def start_trace(self, prompt: str, answer: str | None, wrong: str | None) -> int:
        """Trace a new prompt in the background; returns the number of its job."""
        if not prompt.strip():
            raise UserError("the prompt is empty")
        job = Job()
        self.jobs.append(job)
        threading.Thread(target=self._trace, args=(job, prompt, answer, wrong), daemon=True).start()
        return len(self.jobs) - 1

    def _trace(self, job: Job, prompt: str, answer: str | None, wrong: str | None) -> None:
        try:
            with self._lock:
                name = self._write_trace(prompt, answer, wrong, lambda stage: setattr(job, "stage", stage))
            job.stage, job.name = "done", name
        except UserError as error:
            job.error = str(error)
        except Exception as error:  # the thread has nobody else to tell
            job.error = f"{type(error).__name__}: {error}"
            raise

    def _write_trace(
        self, prompt: str, answer: str | None, wrong: str | None, say: "Callable[[str], None]"
    ) -> str:
        say("loading the model")
        model = self._load(self._model_of_graphs())
        say("tracing")
        graph = trace(model, prompt, answer, wrong)
        say("ablating, flipping and doubling the strongest neurons")
        folder = with_effects(model, graph).save(self._new_folder(prompt))
        return _name(folder, self.root)

    def _model_of_graphs(self) -> str:
        """The model of the first graph that can be read, for a new prompt where none was given."""
        if self.config.name:
            return self.config.name
        for folder in self.graphs().values():
            with suppress(GraphError):  # the index says what is wrong with it
                return load_graph(folder).header.model
        raise GraphError("no model is known: start `circuits view` with --model")

    def _load(self, name: str) -> Model:
        wanted = replace(self.config, name=self.config.name or name)
        if self._model is None or self._model.config.name != wanted.name:
            self._model = None  # two may not fit
            self._model = load(wanted)
        return self._model

    def _new_folder(self, prompt: str) -> Path:
        stem = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "prompt"
        number = 1
        while (folder := self.root / (stem if number == 1 else f"{stem}-{number}")).exists():
            number += 1
        return folder


def node_numbers(graph: Graph, places: list[Place]) -> list[int]:
    """Return the numbers of the nodes at some places; GraphError names one that the graph lacks."""
    columns = (graph.kind_n, graph.layer_n, graph.position_n, graph.index_n)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    known = {(KINDS[kind], *place): number for number, (kind, *place) in enumerate(rows)}
    missing = [place for place in places if place not in known]
    if missing or not places:
        raise GraphError(f"the graph has no node {list(missing[0])}" if missing else "no node was named")
    return [known[place] for place in places]


def thumbnail(graph: Graph) -> list[list[float]]:
    """Return [x, y, size, sign] of the strongest neurons, all but the sign between 0 and 1; layers go upwards."""
    numbers = graph.strongest_numbers(DOTS)
    width, height = max(1, len(graph.header.tokens) - 1), max(1, graph.header.n_layers - 1)
    total_n = graph.total_nK.sum(1)
    top = max((abs(float(total_n[number])) for number in numbers), default=1.0) or 1.0
    return [
        [
            round(float(graph.position_n[number]) / width, 3),
            round(float(graph.layer_n[number]) / height, 3),
            round(abs(float(total_n[number])) / top, 3),
            1.0 if total_n[number] >= 0 else -1.0,
        ]
        for number in numbers
    ]


def _name(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix() if folder != root else root.resolve().name
