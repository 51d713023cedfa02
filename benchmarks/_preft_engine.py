"""One vLLM engine in a process of its own that replays traces on request, and what it measured.

The processes of a run are forked from one server that has vLLM imported, so an engine starts in seconds. Each blocks on
its pipe while it has nothing to do: engines of different configuration take turns on all cores, one measures at a time.
"""

import hashlib
import multiprocessing
import os
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from _preft_trace import Item


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is built; `slots` 0 means without LoRA. `plugin` False is vLLM as released."""

    model: str
    plugin: bool = True
    slots: int = 0
    cpu_adapters: int = 0
    rank: int = 8
    concurrency: int = 64
    step_tokens: int = 2048
    max_length: int = 512
    dtype: str = "float32"
    dummy_weights: bool = False
    kv_cache_gib: int = 1  # on a CPU
    gpu_share: float = 0.9
    more: dict[str, Any] = field(default_factory=dict)


class Order(NamedTuple):
    """A trace to replay; adapter i of it is `folders[i]`. Cold: adapters are read from disk within the time."""

    items: list[Item]
    folders: list[str]
    concurrency: int
    cold: bool = False


class Measured(NamedTuple):
    """One replay: seconds, generated tokens, and in ms the medians and 99th percentiles of its latencies.

    `decode_step_ms` is the median step in which every request in flight decoded and none was in its prompt (nan where
    there was none), `answers` a hash a request.
    """

    seconds: float
    generated: int
    tokens_per_s: float
    ttft_ms: float
    ttft_p99_ms: float
    itl_ms: float
    itl_p99_ms: float
    decode_step_ms: float
    steps: int
    answers: list[str]


class EngineProcess:
    """An engine in a child process; `replay` blocks until its measurement is back."""

    def __init__(self, config: EngineConfig) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.lora.request"])
        self._pipe, theirs = context.Pipe()
        # Not a daemon: on a GPU vLLM starts a process of its own below it.
        self._process = context.Process(target=_serve, args=(theirs, config))
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait until the engine is built; RuntimeError with its reason if it could not be."""
        self._answer()

    def replay(self, order: Order) -> Measured:
        """Measure one trace."""
        self._pipe.send(order)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"an engine died with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(f"an engine failed: {answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Any, config: EngineConfig) -> None:
    """The child: build the engine, answer orders until the pipe closes."""
    os.dup2(2, 1)  # vLLM writes to the standard output, which belongs to the parent's results
    try:
        llm = build(config)
        pipe.send(None)
        while True:
            pipe.send(replay(llm, pipe.recv()))
    except EOFError:
        return
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise


def build(config: EngineConfig) -> Any:
    """A `vllm.LLM`; on a CPU in this process, eager, as the project's own engine is built."""
    import torch

    gpu = torch.cuda.is_available()
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {} if gpu else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.update(environment)
    if not config.plugin:
        os.environ["VLLM_PLUGINS"] = ""
    from vllm import LLM

    arguments = {"model": config.model, "dtype": config.dtype, "skip_tokenizer_init": True}
    arguments |= {"max_num_seqs": config.concurrency, "max_num_batched_tokens": config.step_tokens}
    arguments |= {"max_model_len": config.max_length, "disable_log_stats": True, "use_tqdm_on_load": False}
    if gpu:
        arguments |= {"gpu_memory_utilization": config.gpu_share}
    else:
        arguments |= {"enforce_eager": True, "distributed_executor_backend": "uni", "block_size": 32}
        arguments |= {"kv_cache_memory_bytes": config.kv_cache_gib * 2**30}
    if config.slots:
        arguments |= {"enable_lora": True, "max_loras": config.slots, "max_lora_rank": config.rank}
        arguments |= {"max_cpu_loras": max(config.cpu_adapters, config.slots)}
    if config.dummy_weights:
        arguments |= {"load_format": "dummy"}
    return LLM(**arguments | config.more)


_ids: dict[str, int] = {}
_loaded: set[int] = set()
_runs = 0


def replay(llm: Any, order: Order) -> Measured:
    """Send a trace through an engine, at most `order.concurrency` requests in flight, and time every step.

    Unless it is cold, all adapters of the arm are in host memory and those of the trace have just been in slots.
    """
    import gc

    engine = llm.llm_engine
    loras = [_lora_request(folder) for folder in order.folders]
    used = [loras[i] for i in dict.fromkeys(item.adapter for item in order.items)] if loras else []
    for lora in used if order.cold else [*(lora for lora in loras if lora.lora_int_id not in _loaded), *used]:
        engine.remove_lora(lora.lora_int_id) if order.cold else engine.add_lora(lora)
        _loaded.add(lora.lora_int_id)
    llm.reset_prefix_cache()
    gc.collect()
    return _timed(engine, order, loras)


def _lora_request(folder: str) -> Any:
    from vllm.lora.request import LoRARequest

    number = _ids.setdefault(folder, len(_ids) + 1)
    return LoRARequest("/".join(Path(folder).parts[-3:]), number, folder)


def _timed(engine: Any, order: Order, loras: list[Any]) -> Measured:
    global _runs
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    _runs += 1
    waiting = deque(enumerate(order.items))
    sent: dict[str, float] = {}
    last: dict[str, float] = {}
    tokens: dict[str, list[int]] = {}
    ttft, itl, decode, steps = [], [], [], 0
    start = time.perf_counter()
    while waiting or sent:
        now = time.perf_counter()
        while waiting and len(sent) < order.concurrency and waiting[0][1].at <= now - start:
            i, item = waiting.popleft()
            params = SamplingParams(max_tokens=item.new_tokens, temperature=0.0, ignore_eos=True)
            params.detokenize, params.output_kind = False, RequestOutputKind.DELTA
            name = f"{_runs}-{i}"
            lora = loras[item.adapter] if loras else None
            engine.add_request(name, {"prompt_token_ids": item.prompt}, params, lora_request=lora)
            # A timed trace's request waits from its arrival, also while a step runs or the concurrency is full.
            sent[name], tokens[name] = start + item.at if item.at else now, []
        if not sent:
            time.sleep(max(0.0, start + waiting[0][1].at - time.perf_counter()))
            continue
        in_flight, before = len(sent), time.perf_counter()
        outputs = engine.step()
        after = time.perf_counter()
        steps += 1
        first = 0
        for output in outputs:
            name = output.request_id
            new = output.outputs[0].token_ids
            tokens[name].extend(new)
            if name in last:
                itl.append(after - last[name])
            elif new:
                first += 1
                ttft.append(after - sent[name])
            last[name] = after
            if output.finished:
                del sent[name]
        if len(outputs) == in_flight and not first:
            decode.append((in_flight, after - before))
    seconds = time.perf_counter() - start
    return _summary(order, seconds, ttft, itl, decode, steps, tokens)


def _summary(
    order: Order,
    seconds: float,
    ttft: list[float],
    itl: list[float],
    decode: list[tuple[int, float]],
    steps: int,
    tokens: dict[str, list[int]],
) -> Measured:
    generated = sum(map(len, tokens.values()))
    if generated != (expected := sum(item.new_tokens for item in order.items)):
        raise RuntimeError(f"the engine generated {generated} tokens instead of {expected}")
    most = max((count for count, _ in decode), default=0)
    full = [duration for count, duration in decode if count == most]
    answers = [hashlib.sha256(repr(ids).encode()).hexdigest()[:8] for ids in tokens.values()]
    return Measured(
        seconds,
        generated,
        generated / seconds,
        *(1e3 * value for times in (ttft, itl or [float("nan")]) for value in _percentiles(times)),
        decode_step_ms=1e3 * median(full) if full else float("nan"),
        steps=steps,
        answers=answers,
    )


def _percentiles(times: list[float]) -> tuple[float, float]:
    ordered = sorted(times)
    return median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
