"""Prefill-only adapters: trained and served at the bare model's speed.

A few names cover most uses; each is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preft.adapters import Adapter, AdapterConfig, AdapterError
    from preft.composition import Composition, compose
    from preft.evaluate import heldout_loss
    from preft.formats import load_adapter, save_adapter
    from preft.reference import greedy_reference
    from preft.train import TrainConfig, train_adapter

_HOME = {
    "Adapter": "preft.adapters",
    "AdapterConfig": "preft.adapters",
    "AdapterError": "preft.adapters",
    "Composition": "preft.composition",
    "TrainConfig": "preft.train",
    "compose": "preft.composition",
    "greedy_reference": "preft.reference",
    "heldout_loss": "preft.evaluate",
    "load_adapter": "preft.formats",
    "save_adapter": "preft.formats",
    "train_adapter": "preft.train",
}

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "Composition",
    "TrainConfig",
    "compose",
    "greedy_reference",
    "heldout_loss",
    "load_adapter",
    "save_adapter",
    "train_adapter",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'preft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
