"""Graphs as circuit-tracer / Neuronpedia JSON (digest section 6): opens in the public attribution-graph front ends.

Ids follow the format: neurons `{layer}_{neuron}_{position}`, tokens `E_{token}_{position}`, targets `{n_layers +
1}_{vocabulary id}_{position}`; a neuron's `feature` is the Cantor pairing of layer and neuron. A target without a
vocabulary id of its own (graphs of several prompts combined, two targets of one token) has -1, -2, ... in its place, by
its number. Biases and learned positions, which the format does not know, keep ids of their own and the type of error
nodes. Polarity and what a neuron writes stand in `clerp`. `SCHEMA` states what the format requires; every export is
checked against it in the tests.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuits.graph import EMBEDDING, KINDS, LOGIT, NEURON, Graph
from shared.serialize import write_json

_STRING, _NUMBER = {"type": "string"}, {"type": ["number", "null"]}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_NODE = {
    "node_id": _STRING,
    "feature": {"type": ["integer", "null"]},
    "layer": _STRING,
    "ctx_idx": {"type": "integer"},
    "feature_type": {"enum": ["cross layer transcoder", "embedding", "logit", "mlp reconstruction error"]},
    "jsNodeId": _STRING,
    "clerp": _STRING,
}
_LINK = {"source": _STRING, "target": _STRING, "weight": {"type": "number"}}


def _object(properties: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties | (optional or {})}


SCHEMA: dict[str, Any] = _object(
    {
        "metadata": _object(
            {
                "slug": _STRING,
                "scan": _STRING,
                "prompt_tokens": {"type": "array", "items": _STRING},
                "prompt": _STRING,
            },
            {
                "node_threshold": {"type": "number"},
                "info": {"type": "object"},
                "generation_settings": {"type": "object"},
                "pruning_settings": _object({"node_threshold": _SHARE, "edge_threshold": _SHARE}),
                "schema_version": {"type": "integer"},
            },
        ),
        "qParams": _object(
            {
                "pinnedIds": {"type": "array", "items": _STRING},
                "supernodes": {"type": "array", "items": {"type": "array", "items": _STRING}},
                "linkType": _STRING,
                "clickedId": _STRING,
                "sg_pos": _STRING,
            }
        ),
        "nodes": {
            "type": "array",
            "items": _object(
                _NODE, {"activation": _NUMBER, "influence": _NUMBER, "token_prob": {"type": "number"}}
            ),
        },
        "links": {"type": "array", "items": _object(_LINK)},
    }
)


def neuronpedia(graph: Graph, slug: str | None = None) -> dict[str, Any]:
    """Return the graph in the front end's format; edge weights are direct effects, unnormalised."""
    nodes = [_node(graph, node) for node in range(len(graph))]
    ids = [node["node_id"] for node in nodes]
    header = graph.header
    pruning = {"pruning_settings": header.settings["pruning"]} if "pruning" in header.settings else {}
    return {
        "metadata": {
            "slug": slug or re.sub(r"[^a-z0-9]+", "-", header.prompt.lower()).strip("-") or "graph",
            "scan": header.model,
            "prompt_tokens": header.tokens,
            "prompt": header.prompt,
            "info": {
                "description": f"{header.metric}; conservation error {header.conservation_error:.1e}",
                "generator": {"name": "innerworks circuits", "version": str(header.version)},
            },
            "generation_settings": header.settings
            | {"rules": header.rules, "reference": header.reference, "hashes": header.hashes()},
            **pruning,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": [
            {"source": ids[source], "target": ids[target], "weight": weight}
            for source, target, weight in zip(
                graph.source_e.tolist(), graph.target_e.tolist(), graph.weight_e.tolist(), strict=True
            )
        ],
    }


def write_neuronpedia(graph: Graph, path: Path | str, slug: str | None = None) -> Path:
    """Write the graph as one JSON file in the front end's format; returns its path."""
    path = Path(path)
    write_json(path, neuronpedia(graph, slug))
    return path


def cantor(layer: int, neuron: int) -> int:
    """Return the Cantor pairing of layer and neuron."""
    return (layer + neuron) * (layer + neuron + 1) // 2 + neuron


def target_words(target_ids: Sequence[int]) -> list[int]:
    """Return what stands for each target in its id: its vocabulary id where that is known and no other target's."""
    counts = Counter(target_ids)
    return [
        token if token >= 0 and counts[token] == 1 else -1 - number for number, token in enumerate(target_ids)
    ]


def _node(graph: Graph, node: int) -> dict[str, Any]:
    kind, layer = int(graph.kind_n[node]), int(graph.layer_n[node])
    position, index = int(graph.position_n[node]), int(graph.index_n[node])
    header, total = graph.header, float(graph.total_nK[node].abs().sum())
    base = {"ctx_idx": position, "clerp": graph.label(node), "influence": total}
    if kind == NEURON:
        note = header.notes.get(str(node), "")
        return base | {
            "node_id": f"{layer}_{index}_{position}",
            "jsNodeId": f"{layer}_{index}-0",
            "feature": cantor(layer, index),
            "layer": str(layer),
            "feature_type": "cross layer transcoder",
            "clerp": f"{graph.label(node)} {note}".strip(),
            "activation": float(graph.activation_n[node]),
        }
    if kind == LOGIT:
        token, word = header.target_ids[index], target_words(header.target_ids)[index]
        return base | {
            "node_id": f"{header.n_layers + 1}_{word}_{position}",
            "jsNodeId": f"L_{word}-{position}",
            "feature": token if token >= 0 else None,
            "layer": str(header.n_layers + 1),
            "feature_type": "logit",
            "token_prob": header.target_probabilities[index],
            "is_target_logit": True,
        }
    if kind == EMBEDDING:
        token = header.token_ids[position]
        return base | {
            "node_id": f"E_{token}_{position}",
            "jsNodeId": f"E_{token}-{position}",
            "feature": position,
            "layer": "E",
            "feature_type": "embedding",
        }
    return base | {
        "node_id": f"{layer}_{KINDS[kind]}_{position}",
        "jsNodeId": f"{layer}_{KINDS[kind]}-{position}",
        "feature": None,
        "layer": str(layer) if layer >= 0 else "E",
        "feature_type": "mlp reconstruction error",
    }
