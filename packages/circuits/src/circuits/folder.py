"""A graph's folder: what belongs to one graph, in files that stand beside each other.

    graph.json, graph.safetensors   the graph (circuits.graph)
    supernodes.json                 {"supernodes": [{"label": str, "nodes": [[layer, position or null, neuron, sign]]}]}
    effects.json                    {"effects": [...]}, what scaling does (circuits.effects)
    index.html                      the page

A supernode names neurons, not numbers of nodes, so that its file fits other graphs of the same model: position null is
every position, sign 0 (or left out) either sign of the activation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.graph import NEURON, Graph, GraphError, load_graph
from circuits.view import write_page
from shared.serialize import read_json, write_json

if TYPE_CHECKING:
    from shared.models import Model

SUPERNODES, EFFECTS, PAGE = "supernodes.json", "effects.json", "index.html"


@dataclass(frozen=True)
class GraphFolder:
    """A graph with its supernodes and effects, as rows of their files."""

    graph: Graph
    supernodes: list[dict[str, Any]] = field(default_factory=list)
    effects: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path | str, title: str | None = None) -> Path:
        """Write all files into the folder; returns the folder."""
        folder = self.graph.save(folder)
        write_json(folder / SUPERNODES, {"supernodes": self.supernodes})
        write_json(folder / EFFECTS, {"effects": self.effects})
        write_page(self.graph, folder / PAGE, title, supernodes=self.supernodes, effects=self.effects)
        return folder


def open_folder(folder: Path | str) -> GraphFolder:
    """Read a graph's folder; supernodes and effects may be absent. GraphError says what is wrong with a file."""
    folder = Path(folder)
    graph = load_graph(folder)
    supernodes = read_supernodes(folder / SUPERNODES) if (folder / SUPERNODES).exists() else []
    effects = _rows(folder / EFFECTS, "effects") if (folder / EFFECTS).exists() else []
    return GraphFolder(graph, supernodes, effects)


def write_neuronpedia(content: GraphFolder, path: Path | str) -> Path:
    """Write the graph with its supernodes as one JSON file for circuit-tracer's and Neuronpedia's front ends."""
    from circuits.export import neuronpedia

    exported = neuronpedia(content.graph)
    ids = [node["node_id"] for node in exported["nodes"]]
    named = ((row["label"], members_of(content.graph, row)) for row in content.supernodes)
    exported["qParams"]["supernodes"] = [
        [label, *(ids[node] for node in members)] for label, members in named if members
    ]
    write_json(Path(path), exported)
    return Path(path)


def graph_folders(root: Path | str) -> list[Path]:
    """Return the folders of graphs at or below a folder, in order; GraphError where there are none."""
    root = Path(root)
    found = sorted(
        path.parent for path in root.rglob("graph.json") if path.with_suffix(".safetensors").exists()
    )
    if not found:
        raise GraphError(f"{root} holds no graph: `circuits trace` and `make circuits` write them")
    return found


def with_effects(model: "Model", graph: Graph, supernodes: Sequence[Mapping[str, Any]] = ()) -> GraphFolder:
    """Return the graph with what scaling its strongest neurons and its supernodes does to the answer."""
    from circuits.effects import precompute

    groups = [members for row in supernodes if (members := members_of(graph, row))]
    return GraphFolder(graph, [dict(row) for row in supernodes], precompute(model, graph, groups))


def members_of(graph: Graph, supernode: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the graph's nodes that a supernode names."""
    columns = (graph.kind_n, graph.layer_n, graph.position_n, graph.index_n, graph.activation_n < 0)
    found = []
    for node, (kind, layer, position, index, minus) in enumerate(zip(*map(_list, columns), strict=True)):
        for place in supernode["nodes"] if kind == NEURON else ():
            sign = place[3] if len(place) > 3 else 0
            fits_sign = not sign or (sign < 0) == minus
            if (layer, index) == (place[0], place[2]) and place[1] in (None, position) and fits_sign:
                found.append(node)
                break
    return found


def read_supernodes(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of supernodes; GraphError names the first one that is none."""
    return check_supernodes(_rows(path, "supernodes"), str(path))


def check_supernodes(rows: Any, source: str) -> list[dict[str, Any]]:
    """Return rows that are supernodes, without what else they hold; GraphError names the first one that is none."""
    if not isinstance(rows, list):
        raise GraphError(f'{source}: "supernodes" must be a list')
    for number, row in enumerate(rows):
        places = row.get("nodes") if isinstance(row, dict) else None
        if not (places and isinstance(places, list) and isinstance(row.get("label"), str)):
            raise GraphError(f"{source}: supernode {number} needs a label and a list of nodes")
        for place in places:
            if not _is_place(place):
                raise GraphError(
                    f"{source}: supernode {number} ({row['label']}) has the node {place!r}; expected [layer, position "
                    "or null, neuron, sign]"
                )
    return [{"label": row["label"], "nodes": row["nodes"]} for row in rows]


def _is_place(place: Any) -> bool:
    if not isinstance(place, list) or len(place) not in (3, 4):
        return False
    return all(type(entry) is int or (i == 1 and entry is None) for i, entry in enumerate(place))


def _rows(path: Path, key: str) -> list[dict[str, Any]]:
    try:
        content = read_json(path)
    except ValueError as error:
        raise GraphError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise GraphError(f'{path} must hold one object with the list "{key}"')
    return content[key]


def _list(column: Any) -> list[Any]:
    return column.tolist()
