"""Sixteen hex digits that identify a model's configuration and weights.

sha256 over the architecture part of the config and over every parameter (name, shape, values), values rounded to
bfloat16 so that one checkpoint has one fingerprint whether it is loaded in float32 or in bfloat16. Models above
`SAMPLED_ABOVE` parameters hash 4096 evenly spaced values of every tensor instead of all of them. Quantised weights are
hashed as stored, so a quantised load has a fingerprint of its own. A remote model has no weights here: its config and
parameter shapes identify it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

SAMPLED_ABOVE = 300_000_000
SAMPLES = 4096
# What does not change the function that the weights compute.
_IGNORED = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}
_IGNORED |= {"_attn_implementation", "attn_implementation", "_commit_hash", "id2label", "label2id"}


def fingerprint(hf: Any) -> str:
    """The fingerprint of a Hugging Face model, as 16 hex digits."""
    digest = hashlib.sha256()
    config = {key: value for key, value in hf.config.to_dict().items() if key not in _IGNORED}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    sampled = sum(parameter.numel() for parameter in hf.parameters()) > SAMPLED_ABOVE
    for name, parameter in sorted(hf.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            digest.update(_bytes(parameter.detach(), sampled))
    return digest.hexdigest()[:16]


def _bytes(values: Tensor, sampled: bool) -> bytes:
    flat = values.reshape(-1)
    if sampled and flat.numel() > SAMPLES:
        flat = flat[torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long().to(flat.device)]
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16)
    return flat.contiguous().cpu().view(torch.uint8).numpy().tobytes()
