"""A graph's folder: what belongs to one graph, in files that stand beside each other.

    graph.json, graph.safetensors   the graph (circuits.graph)
    supernodes.json                 labelled groups of neurons (circuits.supernodes)
    effects.json                    {"effects": [...]}, what scaling does (circuits.effects)
    index.html                      the page

A supernode names neurons, not numbers of nodes, so that its file fits other graphs of the same model.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from circuits.graph import NEURON, Graph, GraphError, load_graph
from circuits.supernodes import Supernode, Supernodes, read_supernodes, write_supernodes
from circuits.view import write_page
from shared.serialize import read_json, write_json

if TYPE_CHECKING:
    from shared.models import Model

SUPERNODES, EFFECTS, PAGE = "supernodes.json", "effects.json", "index.html"


@dataclass(frozen=True)
class GraphFolder:
    """A graph with the content of its supernodes' file, and its effects as rows of theirs."""

    graph: Graph
    supernodes: Supernodes = field(default_factory=lambda: Supernodes([]))
    effects: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path | str, title: str | None = None) -> Path:
        """Write all files into the folder; returns the folder."""
        folder = self.graph.save(folder)
        write_supernodes(folder / SUPERNODES, self.supernodes)
        write_json(folder / EFFECTS, {"effects": self.effects})
        write_page(self.graph, folder / PAGE, title, supernodes=self.supernodes, effects=self.effects)
        return folder

    def write_neuronpedia(self, path: Path | str) -> Path:
        """Write the graph with its supernodes as one JSON file for circuit-tracer's and Neuronpedia's front ends."""
        from circuits.export import neuronpedia

        exported = neuronpedia(self.graph)
        ids = [node["node_id"] for node in exported["nodes"]]
        named = ((one.label, members_of(self.graph, one)) for one in self.supernodes.supernodes)
        exported["qParams"]["supernodes"] = [
            [label, *(ids[node] for node in members)] for label, members in named if members
        ]
        write_json(Path(path), exported)
        return Path(path)


def open_folder(folder: Path | str) -> GraphFolder:
    """Read a graph's folder; supernodes and effects may be absent. GraphError says what is wrong with a file."""
    folder = Path(folder)
    graph = load_graph(folder)
    path = folder / SUPERNODES
    supernodes = read_supernodes(path) if path.exists() else Supernodes([])
    effects = _rows(folder / EFFECTS, "effects") if (folder / EFFECTS).exists() else []
    return GraphFolder(graph, supernodes, effects)


def graph_folders(root: Path | str) -> list[Path]:
    """Return the folders of graphs at or below a folder, in order; GraphError where there are none."""
    root = Path(root)
    found = sorted(
        path.parent for path in root.rglob("graph.json") if path.with_suffix(".safetensors").exists()
    )
    if not found:
        raise GraphError(f"{root} holds no graph: `circuits trace` and `make circuits` write them")
    return found


def with_effects(model: "Model", graph: Graph, supernodes: Supernodes | None = None) -> GraphFolder:
    """Return the graph with what scaling its strongest neurons and its supernodes does to the answer."""
    from circuits.effects import precompute

    supernodes = supernodes or Supernodes([])
    groups = [members for one in supernodes.supernodes if (members := members_of(graph, one))]
    return GraphFolder(graph, supernodes, precompute(model, graph, groups))


def members_of(graph: Graph, supernode: Supernode) -> list[int]:
    """Return the numbers of the graph's nodes that a supernode names."""
    signs = torch.where(graph.activation_n < 0, -1, 1)
    columns = (graph.kind_n, graph.layer_n, graph.position_n, graph.index_n, signs)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))

    def named(layer: int, position: int, neuron: int, sign: int) -> bool:
        return any(
            (layer, neuron) == (place[0], place[2]) and place[1] in (None, position) and place[3] in (0, sign)
            for place in supernode.nodes
        )

    return [number for number, (kind, *place) in enumerate(rows) if kind == NEURON and named(*place)]


def _rows(path: Path, key: str) -> list[dict[str, Any]]:
    try:
        content = read_json(path)
    except ValueError as error:
        raise GraphError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise GraphError(f'{path} must hold one object with the list "{key}"')
    return content[key]
