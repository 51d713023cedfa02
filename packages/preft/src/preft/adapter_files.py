"""The two files of an adapter folder, read and written without a model.

    adapter_config.json        what peft and vLLM read, plus "preft": {format_version, method, phase, history,
                               base_model_fingerprint, and for ReFT layers and rank_pattern}
    adapter_model.safetensors  base_model.model.PATH.lora_A.weight (R x I) and .lora_B.weight (O x R)

A LoRA of phase all is an ordinary peft adapter. Every other one is strict by default: peft_type and tensor names are
such that loaders without this project's code refuse it (preft.vllm.strict). Format 1 had no strict folders.

ReFT is saved as the LoRA it is (preft.vllm.residual): module BLOCK.residual_edit, A = [W | b] of R x (D + 1), B = R^T,
scale 1.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preft.adapter_config import AdapterConfig, AdapterError
from preft.vllm.identity import COMPOSITION, CONFIG_FILE, PHASE_SECTION, WEIGHT_FILES
from preft.vllm.residual import SITE
from preft.vllm.strict import PEFT_TYPE, STRICT_TYPE, plain_name, strict_name
from shared.config import ConfigError, to_dataclass
from shared.history import History
from shared.serialize import atomic_path, write_json
from shared.tokens import Phase

FORMAT_VERSION = 2
WEIGHTS_FILE = WEIGHT_FILES[0]
PREFIX = "base_model.model."
# Keys of peft whose adapters compute something else than W0 x + s B A x, or at other places, when they are set.
UNSUPPORTED = (
    "exclude_modules",
    "target_parameters",
    "trainable_token_indices",
    "modules_to_save",
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# As in vLLM 0.32: these only choose where training starts. Any other named start (PiSSA, OLoRA, CorDA, LoftQ) is taken
# out of the base weights, so that the saved A and B belong to weights that are not the base model's.
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


@dataclass(frozen=True)
class SavedAdapter:
    """What a folder says about itself: configuration, base model (fingerprint or None; name or ""), format."""

    config: AdapterConfig
    base_model_fingerprint: str | None
    base_model: str = ""
    format_version: int | None = None  # None: peft's own, without a section of this project
    strict: bool = False


def is_ordinary(config: AdapterConfig) -> bool:
    """Whether any loader of peft's format does with the adapter what it means: a LoRA on all tokens."""
    return config.is_lora and config.phase == Phase.ALL


def factor_names(path: str, config: AdapterConfig) -> tuple[str, str]:
    """Names of A and B of the module at `path`, in peft's format."""
    module = path if config.is_lora else f"{path}.{SITE}"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def write_folder(
    folder: Path | str,
    saved: SavedAdapter,
    paths: Iterable[str],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write an adapter folder, whole or not at all; `tensors` have peft's names. Returns the folder.

    AdapterError where a strict folder is asked for an adapter that any loader may read, and where a value is too large
    for `dtype`.
    """
    from safetensors.torch import save_file

    if saved.strict and is_ordinary(saved.config):
        raise AdapterError(
            "a LoRA on all tokens is an ordinary peft adapter: there is nothing to keep from others"
        )
    folder = Path(folder)
    named = strict_name if saved.strict else str
    with atomic_path(folder) as partial:
        partial.mkdir()
        content = {named(name): _stored(name, tensor, dtype) for name, tensor in tensors.items()}
        save_file(content, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(partial / CONFIG_FILE, config_file(saved, list(paths)))
    return folder


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    stored = tensor.detach().to("cpu", dtype).contiguous()
    if not torch.equal(stored.isfinite(), tensor.detach().cpu().isfinite()):
        kind = str(dtype).removeprefix("torch.")
        raise AdapterError(
            f"{name} has values above {torch.finfo(dtype).max:.4g}, the largest of {kind}: write bfloat16 or float32"
        )
    return stored


def config_file(saved: SavedAdapter, paths: list[str]) -> dict[str, Any]:
    """The content of adapter_config.json; `paths` are the modules (for ReFT: blocks) that the adapter acts on."""
    config = saved.config
    content = {
        "peft_type": STRICT_TYPE if saved.strict else PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": saved.base_model,
        "r": config.rank,
        "lora_alpha": config.base_alpha,
        "use_rslora": config.rslora,
        "bias": "none",
        "lora_dropout": 0.0,
        **(_lora_places(config, paths) if config.is_lora else _reft_places(config, paths)),
    }
    return content if saved.format_version is None else content | {PHASE_SECTION: _section(saved)}


def _lora_places(config: AdapterConfig, paths: list[str]) -> dict[str, Any]:
    chosen: Any = config.target_modules
    if chosen is None or config.targets_all:
        chosen = sorted({path.rpartition(".")[2] for path in paths})
    return {
        "target_modules": list(chosen) if isinstance(chosen, tuple) else chosen,
        "layers_to_transform": None if config.layers is None else list(config.layers),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }


def _reft_places(config: AdapterConfig, paths: list[str]) -> dict[str, Any]:
    # vLLM divides alpha by rank: with alpha = rank everywhere the scale is 1.
    ranks = {f"{path}.{SITE}": config.rank_of(path) for path in paths if config.rank_of(path) != config.rank}
    return {"target_modules": [SITE], "rank_pattern": ranks, "alpha_pattern": ranks}


def _section(saved: SavedAdapter) -> dict[str, Any]:
    config = saved.config
    places = {} if config.is_lora else {"layers": config.layers, "rank_pattern": config.rank_pattern}
    return {
        "format_version": FORMAT_VERSION,
        "method": config.method,
        "phase": config.phase.value,
        "history": config.history.value,
        "base_model_fingerprint": saved.base_model_fingerprint,
        **places,
    }


def read_adapter(folder: Path | str) -> SavedAdapter:
    """Read adapter_config.json; AdapterError where it is missing or of another kind."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{folder} is no adapter folder: it has no {CONFIG_FILE}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is no JSON: {error}") from error
    section = raw.get(PHASE_SECTION) if isinstance(raw, dict) else raw
    if not isinstance(raw, dict) or not (section is None or isinstance(section, dict)):
        raise AdapterError(f"{path} must hold an object, and so must its section {PHASE_SECTION!r}")
    _check_kind(raw, section, path)
    try:
        config = _config(raw, section or {})
    except (ConfigError, KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise AdapterError(f"{path}: {reason}") from error
    return SavedAdapter(
        config,
        (section or {}).get("base_model_fingerprint"),
        raw.get("base_model_name_or_path") or "",
        None if section is None else section.get("format_version", 1),
        raw["peft_type"] == STRICT_TYPE,
    )


def _check_kind(raw: dict[str, Any], section: dict[str, Any] | None, path: Path) -> None:
    version = (section or {}).get("format_version", FORMAT_VERSION)
    if type(version) is not int or version > FORMAT_VERSION:
        raise AdapterError(f"{path} is of format {version}; this version reads up to {FORMAT_VERSION}")
    if (section or {}).get("method") == COMPOSITION:
        raise AdapterError(
            f"{path} is a composition of adapters, not one adapter: it can be served and composed only"
        )
    if unsupported := [key for key in UNSUPPORTED if raw.get(key)]:
        raise AdapterError(f"{path} uses {', '.join(unsupported)}, which this project does not load")
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        raise AdapterError(
            f"{path} uses init_lora_weights={start!r}, which changes the base weights that the adapter belongs to; "
            "save it again with peft's path_initial_model_for_weight_conversion, which makes it an ordinary LoRA"
        )
    if raw.get("peft_type") not in (PEFT_TYPE, STRICT_TYPE) or raw.get("bias", "none") != "none":
        raise AdapterError(f"{path}: peft_type must be {PEFT_TYPE} (or {STRICT_TYPE}) and bias none")
    if raw["peft_type"] == STRICT_TYPE and section is None:
        raise AdapterError(f"{path} is of type {STRICT_TYPE} but has lost its section {PHASE_SECTION!r}")


def _config(raw: dict[str, Any], section: dict[str, Any]) -> AdapterConfig:
    """The configuration, its values checked against their types (`to_dataclass`)."""
    values: dict[str, Any] = {
        "method": section.get("method", "lora"),
        "rank": raw["r"],
        "phase": section.get("phase", Phase.ALL),
        "history": section.get("history", History.RECOMPUTE),
    }
    if values["method"] != "lora":
        places = {"layers": _layers(section.get("layers")), "rank_pattern": section.get("rank_pattern") or {}}
        return to_dataclass(AdapterConfig, values | places)
    targets, alpha = raw["target_modules"], raw["lora_alpha"]
    if not targets:
        raise AdapterError("target_modules names no module")
    if alpha is None:
        raise AdapterError("lora_alpha is not set")
    values |= {
        "alpha": alpha,
        "rslora": raw.get("use_rslora") or False,
        "target_modules": targets if isinstance(targets, str) else sorted(targets, key=str),
        "layers": _layers(raw.get("layers_to_transform")),
        "rank_pattern": raw.get("rank_pattern") or {},
        "alpha_pattern": raw.get("alpha_pattern") or {},
    }
    return to_dataclass(AdapterConfig, values)


def _layers(given: Any) -> Any:
    # peft takes one number too, and an empty list for all.
    return [given] if isinstance(given, int) else given or None


def read_tensors(folder: Path | str) -> dict[str, Tensor]:
    """The tensors of an adapter folder under peft's names; AdapterError where there are none, or more than tensors."""
    files = [Path(folder) / name for name in WEIGHT_FILES if (Path(folder) / name).is_file()]
    if not files:
        raise AdapterError(f"{folder} has no {WEIGHTS_FILE}")
    found = read_tensor_file(files[0])
    tensors = {plain_name(name): tensor for name, tensor in found.items()}
    if len(tensors) < len(found):
        raise AdapterError(f"{files[0]} holds a tensor under both of its names")
    return tensors


def factors_by_path(tensors: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every module, by its path; AdapterError where a name, a rank or one of the two is not as it should be.

    This needs no model, and so cannot tell whether all modules are there (`preft.formats.tensor_faults` can).
    """
    suffixes = factor_names("", config)
    paths = dict.fromkeys(
        name.removesuffix(suffix.removeprefix(PREFIX)).removeprefix(PREFIX)
        for name in tensors
        for suffix in suffixes
        if name.startswith(PREFIX) and name.endswith(suffix.removeprefix(PREFIX))
    )
    names = {path: factor_names(path, config) for path in paths}
    strangers = set(tensors) - {name for pair in names.values() for name in pair}
    halves = {name for pair in names.values() for name in pair} - set(tensors)
    if strangers or halves:
        wrong = (
            f"{sorted(strangers)[0]} is no tensor of" if strangers else f"{sorted(halves)[0]} is missing in"
        )
        raise AdapterError(f"{wrong} an adapter of method {config.method}")
    found = {path: (tensors[a_name], tensors[b_name]) for path, (a_name, b_name) in names.items()}
    for path, (a_RI, b_OR) in found.items():
        ranks = a_RI.shape[0], b_OR.shape[-1], config.rank_of(path)
        if len(set(ranks)) > 1:
            raise AdapterError(
                f"rank of {path}: A has {ranks[0]}, B has {ranks[1]}, the configuration {ranks[2]}"
            )
    return found


def read_tensor_file(path: Path) -> dict[str, Tensor]:
    """A safetensors file, or a .bin/.pt file that holds nothing but named tensors (no pickled code is run)."""
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterError(f"{path} is damaged, or holds more than tensors ({reason})") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise AdapterError(f"{path} does not hold tensors by name")
    return tensors
