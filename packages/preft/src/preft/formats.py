"""Adapters as files: peft's format with one section more.

    adapter_config.json        what peft and vLLM read, plus "preft": {format_version, method, phase, history,
                               base_model_fingerprint}
    adapter_model.safetensors  base_model.model.PATH.lora_A.weight (R x I) and .lora_B.weight (O x R)

A LoRA of phase all is an ordinary peft adapter. ReFT is saved as the LoRA it is (preft.vllm.residual): module
BLOCK.residual_edit, A = [W | b] of R x (D + 1), B = R^T, scale 1.

Loading is strict: a missing, an unknown or a misshapen tensor is refused by its name, and so is another base model.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from preft.adapters import Adapter, AdapterConfig, AdapterError, Factors, check_mergeable
from preft.vllm.identity import CONFIG_FILE, PHASE_SECTION
from preft.vllm.residual import SITE
from shared.history import History
from shared.serialize import atomic_path, write_json
from shared.tokens import Phase

FORMAT_VERSION = 1
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Keys of peft whose adapters compute something else than W0 x + s B A x with one rank and scale, when they are set.
UNSUPPORTED = (
    "rank_pattern",
    "alpha_pattern",
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
    """What a folder says about itself: the configuration and the fingerprint of the base model (or None)."""

    config: AdapterConfig
    base_model_fingerprint: str | None


def save_adapter(
    adapter: Adapter, folder: Path | str, base_model: str = "", fingerprint: str | None = None
) -> Path:
    """Write an adapter folder that peft (LoRA) and vLLM with this project's plugin load; returns the folder."""
    from safetensors.torch import save_file

    folder = Path(folder)
    with atomic_path(folder) as partial:
        partial.mkdir()
        save_file(adapter_tensors(adapter), partial / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(partial / CONFIG_FILE, peft_config(adapter, base_model, fingerprint))
    return folder


def adapter_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors by name, in float32 on the CPU."""
    return {
        name: tensor.detach().float().cpu().contiguous()
        for path, delta in adapter.parts()
        for name, tensor in _named(path, adapter.config, delta.factors())
    }


def peft_config(adapter: Adapter, base_model: str, fingerprint: str | None) -> dict[str, Any]:
    """The adapter_config.json of an adapter."""
    config = adapter.config
    is_lora = config.method == "lora"
    alpha = (2.0 * config.rank if config.alpha is None else config.alpha) if is_lora else float(config.rank)
    targets = sorted({path.rpartition(".")[2] for path in adapter.paths}) if is_lora else [SITE]
    section = {
        "format_version": FORMAT_VERSION,
        "method": config.method,
        "phase": config.phase.value,
        "history": config.history.value,
        "base_model_fingerprint": fingerprint,
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": alpha,
        "use_rslora": config.rslora,
        "target_modules": targets,
        "layers_to_transform": list(config.layers) if is_lora and config.layers is not None else None,
        "bias": "none",
        "lora_dropout": 0.0,
        PHASE_SECTION: section | ({} if is_lora else {"layers": config.layers}),
    }


def _named(path: str, config: AdapterConfig, factors: Factors) -> list[tuple[str, Tensor]]:
    module = path if config.method == "lora" else f"{path}.{SITE}"
    names = (f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight")
    return list(zip(names, factors))


def read_adapter(folder: Path | str) -> SavedAdapter:
    """Read adapter_config.json; AdapterError where it is missing or of another kind."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{folder} is no adapter folder: it has no {CONFIG_FILE}")
    raw = json.loads(path.read_text(encoding="utf-8"))
    section = raw.get(PHASE_SECTION, {})
    if section.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise AdapterError(
            f"{path} is of format {section['format_version']}; this version reads {FORMAT_VERSION}"
        )
    if unsupported := [key for key in UNSUPPORTED if raw.get(key)]:
        raise AdapterError(f"{path} uses {', '.join(unsupported)}, which this project does not load")
    _check_start(raw.get("init_lora_weights"), path)
    if raw.get("peft_type") != "LORA" or raw.get("bias", "none") != "none":
        raise AdapterError(f"{path}: peft_type must be LORA and bias none")
    return SavedAdapter(_config(raw, section), section.get("base_model_fingerprint"))


def _check_start(start: Any, path: Path) -> None:
    """AdapterError where training started from changed base weights."""
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        raise AdapterError(
            f"{path} uses init_lora_weights={start!r}, which changes the base weights that the adapter belongs to; "
            "save it again with peft's path_initial_model_for_weight_conversion, which makes it an ordinary LoRA"
        )


def _config(raw: dict[str, Any], section: dict[str, Any]) -> AdapterConfig:
    method, is_lora = section.get("method", "lora"), section.get("method", "lora") == "lora"
    layers = raw.get("layers_to_transform") if is_lora else section.get("layers")
    targets = raw.get("target_modules")
    return AdapterConfig(
        method=method,
        rank=raw["r"],
        phase=Phase(section.get("phase", Phase.ALL)),
        alpha=float(raw["lora_alpha"]) if is_lora else None,
        rslora=raw.get("use_rslora", False) if is_lora else False,
        target_modules=_target_names(targets) if is_lora else None,
        layers=None if layers is None else tuple([layers] if isinstance(layers, int) else layers),
        history=History(section.get("history", History.RECOMPUTE)),
    )


def _target_names(targets: Any) -> tuple[str, ...]:
    if not isinstance(targets, list):
        raise AdapterError(
            f"target_modules must be a list of module names, not {targets!r} (a pattern is not supported)"
        )
    return tuple(sorted(targets))


def load_adapter(folder: Path | str, hf: nn.Module, fingerprint: str | None = None) -> Adapter:
    """Load an adapter for a model; AdapterError names every tensor that is missing, unknown or misshapen.

    With `fingerprint`, an adapter that was made for another base model is refused.
    """
    from safetensors.torch import load_file

    saved = read_adapter(folder)
    if fingerprint and saved.base_model_fingerprint not in (None, fingerprint):
        raise AdapterError(
            f"{folder} was trained on a base model with fingerprint {saved.base_model_fingerprint}, this one has "
            f"{fingerprint}; load the model it was trained on"
        )
    weights = Path(folder) / WEIGHTS_FILE
    if not weights.is_file():
        raise AdapterError(f"{folder} has no {WEIGHTS_FILE}")
    tensors = load_file(weights)
    adapter = Adapter.create(hf, saved.config)
    expected = {
        name: tensor
        for path, delta in adapter.parts()
        for name, tensor in _named(path, saved.config, delta.factors())
    }
    _check_tensors(expected, tensors, weights)
    with torch.no_grad():
        for path, delta in adapter.parts():
            (a_name, _), (b_name, _) = _named(path, saved.config, delta.factors())
            delta.load_(Factors(tensors[a_name].float(), tensors[b_name].float()))
    return adapter


def _check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor], where: Path) -> None:
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is not in the model" for name in found if name not in expected]
    faults += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise AdapterError(f"{where} does not fit the model: {'; '.join(faults[:8])}{more}")


def merged_state(adapter: Adapter, hf: nn.Module) -> dict[str, Tensor]:
    """The weights of the adapted linear layers with the adapter merged in, by parameter name.

    AdapterError unless the adapter is a LoRA that acts on all tokens.
    """
    check_mergeable(adapter.config)
    merged = {}
    for path, delta in adapter.parts():
        module: Any = hf.get_submodule(path)
        update_OI = (delta.B_OR @ delta.A_RI * delta.scale).detach().to(module.weight)
        merged[f"{path}.weight"] = module.weight.detach() + (
            update_OI.T if hasattr(module, "nf") else update_OI
        )
    return merged


__all__ = [
    "FORMAT_VERSION",
    "SavedAdapter",
    "adapter_tensors",
    "load_adapter",
    "merged_state",
    "peft_config",
    "read_adapter",
    "save_adapter",
]
