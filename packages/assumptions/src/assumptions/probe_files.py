"""Probes on disk: a JSON card beside one safetensors file; never pickle.

The card states dimension, sites, intercept, family, strength, calibration, both steering scales, span, form, rendering,
labeller, model fingerprint and the rows that chose the probe. Refused on loading: another model's fingerprint or width,
another template or tokenizer, and tensors that are not those the card was written with.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from assumptions.calibration import Calibration
from assumptions.probes import Probe, ProbeSet
from assumptions.rendering import rendering_hash
from shared.errors import UserError
from shared.models import Model
from shared.serialize import read_json, write_json

FORMAT = 2
_TENSORS = ("weight_D", "pattern_D")
_VALUES = tuple(f.name for f in fields(Probe) if f.name not in (*_TENSORS, "dimension"))
_IDENTITY = ("span", "form", "rendering", "fingerprint", "labeller")


def save_probes(folder: Path, probe_set: ProbeSet) -> Path:
    """Write `probes.json` and `probes.safetensors` into the folder; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}": getattr(probe, key).contiguous()
        for name, probe in probe_set.probes.items()
        for key in _TENSORS
    }
    save_file(tensors, folder / "probes.safetensors")
    card = {name: getattr(probe_set, name) for name in (*_IDENTITY, "data_hash", "weights_hash")}
    probes = {name: {key: getattr(probe, key) for key in _VALUES} for name, probe in probe_set.probes.items()}
    trained_on = list(probe_set.trained_on)
    write_json(folder / "probes.json", {"format": FORMAT, **card, "trained_on": trained_on, "probes": probes})
    return folder


def load_probes(folder: Path, model: Model | None = None) -> ProbeSet:
    """Read probes; with a model, UserError when they were fitted on other weights, another width or template."""
    card, tensors = _read(folder)
    try:
        if model is not None:
            _check_model(folder, card, tensors, model)
        probes = {name: _probe(name, row, tensors) for name, row in card["probes"].items()}
        identity = {name: card[name] for name in _IDENTITY}
        loaded = ProbeSet(probes, trained_on=tuple(card["trained_on"]), **identity)
        for name in ("weights_hash", "data_hash"):
            if getattr(loaded, name) != card[name]:
                raise UserError(
                    f"{folder}: {name} is not what the card states; the files do not belong together"
                )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder} holds a damaged probes.json ({error!r}): fit the probes anew") from error
    return loaded


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The card and the tensors."""
    card_path, path = folder / "probes.json", folder / "probes.safetensors"
    for file in (card_path, path):
        if not file.is_file():
            raise UserError(f"{folder} holds no {file.name}; give a folder that `assumptions probe` wrote")
    card = read_json(card_path)
    written = card.get("format") if isinstance(card, dict) else None
    if written != FORMAT:
        raise UserError(f"{card_path} has format {written}, this version reads {FORMAT}: fit the probes anew")
    try:
        return card, load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): fit the probes anew") from error


def _check_model(folder: Path, card: dict[str, Any], tensors: dict[str, Tensor], model: Model) -> None:
    if model.fingerprint != card["fingerprint"]:
        raise UserError(
            f"the probes in {folder} were fitted on a model with fingerprint {card['fingerprint']}, "
            f"this model has {model.fingerprint}: fit probes on it, or load the model they belong to"
        )
    rendering = rendering_hash(model.tokenizer, card["form"])
    if rendering != card["rendering"]:
        raise UserError(
            f"the probes in {folder} were fitted under another chat template or tokenizer "
            f"(rendering {card['rendering']}, this model's is {rendering}): fit them anew, or restore the template"
        )
    width = model.architecture.width
    for name, tensor in sorted(tensors.items()):
        wanted = width * len(card["probes"][name.rpartition(".")[0]]["sites"])
        if tensor.shape != (wanted,):
            raise UserError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, the model is {width} wide; "
                "load the model these probes belong to"
            )


def _probe(name: str, row: dict[str, Any], tensors: dict[str, Tensor]) -> Probe:
    parts: dict[str, Any] = {key: tensors[f"{name}.{key}"] for key in _TENSORS}
    calibration = row["calibration"]
    knots = tuple((x, y) for x, y in calibration["knots"])
    parts |= {"sites": tuple(row["sites"]), "calibration": Calibration(**{**calibration, "knots": knots})}
    return Probe(dimension=name, **{**{key: row[key] for key in _VALUES}, **parts})
