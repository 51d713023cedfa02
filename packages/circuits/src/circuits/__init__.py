"""Neuron circuits: exact, fast and causal. `trace` a prompt, look at the graph, ablate what it shows.

from circuits import trace, write_page
from shared.models import load

graph = trace(load("tinyworld"), "The dogs near the car")
write_page(graph, "circuit.html")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits.attribution import attribute, pose
    from circuits.graph import Graph, load_graph
    from circuits.tracing import trace
    from circuits.view import write_page

_HOMES = {
    "Graph": "circuits.graph",
    "attribute": "circuits.attribution",
    "load_graph": "circuits.graph",
    "pose": "circuits.attribution",
    "trace": "circuits.tracing",
    "write_page": "circuits.view",
}
__all__ = ["Graph", "attribute", "load_graph", "pose", "trace", "write_page"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import circuits` costs nothing."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'circuits' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
