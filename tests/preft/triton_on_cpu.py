"""A pytest plugin (`-p triton_on_cpu`) under which vLLM runs Model Runner V2 on a CPU: Triton in its interpreter.

vLLM's CPU build has V2's runner, and runs it where Triton has a backend called "cpu". With TRITON_INTERPRET=1 Triton's
kernels are interpreted on CPU tensors and need no backend, so naming one is enough. Must come before vLLM is imported.
"""

import os
from types import SimpleNamespace
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

from triton.backends import backends
from triton.runtime import interpreter

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)  # type: ignore[assignment]


def masked_load(builder: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
    """The interpreter computes some masks as integers, which its own loads then refuse."""
    mask.data = mask.data.astype(bool)
    return load(builder, ptrs, mask, *others)


def masked_store(builder: Any, ptrs: Any, value: Any, mask: Any, *others: Any) -> Any:
    """Idem for stores."""
    mask.data = mask.data.astype(bool)
    return store(builder, ptrs, value, mask, *others)


load, store = (
    interpreter.InterpreterBuilder.create_masked_load,
    interpreter.InterpreterBuilder.create_masked_store,
)
interpreter.InterpreterBuilder.create_masked_load = masked_load
interpreter.InterpreterBuilder.create_masked_store = masked_store
