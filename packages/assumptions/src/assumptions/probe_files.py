"""Probes on disk: a JSON card beside one safetensors file; never pickle.

The card states dimension, block, site, intercept, ridge strength, both steering scales, span, rendering, labeller,
model fingerprint and the rows that chose the probe. Loading onto a model with another fingerprint or width is refused.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from assumptions.probes import Probe, ProbeSet
from shared.errors import UserError
from shared.models import Model
from shared.serialize import read_json, write_json

FORMAT = 1
_TENSORS = ("weight_D", "pattern_D")
_NUMBERS = tuple(f.name for f in fields(Probe) if f.name not in (*_TENSORS, "dimension"))


def save_probes(folder: Path, probe_set: ProbeSet) -> Path:
    """Write `probes.json` and `probes.safetensors` into the folder; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}": getattr(probe, key).contiguous()
        for name, probe in probe_set.probes.items()
        for key in _TENSORS
    }
    save_file(tensors, folder / "probes.safetensors")
    card = {
        "format": FORMAT,
        "span": probe_set.span,
        "rendering": probe_set.rendering,
        "fingerprint": probe_set.fingerprint,
        "labeller": probe_set.labeller,
        "data_hash": probe_set.data_hash,
        "trained_on": list(probe_set.trained_on),
        "probes": {
            name: {"site": probe.site} | {key: getattr(probe, key) for key in _NUMBERS}
            for name, probe in probe_set.probes.items()
        },
    }
    write_json(folder / "probes.json", card)
    return folder


def load_probes(folder: Path, model: Model | None = None) -> ProbeSet:
    """Read probes; with a model, UserError when they were fitted on other weights or another width."""
    card_path = folder / "probes.json"
    if not card_path.exists():
        raise UserError(f"{folder} holds no probes.json; give a folder written by save_probes")
    card = read_json(card_path)
    if card["format"] != FORMAT:
        raise UserError(f"{card_path} has format {card['format']}, this version reads {FORMAT}")
    if model is not None and model.fingerprint != card["fingerprint"]:
        raise UserError(
            f"the probes in {folder} were fitted on a model with fingerprint {card['fingerprint']}, "
            f"this model has {model.fingerprint}: fit probes on it, or load the model they belong to"
        )
    tensors = load_file(folder / "probes.safetensors")
    if model is not None:
        _check_width(folder, tensors, model.architecture.width)
    probes = {name: _probe(name, row, tensors) for name, row in card["probes"].items()}
    return ProbeSet(
        probes,
        card["span"],
        card["rendering"],
        card["fingerprint"],
        card["labeller"],
        tuple(card["trained_on"]),
    )


def _check_width(folder: Path, tensors: dict[str, Tensor], width: int) -> None:
    wrong = sorted(name for name, tensor in tensors.items() if tensor.shape != (width,))
    if wrong:
        raise UserError(
            f"{folder}: {wrong[0]} has shape {tuple(tensors[wrong[0]].shape)}, the model is {width} wide; "
            "load the model these probes belong to"
        )


def _probe(name: str, row: dict[str, Any], tensors: dict[str, Tensor]) -> Probe:
    parts: dict[str, Any] = {key: tensors[f"{name}.{key}"] for key in _TENSORS}
    return Probe(dimension=name, **parts, **{key: row[key] for key in _NUMBERS})
