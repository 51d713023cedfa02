"""Bytes that adapters take on the device: slots x what one slot holds, however many adapters there are.

vLLM allocates the slots when it loads the model, at the engine's rank, for every module it can adapt; with W_l the
linear layers of the blocks (in_l x out_l), vocabulary V, width D and L blocks, one slot of rank r holds

    r * ( sum_l (in_l + out_l)            linear layers
        + V + D  (+ V + D)                embedding (and unembedding, where its weights are its own)
        + L * (2 D + PADDING) )           residual sites (preft.vllm.residual)

numbers. Prefill-only adapters leave their slot with their last prompt token, so a few slots serve any number of
adapters, and requests that decode count against none. The others wait in the host's memory (max_cpu_loras).
"""

from typing import Any

import torch
from torch import nn

from preft.adapters import AdapterConfig, target_paths
from preft.vllm.residual import PADDING
from shared.architecture import Architecture, features


def slot_bytes(hf: nn.Module, rank: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of one slot of `rank` for a Hugging Face model (its weights may be on the meta device), unsharded."""
    architecture = Architecture(hf)
    linears = sum(sum(features(hf.get_submodule(path))) for path in target_paths(hf, AdapterConfig()))
    embeddings = 1 if architecture.config.tie_word_embeddings else 2
    ends = embeddings * (architecture.vocab_size + architecture.width)
    sites = architecture.n_layers * (2 * architecture.width + PADDING)
    return rank * (linears + ends + sites) * dtype.itemsize


def allocated_slot_bytes(manager: Any) -> int:
    """Bytes of all slot tensors of a running engine; `manager` is vLLM's `LoRAModelManager`."""
    tensors: list[torch.Tensor] = []
    for module in {id(module): module for module in manager.modules.values()}.values():
        for stacked in (module.lora_a_stacked, module.lora_b_stacked):
            tensors += [stacked] if isinstance(stacked, torch.Tensor) else list(stacked)
    return sum(tensor.nbytes for tensor in tensors)
