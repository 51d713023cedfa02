"""The file format of interventions: one JSON that says what they are, one safetensors file with their tensors.

    interventions.json         format, version, model (fingerprint, family, layers, width), interventions
    interventions.safetensors  tensors named "<number of the intervention>.<field>"

Reading refuses, with the reason: another format or version, another model, a site the model lacks, a tensor that is
missing, unexpected or misshapen, a key that is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from shared.architecture import SiteError
from shared.interventions import KINDS, Add, Intervention, InterventionError, LowRank, check_fit
from shared.serialize import atomic_path

if TYPE_CHECKING:
    from shared.models import Model

FORMAT = "innerworks.interventions"
VERSION = 1
JSON_NAME = "interventions.json"
TENSORS_NAME = "interventions.safetensors"


def save(folder: str | Path, interventions: Sequence[Intervention], model: Model) -> Path:
    """Write the two files into a folder (made if missing), whole or not at all; returns the folder."""
    from safetensors.torch import save_file

    folder = Path(folder)
    entries: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for number, intervention in enumerate(interventions):
        check_fit(intervention, model.architecture)
        entry, own = _to_entry(intervention)
        entries.append(entry)
        tensors.update({f"{number}.{name}": tensor for name, tensor in own.items()})
    document = {"format": FORMAT, "version": VERSION, "model": _identity(model), "interventions": entries}
    text = json.dumps(document, indent=2) + "\n"
    # Both are written whole before either is replaced; the inner block ends first, so the JSON comes last.
    with atomic_path(folder / JSON_NAME) as json_path, atomic_path(folder / TENSORS_NAME) as tensors_path:
        json_path.write_text(text)
        save_file(tensors, tensors_path)
    return folder


@dataclass(frozen=True)
class SavedInterventions:
    """What a folder holds: the interventions, and the model they were made for.

    `model` has its name, fingerprint, family, n_layers, width and n_neurons.
    """

    interventions: list[Intervention]
    model: dict[str, Any]


def read(folder: str | Path) -> SavedInterventions:
    """Read the two files without a model; `InterventionError` with the reason when they are damaged."""
    folder = Path(folder)
    return _read_entries(folder, _read_document(folder))


def load(folder: str | Path, model: Model, allow_other: bool = False) -> list[Intervention]:
    """Read the two files for a model; `InterventionError` with the reason when they do not fit."""
    folder = Path(folder)
    document = _read_document(folder)
    _check_model(document.get("model", {}), model, allow_other)
    loaded = _read_entries(folder, document).interventions
    for number, intervention in enumerate(loaded):
        try:
            check_fit(intervention, model.architecture)
        except SiteError as error:
            raise InterventionError(f"Intervention {number} does not fit: {error}") from None
    return loaded


def served_rank(saved: SavedInterventions) -> int:
    """Rank of the low-rank update on (h, 1) that serves these edits: at most the sum over the edits of one site."""
    ranks: dict[str, int] = {}
    for edit in saved.interventions:
        match edit:
            case Add():
                rank = 1
            case LowRank():
                rank = len(edit.A_RD) + (edit.bias_D is not None)
            case _:
                rank = saved.model["width"] if edit.indices is None else len(edit.indices)
        ranks[edit.site] = ranks.get(edit.site, 0) + rank
    return max(ranks.values(), default=1)


def _read_entries(folder: Path, document: dict[str, Any]) -> SavedInterventions:
    tensors = _read_tensors(folder)
    loaded = []
    for number, entry in enumerate(document["interventions"]):
        own = {name.partition(".")[2]: tensors[name] for name in tensors if name.startswith(f"{number}.")}
        loaded.append(_from_entry(number, entry, own))
    extra = [name for name in tensors if not _known(name, len(loaded))]
    if extra:
        raise InterventionError(
            f"{folder / TENSORS_NAME} holds tensors of no intervention: {', '.join(extra)}."
        )
    return SavedInterventions(loaded, document.get("model", {}))


def _known(name: str, count: int) -> bool:
    number = name.partition(".")[0]
    return number.isdecimal() and int(number) < count


def _identity(model: Model) -> dict[str, Any]:
    shape = model.architecture
    return {
        "name": model.config.name,
        "fingerprint": model.fingerprint,
        "family": shape.family,
        "n_layers": shape.n_layers,
        "width": shape.width,
        "n_neurons": shape.n_neurons,
    }


def _to_entry(intervention: Intervention) -> tuple[dict[str, Any], dict[str, Tensor]]:
    kind = next(name for name, cls in KINDS.items() if type(intervention) is cls)
    entry: dict[str, Any] = {"kind": kind}
    tensors: dict[str, Tensor] = {}
    for item in fields(intervention):
        value = getattr(intervention, item.name)
        if isinstance(value, Tensor):
            tensors[item.name] = (
                value.detach().cpu().contiguous().clone()
            )  # shared memory is refused by the format
        else:
            entry[item.name] = list(value) if isinstance(value, tuple) else value
    entry["tensors"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return entry, tensors


def _from_entry(number: int, entry: dict[str, Any], tensors: dict[str, Tensor]) -> Intervention:
    where = f"Intervention {number}"
    values = dict(entry)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise InterventionError(f"{where}: unknown kind {kind!r}; known are {', '.join(KINDS)}.")
    shapes = values.pop("tensors", {})
    missing, extra = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing or extra:
        raise InterventionError(
            f"{where} ({kind}): tensors missing {missing or 'none'}, unexpected {extra or 'none'}."
        )
    for name, shape in shapes.items():
        if list(tensors[name].shape) != shape:
            raise InterventionError(
                f"{where} ({kind}): {name} has shape {list(tensors[name].shape)}, expected {shape}."
            )
    values |= tensors
    known = {item.name: item for item in fields(KINDS[kind])}
    unknown = sorted(set(values) - set(known))
    required = {name for name, item in known.items() if item.default is MISSING}
    if unknown or required - set(values):
        raise InterventionError(
            f"{where} ({kind}): unknown fields {unknown or 'none'}, missing {sorted(required - set(values)) or 'none'}."
        )
    return KINDS[kind](**values)


def _read_document(folder: Path) -> dict[str, Any]:
    path = folder / JSON_NAME
    if not path.is_file():
        raise InterventionError(f"{path} does not exist: this folder holds no interventions.")
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InterventionError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InterventionError(f"{path} is not a file of interventions (format {FORMAT!r} expected).")
    if document.get("version") != VERSION:
        raise InterventionError(
            f"{path} has format version {document.get('version')!r}; this release reads {VERSION}. "
            "Use the release it was written with, or save it again."
        )
    return document


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / TENSORS_NAME
    if not path.is_file():
        raise InterventionError(f"{path} does not exist: the tensors of these interventions are missing.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InterventionError(f"{path} is damaged: {error}.") from None


def _check_model(saved: dict[str, Any], model: Model, allow_other: bool) -> None:
    own = _identity(model)
    for key in ("family", "n_layers", "width", "n_neurons"):
        if saved.get(key) != own[key]:
            raise InterventionError(
                f"Made for {saved.get('name')!r} with {key} {saved.get(key)!r}; this model has {own[key]!r}."
            )
    if saved.get("fingerprint") != own["fingerprint"] and not allow_other:
        raise InterventionError(
            f"Made for {saved.get('name')!r} with fingerprint {saved.get('fingerprint')}; this model is "
            f"{own['fingerprint']}. Load that checkpoint, or pass allow_other=True to use it on this one."
        )
