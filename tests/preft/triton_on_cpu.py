"""A pytest plugin (`-p triton_on_cpu`) under which vLLM runs Model Runner V2 on a CPU: Triton in its interpreter.

vLLM's CPU build has V2's runner, and runs it where Triton has a backend called "cpu". With TRITON_INTERPRET=1 Triton's
kernels are interpreted on CPU tensors and need no backend, so naming one is enough. Must come before vLLM is imported.
"""

import os
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)  # type: ignore[assignment]
