"""An engine driven step by step, and the situations a scheduler creates, made on purpose."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from preft_cases import Case

from shared.generation.process_state import third_party_warnings_ignored
from shared.generation.vllm_engine import VLLMGenerator

V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"  # the plugin triton_on_cpu is at work


def scheduler(generator: VLLMGenerator) -> Any:
    return generator.llm.llm_engine.engine_core.engine_core.scheduler


class Driver:
    """Requests enter, leave and are stepped one by one.

    `outputs` holds the last output of each by its name, `samples` the tokens so far of each of its samples.
    """

    def __init__(self, generator: VLLMGenerator) -> None:
        self.generator, self.engine = generator, generator.llm.llm_engine
        self.outputs: dict[str, Any] = {}
        self.samples: dict[str, dict[int, list[int]]] = {}
        self.longest_advance = 0  # most tokens that one step added to one request

    def add(self, name: str, case: Case, max_tokens: int = 16, lora: Any = None, **sampling: Any) -> None:
        """Give the engine a greedy request; `lora` (vLLM's LoRARequest) goes before the case's adapter."""
        from vllm import SamplingParams

        lora = lora or self.generator._lora(case.adapter)
        params = SamplingParams(max_tokens=max_tokens, **({"temperature": 0.0} | sampling))
        self.engine.add_request(name, {"prompt_token_ids": list(case.prompt)}, params, lora_request=lora)

    def abort(self, name: str) -> None:
        self.engine.abort_request([name])

    def step(self) -> None:
        with third_party_warnings_ignored():
            outputs = self.engine.step()
        for output in outputs:
            self.outputs[output.request_id] = output
            known = self.samples.setdefault(output.request_id, {})
            for sample in output.outputs:
                advance = len(sample.token_ids) - len(known.get(sample.index, ()))
                self.longest_advance = max(self.longest_advance, advance)
                # A copy: an output's list of tokens is the engine's own and goes on growing.
                known[sample.index] = list(sample.token_ids)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def run(self) -> None:
        while self.engine.has_unfinished_requests():
            self.step()

    def tokens(self, name: str) -> list[int]:
        return list(self.outputs[name].outputs[0].token_ids)

    def until_decoding(self, names: Sequence[str]) -> None:
        """Step until each of these has a token and none has ended."""
        while not all(name in self.outputs and self.tokens(name) for name in names):
            self.step()
        assert not any(self.outputs[name].finished for name in names), "ended too soon to be watched decoding"


@contextmanager
def chunks_of(generator: VLLMGenerator, size: int) -> Iterator[set[int]]:
    """Let prompts be read `size` tokens a step; yields the sizes that occurred.

    vLLM reads a request that is there alone at once; such steps are left out.
    """
    owner, sizes = scheduler(generator), set[int]()
    original = owner.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        alone = sum(owner.get_request_counts()) == 1
        output = original(*args, **kwargs)
        for name, count in output.num_scheduled_tokens.items():
            request = owner.requests[name]
            if not alone and request.num_computed_tokens - count < request.num_prompt_tokens:
                sizes.add(count)
        return output

    with (
        mock.patch.object(owner.scheduler_config, "long_prefill_token_threshold", size),
        mock.patch.object(owner, "schedule", schedule),
    ):
        yield sizes


@contextmanager
def few_blocks(generator: VLLMGenerator, count: int) -> Iterator[list[str]]:
    """Leave `count` free blocks in the cache; yields the names of the adapters of the requests preempted meanwhile."""
    owner = scheduler(generator)
    pool, original = owner.kv_cache_manager.block_pool, owner._preempt_request
    preempted: list[str] = []

    def preempt(request: Any, *args: Any, **kwargs: Any) -> None:
        own = request._own_lora_request
        preempted.append(own.lora_name if own else "base")
        original(request, *args, **kwargs)

    taken = pool.get_new_blocks(pool.get_num_free_blocks() - count)
    with mock.patch.object(owner, "_preempt_request", preempt):
        try:
            yield preempted
        finally:
            pool.free_blocks(taken)


def allow_engines_after_numba() -> None:
    """Let this process build engines after one that speculates by n-grams, for good.

    Each engine of vLLM 0.32 looks through the attributes of all modules for Triton kernels, and takes an object of
    llvmlite, which numba imports, for one with an ordinary `__dict__`.
    """
    from vllm.triton_utils import dispatcher

    def namespace(value: Any) -> dict[str, Any]:
        found = vars(value)
        return found if isinstance(found, Mapping) else {}

    dispatcher.vars = namespace


class Placeholder:
    """A CUDA event or stream where there is no device: everything has happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def __enter__(self) -> "Placeholder":
        return self

    def __exit__(self, *error: object) -> None:
        pass


@contextmanager
def any_engine() -> Iterator[None]:
    """Let engines built and run inside keep `async_scheduling=True`, which vLLM's CPU platform turns off.

    The runner's copies to the host are ordinary copies here, so only their events and streams need a stand-in.
    """
    import torch
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = platform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: Any, config: Any) -> None:
        wanted = config.scheduler_config.async_scheduling
        original(cls, config)
        config.scheduler_config.async_scheduling = wanted

    allow_engines_after_numba()
    with ExitStack() as stack:
        for name in ("Event", "Stream", "current_stream", "stream"):
            stack.enter_context(mock.patch.object(torch.cuda, name, Placeholder))
        kept = classmethod(check_and_update_config)
        stack.enter_context(mock.patch.object(platform, "check_and_update_config", kept))
        yield
