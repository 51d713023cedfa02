"""What vLLM's LoRA layers do better on a CPU: two changes to the layers of a loaded model, none to what they compute.

**Memory.** A slot's factors keep the shapes vLLM writes to, but lie transposed, as the products of `preft.vllm.kernels`
read them, and the A of slices that share an input (q, k, v; gate, up) lie side by side, so that one product shrinks for
all of them.

**Plain steps.** A step in which no token has an adapter (nearly every step of prefill-only traffic) calls the wrapped
layer directly: the bare model's path, but for one look at the step's segments.
"""

from typing import Any

import torch
from torch import Tensor, nn


class SideBySide(tuple[Tensor, ...]):
    """The A of a module's slices, each slots x 1 x R x I, as views of `beside`, slots x I x (slices R)."""

    beside: Tensor


def prepare_layers(model: nn.Module) -> None:
    """Change the LoRA layers of a model on a CPU; call it once, before an adapter is in a slot."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA

    for module in model.modules():
        if isinstance(module, BaseLinearLayerWithLoRA):
            lay_out(module)
        if isinstance(module, BaseLinearLayerWithLoRA | VocabParallelEmbeddingWithLoRA):
            pass_plain_steps(module)


def lay_out(layer: Any) -> None:
    """Give a linear layer slot tensors of the same shapes, but laid out for the products."""
    a_stacked, b_stacked = layer.lora_a_stacked, layer.lora_b_stacked
    slots, _, rank, inputs = a_stacked[0].shape
    beside = a_stacked[0].new_zeros(slots, inputs, len(a_stacked) * rank)
    layer.lora_a_stacked = SideBySide(part.mT[:, None] for part in beside.split(rank, dim=2))
    layer.lora_a_stacked.beside = beside
    layer.lora_b_stacked = tuple(
        torch.zeros_like(b.mT, memory_format=torch.contiguous_format).mT for b in b_stacked
    )


def pass_plain_steps(layer: Any) -> None:
    """Let a step without adapted tokens go straight to the wrapped layer."""
    adapted, base, operators = layer.forward, layer.base_layer, layer.punica_wrapper

    def forward(x: Tensor) -> Any:
        return adapted(x) if operators.token_runs else base(x)

    layer.forward = forward
