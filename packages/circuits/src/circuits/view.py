"""One self-contained, interactive HTML page a graph: nothing is fetched, it opens from a file.

Layers from bottom to top, tokens from left to right; neurons coloured (and shaped) by the sign and sized by the share
of their effect on the chosen target. The page is assets/graph.html with the scripts of SCRIPTS in one, the style and
the data put in. Its Content-Security-Policy allows this very script and style, by hash, and no address; a page that
`circuits view` serves may speak to that server (`live`).

Supernodes are those of `circuits.supernodes`; effects come from `circuits.effects`.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.effects import refusal
from circuits.graph import KINDS, LOGIT, NEURON, Graph
from shared.plots import PALETTE
from shared.serialize import atomic_path, plain

if TYPE_CHECKING:
    from circuits.supernodes import Supernodes

SCRIPTS = (
    "model.js",
    "supernodes.js",
    "layout.js",
    "edges.js",
    "paint.js",
    "panel.js",
    "groups.js",
    "main.js",
)
DIGITS, TOKEN_DIGITS = 6, 4  # significant ones of an edge's weight, and of a token's attribution, in the page
TOKENS = 64  # of a long prompt, those that are shown beside a node


def write_page(
    graph: Graph,
    path: Path | str,
    title: str | None = None,
    *,
    supernodes: "Supernodes | None" = None,
    effects: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the graph's page; returns its path."""
    path = Path(path)
    content = page(graph, title or graph.header.prompt, supernodes=supernodes, effects=effects)
    with atomic_path(path) as partial:
        partial.write_text(content, encoding="utf-8")
    return path


def page(
    graph: Graph,
    title: str,
    *,
    supernodes: "Supernodes | None" = None,
    effects: Sequence[Mapping[str, Any]] = (),
    live: str | None = None,
) -> str:
    """Return the page as one string of HTML; `live` is the address below which a server answers it."""
    groups = plain(supernodes) if supernodes else {"supernodes": []}
    data = page_data(graph) | {"supernodes": groups, "effects": plain(effects), "live": live}
    style, script = palette() + asset("base.css") + asset("graph.css"), script_of(SCRIPTS)
    return fill(
        asset("graph.html"),
        CSP=policy(style, script, connect=live is not None),
        TITLE=html.escape(title),
        CSS=style,
        DATA=embedded(data),
        JS=script,
    )


def page_data(graph: Graph) -> dict[str, Any]:
    """Return what the page shows as JSON types: the header, nodes, and edges as columns."""
    columns = {name: column.tolist() for name, column in graph.columns().items()}
    tokens = token_rows(graph)
    nodes = [
        {
            "kind": KINDS[columns["kind_n"][node]],
            "layer": columns["layer_n"][node],
            "position": columns["position_n"][node],
            "index": columns["index_n"][node],
            "activation": columns["activation_n"][node],
            "total": columns["total_nK"][node],
            "own": columns["own_n"][node],
            "remainder": columns["remainder_n"][node],
            "label": graph.label(node),
            "note": graph.header.notes.get(str(node), ""),
            "tokens": tokens[node],
        }
        for node in range(len(graph))
    ]
    weights = [rounded(weight, DIGITS) for weight in columns["weight_e"]]
    edges = {"source": columns["source_e"], "target": columns["target_e"], "weight": weights}
    return {"header": plain(graph.header), "nodes": nodes, "edges": edges, "refusal": refusal(graph)}


def token_rows(graph: Graph) -> list[list[float]]:
    """Return the attribution of every neuron and target to the prompt's tokens, then that to all of them together.

    The strongest TOKENS stand alone and the others are zero, so that long prompts do not make long pages; other nodes
    have no row.
    """
    few = min(TOKENS, graph.token_nT.shape[1])
    rest_nT = graph.token_nT.scatter(1, graph.token_nT.abs().topk(few).indices, 0.0)
    rows = [*(graph.token_nT - rest_nT).tolist()]
    sums, has = graph.token_nT.sum(1).tolist(), (graph.kind_n == NEURON) | (graph.kind_n == LOGIT)
    return [
        [rounded(value, TOKEN_DIGITS) for value in row] + [total] if mapped else []
        for row, total, mapped in zip(rows, sums, has.tolist(), strict=True)
    ]


def rounded(value: float, digits: int) -> float:
    """Return a number with some significant digits."""
    return float(f"{value:.{digits}g}")


def asset(name: str) -> str:
    """Return the text of a file of assets/."""
    return (resources.files("circuits") / "assets" / name).read_text(encoding="utf-8")


def script_of(names: Sequence[str]) -> str:
    """Return script files as one, in strict mode."""
    return "\n".join(['"use strict";', *map(asset, names)])


def embedded(data: Any) -> str:
    """Return data as JSON that may stand inside a script element ("<" as an escape, so that it cannot end it)."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def fill(document: str, **parts: str) -> str:
    """Return the document with each __NAME__, which occur once and in this order, replaced by its part."""
    pieces = []
    for name, part in parts.items():
        before, document = document.split(f"__{name}__")
        pieces += [before, part]
    return "".join([*pieces, document])


def policy(style: str, script: str, connect: bool) -> str:
    """Return a Content-Security-Policy for a page with this style and script and no other content."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    speaks_to = "'self'" if connect else "'none'"
    return (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; "
        f"connect-src {speaks_to}; base-uri 'none'; form-action 'none'"
    )


def palette() -> str:
    """Return the house colours as CSS variables."""
    colours = "; ".join(f"--colour{i}: {colour}" for i, colour in enumerate(PALETTE))
    return f":root {{ {colours}; }}\n"
