"""Generated tokens a second of one engine with and without adapters, all arms in one run, interleaved.

Every repeat gives each arm the same fresh random prompts, in a rotating order of arms, after one warm round that is not
counted; the prefix cache is emptied before each measurement. Requests take the arm's adapters in turn, so with as many
requests as adapters all are distinct.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class ThroughputConfig:
    """The trace: `requests` at once, each of `prompt_tokens` and exactly `new_tokens`, `repeats` counted rounds."""

    requests: int = 32
    adapters: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 96
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.requests, self.adapters, self.prompt_tokens, self.new_tokens, self.repeats) < 1:
            raise ValueError(f"every count of a throughput measurement must be at least 1: {self}")


class Speed(NamedTuple):
    """Generated tokens a second: median, lowest and highest of the repeats, and all of them."""

    median: float
    low: float
    high: float
    all: list[float]


def measure(
    llm: Any,
    arms: Mapping[str, Sequence[Any]],
    config: ThroughputConfig,
    vocabulary: int,
    on_round: Callable[[int, str], None] | None = None,
) -> dict[str, Speed]:
    """Speed of every arm; `llm` is a `vllm.LLM`, an arm the `LoRARequest`s its requests take in turn (empty: base)."""
    rng = np.random.default_rng(config.seed)
    names = list(arms)
    found: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(config.repeats + 1):
        prompts = rng.integers(0, vocabulary, size=(config.requests, config.prompt_tokens)).tolist()
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            if on_round:
                on_round(repeat, name)
            speed = _round(llm, prompts, arms[name], config.new_tokens)
            if repeat:  # the first round warms caches and loads adapters
                found[name].append(speed)
    return {name: Speed(median(values), min(values), max(values), values) for name, values in found.items()}


def _round(llm: Any, prompts: list[list[int]], adapters: Sequence[Any], new_tokens: int) -> float:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    loras = [adapters[i % len(adapters)] if adapters else None for i in range(len(prompts))]
    llm.reset_prefix_cache()
    started = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts], params, lora_request=loras, use_tqdm=False
    )
    seconds = time.perf_counter() - started
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    if generated != new_tokens * len(prompts):
        raise RuntimeError(
            f"the engine generated {generated} tokens instead of {new_tokens * len(prompts)}: prompts and new tokens "
            "must fit its max_model_len"
        )
    return generated / seconds
