"""The number types in which vLLM can apply adapters.

On a GPU the shrink kernel of vLLM 0.32 (lora/ops/triton_ops/lora_shrink_op.py) asserts that activations and A are of
one type, float16 or bfloat16. The activations have the model's type, so `lora_dtype` alone cannot help a float32 model:
the whole engine must run in half precision, and whatever it is compared with too. On a CPU this project's own operators
(preft.vllm.kernels) take any type.
"""

import torch

from preft.adapters import AdapterError

GPU_TYPES = (torch.float16, torch.bfloat16)
NEAR_TIE_STEPS = 8


def check_precision(model_dtype: torch.dtype, lora_dtype: torch.dtype, device_type: str) -> None:
    """AdapterError where vLLM's operators for the device ("cuda", "cpu") cannot apply adapters in these types."""
    if device_type == "cuda" and not (model_dtype == lora_dtype and model_dtype in GPU_TYPES):
        raise AdapterError(
            "vLLM applies adapters on a GPU to activations in float16 or bfloat16, with the adapters in the same type; "
            f"here the model is in {_name(model_dtype)} and the adapters in {_name(lora_dtype)}. "
            "Set model.dtype=bfloat16 (vllm serve: --dtype bfloat16) and leave lora_dtype alone"
        )


def near_tie(dtype: torch.dtype) -> float:
    """Gap in logits up to which two computations in a type may choose different tokens; 0 in float32.

    `NEAR_TIE_STEPS` rounding steps of a logit between 8 and 16: bfloat16 0.5, float16 0.0625.
    """
    return 0.0 if dtype == torch.float32 else NEAR_TIE_STEPS * 8 * torch.finfo(dtype).eps


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
