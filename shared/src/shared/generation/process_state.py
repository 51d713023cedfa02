"""Leave the process as it was: an in-process vLLM engine reseeds, patches and exports while it is being built.

Measured on vLLM 0.32, CPU: building an engine seeds python, numpy and torch, replaces `torch.set_num_threads` by a
stub that only warns, replaces `sys.excepthook`, and exports variables (LOCAL_WORLD_SIZE, LD_PRELOAD and others) that
training libraries and child processes read. Random state is put back once the engine stands, the rest when the last
engine of the process closes.
"""

import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar


class ProcessState:
    """Environment, exception hook and torch's thread setter, as they were before the first of the open engines.

    Engines of one process share its process group, and vLLM destroys the group with any one of them; so they are
    all shut down when the last one closes.
    """

    _open: ClassVar[int] = 0
    _shutdowns: ClassVar[list[Callable[[], None]]] = []
    _environment: ClassVar[dict[str, str]]
    _excepthook: ClassVar[Any]
    _set_num_threads: ClassVar[Any]

    @classmethod
    def acquire(cls) -> None:
        """Count one engine more; the first takes the snapshot."""
        import torch

        if cls._open == 0:
            cls._environment = dict(os.environ)
            cls._excepthook = staticmethod(sys.excepthook)
            cls._set_num_threads = staticmethod(torch.set_num_threads)
        cls._open += 1

    @classmethod
    def release(cls, shutdown: Callable[[], None] | None) -> None:
        """Count one engine less; the last one runs all shutdowns and puts the snapshot back."""
        import torch
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cls._open -= 1
        if shutdown is not None:
            cls._shutdowns.append(shutdown)
        if cls._open > 0:
            return
        with third_party_warnings_ignored():
            while cls._shutdowns:
                cls._shutdowns.pop()()
            cleanup_dist_env_and_memory()
        for name in os.environ.keys() - cls._environment.keys():
            del os.environ[name]
        os.environ.update(cls._environment)
        sys.excepthook = cls._excepthook
        torch.set_num_threads = cls._set_num_threads


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give python's, numpy's and torch's random generators back the states they came with."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (the state others use)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


@contextmanager
def model_classes_kept() -> Iterator[None]:
    """Inside, vLLM leaves the classes of transformers' models as they are; for engines that run eagerly.

    Where vLLM 0.32 runs transformers' code (OLMo 2, GPT-NeoX), it marks the model's class for compilation in place, and
    no other model of that class runs in the process any more. An eager engine compiles nothing and needs no mark.
    """
    from vllm.model_executor.models.transformers.base import Base

    marked: Any = Base
    original = marked._decorate_for_torch_compile
    marked._decorate_for_torch_compile = lambda _: None
    try:
        yield
    finally:
        marked._decorate_for_torch_compile = original


@contextmanager
def third_party_warnings_ignored() -> Iterator[None]:
    """Silence warnings about vLLM's own use of its dependencies: they are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
