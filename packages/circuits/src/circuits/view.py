"""One self-contained, interactive HTML page a graph: nothing is fetched, it opens from a file.

Layers from bottom to top, tokens from left to right; neurons coloured by the sign and sized by the share of their
effect on the chosen target. Hover for details, click to follow a node's incoming and outgoing direct effects, sliders
for the number of neurons and edges, search, zoom and pan; usable by keyboard. The page is assets/graph.html with
style, script and data put in.
"""

import html
import json
from importlib import resources
from pathlib import Path
from typing import Any

from circuits.graph import KINDS, Graph
from shared.serialize import atomic_path, plain


def write_page(graph: Graph, path: Path | str, title: str | None = None) -> Path:
    """Write the graph's page; returns its path."""
    path = Path(path)
    with atomic_path(path) as partial:
        partial.write_text(page(graph, title or graph.header.prompt), encoding="utf-8")
    return path


def page(graph: Graph, title: str) -> str:
    """Return the page as one string of HTML."""
    assets = resources.files("circuits") / "assets"
    # "<" inside the data could end its script element; JSON may spell it as an escape instead.
    data = json.dumps(page_data(graph), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "__TITLE__": html.escape(title),
        "__CSS__": (assets / "graph.css").read_text(encoding="utf-8"),
        "__JS__": (assets / "graph.js").read_text(encoding="utf-8"),
        "__DATA__": data,
    }
    document = (assets / "graph.html").read_text(encoding="utf-8")
    pieces = []
    for name in ("__TITLE__", "__CSS__", "__DATA__", "__JS__"):
        before, document = document.split(name)
        pieces += [before, parts[name]]
    return "".join([*pieces, document])


def page_data(graph: Graph) -> dict[str, Any]:
    """Return what the page shows as JSON types: the header, nodes and edges."""
    columns = {name: column.tolist() for name, column in graph.columns().items()}
    nodes = [
        {
            "kind": KINDS[columns["kind_n"][node]],
            "layer": columns["layer_n"][node],
            "position": columns["position_n"][node],
            "index": columns["index_n"][node],
            "activation": columns["activation_n"][node],
            "total": columns["total_nK"][node],
            "remainder": columns["remainder_n"][node],
            "label": graph.label(node),
            "note": graph.header.notes.get(str(node), ""),
        }
        for node in range(len(graph))
    ]
    edges = [
        {"source": source, "target": target, "weight": weight}
        for source, target, weight in zip(
            columns["source_e"], columns["target_e"], columns["weight_e"], strict=True
        )
    ]
    return {"header": plain(graph.header), "nodes": nodes, "edges": edges}
