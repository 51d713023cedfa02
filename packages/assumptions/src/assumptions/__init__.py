"""See what a model assumes about its user, and steer it.

    from assumptions import elicit, instrument, capture_features, fit_probes, probe_direction

The names below are the public ones; they are imported on first use, so that `import assumptions` costs nothing.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "DIMENSIONS": "dimensions",
    "Chat": "chats",
    "read_chats": "chats",
    "Instrument": "instruments",
    "instrument": "instruments",
    "ElicitationSettings": "elicitation",
    "elicit": "elicitation",
    "score_chats": "scoring",
    "expected_scores": "token_scores",
    "load_corpus": "corpora",
    "capture_features": "features",
    "ActivationStore": "store",
    "capture_to_store": "store",
    "group_split": "splits",
    "fit_probes": "probes",
    "evaluate_probes": "evaluation",
    "leave_one_source_out_scores": "evaluation",
    "save_probes": "probe_files",
    "load_probes": "probe_files",
    "Direction": "steering",
    "probe_direction": "steering",
    "pattern_direction": "steering",
    "random_directions": "steering",
    "clamp": "steering",
    "Condition": "conditions",
    "answer": "conditions",
    "dosed": "conditions",
    "gated": "gating",
    "search_range": "ranges",
    "converse": "conversation",
    "LexicalJudge": "outcomes",
    "ModelJudge": "outcomes",
}
__all__ = [
    "DIMENSIONS",
    "ActivationStore",
    "Chat",
    "Condition",
    "Direction",
    "ElicitationSettings",
    "Instrument",
    "LexicalJudge",
    "ModelJudge",
    "answer",
    "capture_features",
    "capture_to_store",
    "clamp",
    "converse",
    "dosed",
    "elicit",
    "evaluate_probes",
    "expected_scores",
    "fit_probes",
    "gated",
    "group_split",
    "instrument",
    "leave_one_source_out_scores",
    "load_corpus",
    "load_probes",
    "pattern_direction",
    "probe_direction",
    "random_directions",
    "read_chats",
    "save_probes",
    "score_chats",
    "search_range",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _WHERE:
        raise AttributeError(f"module 'assumptions' has no attribute {name!r}")
    return getattr(import_module(f"assumptions.{_WHERE[name]}"), name)
