"""Several vLLM engines over one model, each in a process with GPUs or cores of its own: data parallelism.

Draws are dealt round robin, so every replica gets its share of long and short ones. What a draw samples does not
depend on its replica (`shared.generation.requests`). On a CPU this also pays on one socket: a small model's engine
spends much of its time in single-threaded scheduling, which replicas do side by side.
"""

import os
import traceback
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

from shared.errors import UserError
from shared.generation.requests import Completion, Draw, EngineBase, Sampling
from shared.generation.vllm_arguments import gpu_share
from shared.generation.vllm_engine import VLLMGenerator
from shared.models import ModelConfig

CLOSE_SECONDS = 20.0


class _RequestError(Exception):
    """A replica could not do what it was asked, and goes on; `told` is what it says."""

    def __init__(self, told: UserError | RuntimeError) -> None:
        super().__init__(str(told))
        self.told = told


class VLLMReplicas(EngineBase):
    """`replicas` engines of `VLLMGenerator(config, adapters=adapters, **engine)`, started together.

    Each gets an equal share of this process's cores, or `tensor_parallel_size` (default 1) of the visible GPUs.
    UserError when there are too few, when an engine refuses to start, and when one ends before it has answered; an end,
    or an interruption while they work, closes them all.
    """

    def __init__(
        self,
        config: ModelConfig | str,
        replicas: int,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        **engine: Any,
    ) -> None:
        shares = environments(replicas, int(engine.get("tensor_parallel_size", 1)))
        engine = gpu_share() | engine  # asked here: a child does not know what this process holds
        context = get_context("spawn")  # a forked child would inherit torch's threads and CUDA's state
        self._children = []
        try:
            for share in shares:
                here, there = context.Pipe()
                with patch.dict(os.environ, share):  # read while the child's libraries load, before our code
                    child = context.Process(target=_serve, args=(there, config, adapters, engine))
                    child.start()
                there.close()
                self._children.append((child, here))
            for number in range(replicas):
                self._receive(number)
        except BaseException as error:
            self.close()
            if isinstance(error, _RequestError):
                raise error.told from None
            raise

    def _complete(self, draws: list[Draw], sampling: Sampling) -> list[Completion]:
        if not self._children:
            raise UserError("these VLLMReplicas are closed: build new ones")
        n = len(self._children)
        answers: list[Any] = [None] * len(draws)
        errors: list[UserError | RuntimeError] = []
        try:
            for number in range(n):
                self._send(number, (draws[number::n], sampling))
            for number in range(n):  # all, even if one fails: what is not read now is the next call's
                try:
                    answers[number::n] = self._receive(number)
                except _RequestError as error:
                    errors.append(error.told)
        except BaseException:  # one has ended, or the caller was interrupted, and answers are on their way
            self.close()
            raise
        if errors:
            raise errors[0]
        return answers

    def _send(self, number: int, work: Any) -> None:
        try:
            self._children[number][1].send(work)
        except (BrokenPipeError, ConnectionResetError):
            raise self._ended(number) from None

    def _receive(self, number: int) -> Any:
        """What replica `number` answers; _RequestError with its UserError, or RuntimeError with its traceback."""
        try:
            answer, error = self._children[number][1].recv()
        except (EOFError, ConnectionResetError):
            raise self._ended(number) from None
        if isinstance(error, UserError):
            raise _RequestError(error)
        if error is not None:
            raise _RequestError(RuntimeError(f"the vLLM process of replica {number} failed:\n{error}"))
        return answer

    def _ended(self, number: int) -> UserError:
        child = self._children[number][0]
        child.join(CLOSE_SECONDS)
        return UserError(
            f"the vLLM process of replica {number} ended with exit code {child.exitcode}; its output says why "
            "(too little memory for this many replicas, for one)"
        )

    def close(self) -> None:
        """End the processes; harmless when repeated."""
        children, self._children = self._children, []
        for _, connection in children:
            connection.close()
        for child, _ in children:
            child.join(CLOSE_SECONDS)
            if child.is_alive():
                child.terminate()
                child.join()


def environments(replicas: int, gpus_each: int) -> list[dict[str, str]]:
    """The environment variables that give each replica its GPUs, or its cores where there is no GPU."""
    import torch

    if replicas < 1:
        raise UserError(f"replicas must be at least 1, got {replicas}")
    if count := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(count)]
        parts = _shares(gpus, replicas, gpus_each, f"{replicas} replicas of {gpus_each} GPUs", "GPUs")
        return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    each = max(1, len(cores) // replicas)
    parts = _shares(cores, replicas, each, f"{replicas} replicas", "cores")
    return [{"VLLM_CPU_OMP_THREADS_BIND": ",".join(part), "OMP_NUM_THREADS": str(each)} for part in parts]


def _shares(all_: list[str], replicas: int, each: int, wanted: str, unit: str) -> list[list[str]]:
    if replicas * each > len(all_):
        raise UserError(f"{wanted} do not fit on {len(all_)} {unit}: ask for fewer replicas")
    return [all_[i * each : (i + 1) * each] for i in range(replicas)]


def _serve(
    connection: Connection,
    config: ModelConfig | str,
    adapters: Mapping[str, str | Path] | None,
    engine: dict[str, Any],
) -> None:
    """A replica: start the engine, then answer (draws, sampling) until the other end closes."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which closes the connection
    with suppress(EOFError, ConnectionError):  # the other end has closed
        try:
            generator = VLLMGenerator(config, adapters=adapters, **engine)
        except Exception as error:  # handed to the parent, whatever it is
            connection.send((None, _told(error)))
            return
        with generator:
            connection.send((None, None))
            while True:
                draws, sampling = connection.recv()
                answer, told = None, None
                try:
                    answer = generator._complete(draws, sampling) if draws else []
                except Exception as error:
                    told = _told(error)
                connection.send((answer, told))


def _told(error: Exception) -> UserError | str:
    """A UserError as it is, of anything else the traceback: not every exception can be pickled."""
    return UserError(str(error)) if isinstance(error, UserError) else traceback.format_exc()
