"""Does an adapter folder fit a model, is it sound, and would vLLM serve it? Every fault by name, not only the first.

1. The files: readable, a configuration of a known kind, made for this base model (fingerprint).
2. The tensors: each that is missing, unknown or misshapen, each with a value that is not finite.
3. The method: rows of R orthonormal (DiReFT, LoReFT), to within the rounding of the saved type.
4. The server: a rank that vLLM has buffers for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from preft.adapter_config import AdapterError
from preft.adapter_files import factor_names, read_adapter, read_tensors
from preft.adapters import ORTHONORMAL, Adapter
from preft.formats import tensor_faults
from shared.errors import UserError
from shared.generation.vllm_arguments import lora_rank


@dataclass(frozen=True)
class CheckReport:
    """The faults found, none if the adapter can be loaded and served, and the engine's `max_lora_rank` it needs."""

    faults: list[str]
    max_lora_rank: int | None

    @property
    def ok(self) -> bool:
        return not self.faults


def check_folder(folder: Path | str, hf: nn.Module, fingerprint: str | None = None) -> CheckReport:
    """Check an adapter folder against a Hugging Face model, point by point as in the module's docstring.

    The model's weights are not looked at: it may be on the meta device. Without `fingerprint`, an adapter of any base
    model that it fits is fine.
    """
    try:
        saved, tensors = read_adapter(folder), read_tensors(folder)
        adapter = Adapter.create(hf, saved.config)
    except AdapterError as error:
        return CheckReport([str(error)], None)
    faults = []
    if fingerprint and saved.base_model_fingerprint not in (None, fingerprint):
        faults.append(
            f"it was trained on a base model with fingerprint {saved.base_model_fingerprint}, this one has "
            f"{fingerprint}"
        )
    misfits = tensor_faults(adapter, tensors)
    faults += misfits
    faults += [f"{name} holds values that are not finite" for name in _not_finite(tensors)]
    if not misfits and saved.config.method in ORTHONORMAL:
        faults += _not_orthonormal(adapter, tensors)
    try:
        return CheckReport(faults, lora_rank(max(saved.config.rank, *saved.config.rank_pattern.values(), 0)))
    except UserError as error:
        return CheckReport([*faults, str(error)], None)


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def _not_orthonormal(adapter: Adapter, tensors: Mapping[str, Tensor]) -> list[str]:
    faults = []
    for path in adapter.paths:
        name = factor_names(path, adapter.config)[1]
        saved_DR = tensors[name]
        # Rounding R to its saved type moves an entry of R R^T by at most the type's epsilon.
        tolerance = max(2 * torch.finfo(saved_DR.dtype).eps, 1e-4)
        gram_RR = saved_DR.float().T @ saved_DR.float()
        distance = float((gram_RR - torch.eye(len(gram_RR))).abs().max())
        if not distance <= tolerance:
            faults.append(
                f"{name}: the rows of R are not orthonormal (R R^T is {distance:.2g} off the identity)"
            )
    return faults
