"""Which modules of a Hugging Face model an adapter acts on: linear layers for LoRA, blocks for ReFT."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from preft.adapter_config import AdapterConfig, AdapterError, is_named, matches
from shared.architecture import Architecture


def target_paths(hf: nn.Module, config: AdapterConfig) -> list[str]:
    """Paths of the modules an adapter acts on, in model order; AdapterError if a name or layer is unknown."""
    architecture = Architecture(hf)
    layers = range(architecture.n_layers) if config.layers is None else config.layers
    if unknown := [layer for layer in layers if not 0 <= layer < architecture.n_layers]:
        raise AdapterError(
            f"layers {unknown} are not in this model, which has blocks 0 to {architecture.n_layers - 1}"
        )
    if not layers or len(set(layers)) < len(layers):
        raise AdapterError(f"layers must name blocks once each (None for all), not {list(layers)}")
    paths = (
        _linear_targets(hf, architecture, layers, config) if config.is_lora else _blocks(architecture, layers)
    )
    _check_patterns(config, paths)
    return paths


def _blocks(architecture: Architecture, layers: Iterable[int]) -> list[str]:
    return [architecture.block_path(layer) for layer in sorted(layers)]


def _linear_targets(
    hf: nn.Module, architecture: Architecture, layers: Iterable[int], config: AdapterConfig
) -> list[str]:
    linear = [
        f"{block}.{name}"
        for block in _blocks(architecture, layers)
        for name, module in hf.get_submodule(block).named_modules()
        if is_linear(module)
    ]
    wanted = config.target_modules
    chosen = [path for path in linear if config.is_target(path)]
    strangers = (
        [name for name in wanted if not any(is_named(path, name) for path in linear)]
        if isinstance(wanted, tuple)
        else []
    )
    if strangers or not chosen:
        known = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
        raise AdapterError(_unknown(wanted, strangers) + f" this model; it has {known}")
    _check_experts(architecture, chosen)
    return chosen


def _check_experts(architecture: Architecture, chosen: list[str]) -> None:
    """Layers in a mixture of experts see the tokens of all rows in one line, where no mask of a row's tokens fits."""
    sparse = tuple(
        architecture.block_path(layer, f"{architecture.row.sparse_mlp}.")
        for layer in range(architecture.n_layers)
        if architecture.experts(layer)
    )
    if inside := [path for path in chosen if path.startswith(sparse)]:
        raise AdapterError(
            f"{inside[0]} is inside a mixture of experts, which LoRA does not adapt here: name layers of attention in "
            "target_modules (q_proj, k_proj, v_proj, o_proj), or use a ReFT method"
        )


def _unknown(wanted: Any, strangers: list[str]) -> str:
    if isinstance(wanted, tuple):
        return f"target_modules {sorted(strangers)} are not in"
    one_name = " (a single name is given as a list)" if re.fullmatch(r"\w+", wanted) else ""
    return (
        f"the expression {wanted!r} in target_modules matches the whole path of no linear layer{one_name} of"
    )


def _check_patterns(config: AdapterConfig, paths: list[str]) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        idle = [
            pattern for pattern in getattr(config, name) if not any(matches(pattern, path) for path in paths)
        ]
        if idle:
            raise AdapterError(
                f"{name} {idle} match none of the adapted modules ({paths[0]}, ...): mend or remove them"
            )


def is_linear(module: nn.Module) -> bool:
    """Whether a LoRA can act on the module: nn.Linear, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
