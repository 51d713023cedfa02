"""What every test shares: shapes checked by beartype, one thread per worker, no network, warnings as errors."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

# Before any of the packages is imported: their jaxtyping annotations are executed in tests, and only there.
install_import_hook(["shared", "preft", "circuits", "assumptions"], "beartype.beartype")
