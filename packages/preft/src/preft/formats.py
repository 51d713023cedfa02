"""Adapters to files and back: this project's folders, peft's, and one adapter merged into its model's weights.

Loading is strict: a missing, an unknown or a misshapen tensor is refused by its name, and so is another base model.
The files themselves are in `preft.adapter_files`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from preft.adapter_files import (
    FORMAT_VERSION,
    PREFIX,
    WEIGHTS_FILE,
    SavedAdapter,
    config_file,
    factor_names,
    is_ordinary,
    read_adapter,
    read_tensors,
    write_folder,
)
from preft.adapters import Adapter, AdapterError, Factors, check_mergeable


def save_adapter(
    adapter: Adapter,
    folder: Path | str,
    base_model: str = "",
    fingerprint: str | None = None,
    *,
    strict: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write an adapter folder that this project's loader and vLLM plugin read, and peft if it is an ordinary LoRA.

    Without `strict`, an adapter that is none is written under peft's names too: a loader without this project's code
    then takes a prefill-only LoRA for one on all tokens. Returns the folder.
    """
    saved = _saved(adapter, base_model, fingerprint, strict)
    return write_folder(folder, saved, adapter.paths, adapter_tensors(adapter), dtype)


def peft_config(adapter: Adapter, base_model: str, fingerprint: str | None) -> dict[str, Any]:
    """The adapter_config.json of an adapter."""
    return config_file(_saved(adapter, base_model, fingerprint), list(adapter.paths))


def _saved(adapter: Adapter, base_model: str, fingerprint: str | None, strict: bool = True) -> SavedAdapter:
    strict = strict and not is_ordinary(adapter.config)
    return SavedAdapter(adapter.config, fingerprint, base_model, FORMAT_VERSION, strict)


def adapter_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of an adapter under the names that peft and vLLM know, in float32 on the CPU."""
    return {
        name: tensor.detach().float().cpu().contiguous()
        for path, delta in adapter.parts()
        for name, tensor in zip(factor_names(path, adapter.config), delta.factors())
    }


def load_adapter(folder: Path | str, hf: nn.Module, fingerprint: str | None = None) -> Adapter:
    """Load an adapter for a model; AdapterError names every tensor that is missing, unknown or misshapen.

    With `fingerprint`, an adapter that was made for another base model is refused.
    """
    saved = read_adapter(folder)
    if fingerprint and saved.base_model_fingerprint not in (None, fingerprint):
        raise AdapterError(
            f"{folder} was trained on a base model with fingerprint {saved.base_model_fingerprint}, this one has "
            f"{fingerprint}; load the model it was trained on"
        )
    tensors = read_tensors(folder)
    adapter = Adapter.create(hf, saved.config)
    if faults := tensor_faults(adapter, tensors):
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise AdapterError(f"{folder} does not fit the model: {'; '.join(faults[:8])}{more}")
    load_tensors_(adapter, tensors)
    return adapter


def tensor_faults(adapter: Adapter, found: Mapping[str, Tensor]) -> list[str]:
    """What keeps `found` (peft's names) from being the tensors of an adapter of this shape, one line a tensor.

    The adapter's values are not looked at: it may be on the meta device.
    """
    expected = {
        name: tensor
        for path, delta in adapter.parts()
        for name, tensor in zip(factor_names(path, adapter.config), delta.factors())
    }
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is not in the model" for name in found if name not in expected]
    return faults + [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]


@torch.no_grad()
def load_tensors_(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Set an adapter's factors from tensors under peft's names, which must fit."""
    for path, delta in adapter.parts():
        a_name, b_name = factor_names(path, adapter.config)
        delta.load_(Factors(tensors[a_name].float(), tensors[b_name].float()))


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
    "PREFIX",
    "WEIGHTS_FILE",
    "SavedAdapter",
    "adapter_tensors",
    "load_adapter",
    "load_tensors_",
    "merged_state",
    "peft_config",
    "read_adapter",
    "save_adapter",
    "tensor_faults",
]
