"""Adapters as low-rank updates by kind of token: read from folders, summed, and written as folders that are served.

1. A phase is a set of kinds of token (prompt, boundary, generated; `preft.vllm.mapping`), so any adapter is three
   updates, one a kind: for every module that it touches A and B, its scale folded into B.
2. The sum of adapters i with weights w_i is, for each kind and module, the concatenation

       A = [A_1; A_2; ...]     B = [w_1 B_1, w_2 B_2, ...]

3. Where the update is the same for all kinds on which anything acts, and those kinds are a phase, the result is an
   ordinary adapter folder of that phase. Otherwise it is a folder of parts, one for each different update:

       adapter_config.json   "preft": {"method": "composition", "parts": [{"folder": "part-0", "tokens": [kinds]}, ...]}
       part-0/, part-1/ ...  adapter folders; on which tokens they act is said above, not in them

   It has no weights of its own, so that a loader which does not know parts refuses it.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from preft.adapter_files import FORMAT_VERSION, PREFIX, WEIGHTS_FILE, read_adapter, read_tensors
from preft.adapters import Adapter, AdapterError, Factors, LoRADelta
from preft.vllm.identity import COMPOSITION, CONFIG_FILE, PHASE_SECTION, holds_interventions
from preft.vllm.mapping import KINDS, Kind
from preft.vllm.residual import SITE
from preft.vllm.strict import STRICT_TYPE, strict_name
from shared.history import History
from shared.serialize import atomic_path, read_json, write_json
from shared.tokens import Phase

Update = dict[str, Factors]  # by the module's name in adapter files, scale and weight folded into B
ByKind = tuple[Update, ...]


class Shape(NamedTuple):
    """Blocks and width of the model that an adapter was made for."""

    n_layers: int
    width: int


class Source(NamedTuple):
    """What an adapter does to each kind of token, and what it says about its history policy and base model.

    `history` is None where it asks for neither policy; `shape` where the modules alone say what fits.
    """

    by_kind: ByKind
    history: History | None = None
    base_model: str = ""
    fingerprint: str | None = None
    shape: Shape | None = None


def source_of(adapter: Adapter) -> Source:
    """The updates of an adapter in memory."""
    update: Update = {}
    with torch.no_grad():
        for path, delta in adapter.parts():
            is_lora = isinstance(delta, LoRADelta)
            factors = Factors(*(factor.detach().float().cpu() for factor in delta.factors()))
            update[path if is_lora else f"{path}.{SITE}"] = _weighted(
                factors, delta.scale if is_lora else 1.0
            )
    phase = adapter.config.phase
    return Source(_on_phase(update, phase), None if phase is Phase.ALL else adapter.config.history)


def read_source(folder: Path | str) -> Source:
    """The updates of a saved adapter or of saved interventions; UserError with the reason where they are unusable."""
    folder = Path(folder)
    if holds_interventions(folder):
        from preft.intervention_adapters import read_interventions

        return read_interventions(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(f"{folder} is no adapter folder: it has no {CONFIG_FILE}")
    raw = read_json(folder / CONFIG_FILE)
    section = raw.get(PHASE_SECTION, {})
    if section.get("method") != COMPOSITION:
        return _read_plain(folder, raw)
    history = section["history"] and History(section["history"])
    shape = Shape(**section["base_model_shape"]) if section.get("base_model_shape") else None
    origin = (history, raw["base_model_name_or_path"], section["base_model_fingerprint"], shape)
    if "parts" not in section:
        return Source(_on_phase(_read_update(folder), Phase(section["phase"])), *origin)
    by_kind: list[Update] = [{} for _ in Kind]
    for part in section["parts"]:
        update = _read_update(folder / part["folder"])
        for kind in part["tokens"]:
            by_kind[Kind[kind.upper()]] = update
    return Source(tuple(by_kind), *origin)


def _read_plain(folder: Path, raw: dict[str, Any]) -> Source:
    saved = read_adapter(folder)
    update = _read_update(folder, saved.config.scale_of)
    history = None if saved.config.phase is Phase.ALL else saved.config.history
    base_model = raw.get("base_model_name_or_path") or ""
    return Source(_on_phase(update, saved.config.phase), history, base_model, saved.base_model_fingerprint)


def _on_phase(update: Update, phase: Phase) -> ByKind:
    return tuple(update if acts else {} for acts in KINDS[phase])


def _read_update(folder: Path, scale_of: Callable[[str], float] = lambda _: 1.0) -> Update:
    tensors = read_tensors(folder)
    ends = (".lora_A.weight", ".lora_B.weight")
    modules = {
        name.removeprefix(PREFIX).removesuffix(ends[0]).removesuffix(ends[1]): name for name in tensors
    }
    update = {}
    for module in modules:
        pair = [tensors.pop(f"{PREFIX}{module}{end}", None) for end in ends]
        if pair[0] is None or pair[1] is None or pair[0].shape[0] != pair[1].shape[1]:
            raise AdapterError(f"{folder / WEIGHTS_FILE}: {module} has no pair lora_A, lora_B of one rank")
        update[module] = _weighted(Factors(pair[0].float(), pair[1].float()), scale_of(module))
    return update


def _weighted(factors: Factors, weight: float) -> Factors:
    return Factors(factors.A, factors.B * weight)


def sum_sources(sources: Sequence[tuple[Source, float]]) -> Source:
    """The sum of adapters with weights; AdapterError where they belong to different models or history policies."""
    only = [source for source, _ in sources]
    by_kind = tuple(
        _sum([(source.by_kind[kind], weight) for source, weight in sources if weight]) for kind in Kind
    )
    fingerprints = {source.fingerprint for source in only} - {None}
    shapes = {source.shape for source in only} - {None}
    if len(fingerprints) > 1 or len(shapes) > 1:
        found = ", ".join(sorted(map(str, fingerprints if len(fingerprints) > 1 else shapes)))
        raise AdapterError(f"adapters of different base models ({found}) cannot act together")
    base_models = sorted({source.base_model for source in only} - {""})
    histories = {source.history for source in only}
    return Source(
        by_kind,
        None if histories == {None} else common_history(only),
        base_models[0] if base_models else "",
        next(iter(fingerprints), None),
        next(iter(shapes), None),
    )


def highest_rank(source: Source) -> int:
    """The highest rank at any module; 1 where nothing is adapted."""
    return max((len(factors.A) for update in source.by_kind for factors in update.values()), default=1)


def common_history(sources: Sequence[Source]) -> History:
    """The one history policy of adapters that act together; AdapterError where there are two."""
    policies = {source.history for source in sources} - {None}
    if len(policies) > 1:
        raise AdapterError(
            "adapters trained with history 'recompute' and 'sticky' do not agree on what earlier answers are; "
            "compose adapters of one policy"
        )
    return next(iter(policies), None) or History.RECOMPUTE


def _sum(updates: Sequence[tuple[Update, float]]) -> Update:
    gathered: dict[str, list[Factors]] = {}
    for update, weight in updates:
        for module, factors in update.items():
            gathered.setdefault(module, []).append(_weighted(factors, weight))
    return {module: _concatenated(module, several) for module, several in gathered.items()}


def _concatenated(module: str, several: list[Factors]) -> Factors:
    if len({(A.shape[1], B.shape[0]) for A, B in several}) > 1:
        raise AdapterError(f"the adapters have different shapes at {module}: they belong to different models")
    return Factors(torch.cat([A for A, _ in several]), torch.cat([B for _, B in several], dim=1))


def save_source(source: Source, folder: Path | str) -> Path:
    """Write the updates as an adapter folder, whole or not at all; returns the folder."""
    folder = Path(folder)
    kinds_of: dict[str, list[Kind]] = {}
    for kind in Kind:
        if source.by_kind[kind]:
            kinds_of.setdefault(_digest(source.by_kind[kind]), []).append(kind)
    parts = [(source.by_kind[kinds[0]], kinds) for kinds in kinds_of.values()]
    phase = _phase_of([kind for _, kinds in parts for kind in kinds]) if len(parts) == 1 else None
    with atomic_path(folder) as partial:
        partial.mkdir()
        if phase is not None:
            _write(partial, source, parts[0][0], {"phase": phase.value})
        else:
            _write_parts(partial, source, parts)
    return folder


def _phase_of(kinds: list[Kind]) -> Phase | None:
    return next((phase for phase, acts in KINDS.items() if [k for k in Kind if acts[k]] == kinds), None)


def _write_parts(folder: Path, source: Source, parts: list[tuple[Update, list[Kind]]]) -> None:
    entries = []
    for number, (update, kinds) in enumerate(parts):
        name = f"part-{number}"
        (folder / name).mkdir()
        _write(folder / name, source, update, {"phase": Phase.ALL.value})
        entries.append({"folder": name, "tokens": [kind.name.lower() for kind in kinds]})
    whole = {module: factors for update, _ in parts for module, factors in update.items()}
    write_json(folder / CONFIG_FILE, _config(source, whole, {"parts": entries}))


def _write(folder: Path, source: Source, update: Update, section: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    tensors = {strict_name(name): tensor for name, tensor in _tensors(update).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, _config(source, update, section))


def _config(source: Source, update: Update, section: dict[str, Any]) -> dict[str, Any]:
    """adapter_config.json as vLLM reads it, and peft refuses it: scale 1 everywhere, the highest rank as `r`."""
    ranks = {module: len(update[module].A) for module in sorted(update)}
    rank = max(ranks.values(), default=1)
    lower = {module: own for module, own in ranks.items() if own != rank}
    return {
        "peft_type": STRICT_TYPE,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": source.base_model,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "use_rslora": False,
        "target_modules": sorted({module.rpartition(".")[2] for module in update}),
        "bias": "none",
        "lora_dropout": 0.0,
        PHASE_SECTION: {
            "format_version": FORMAT_VERSION,
            "method": COMPOSITION,
            "history": None if source.history is None else source.history.value,
            "base_model_fingerprint": source.fingerprint,
            "base_model_shape": None if source.shape is None else source.shape._asdict(),
        }
        | section,
    }


def _tensors(update: Update) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{module}.{name}.weight": tensor.contiguous()
        for module, factors in update.items()
        for name, tensor in zip(("lora_A", "lora_B"), factors)
    }


def _digest(update: Update) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(update).items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


__all__ = [
    "ByKind",
    "Source",
    "Update",
    "highest_rank",
    "read_source",
    "save_source",
    "source_of",
    "sum_sources",
]
