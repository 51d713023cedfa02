"""A cache too small for the batch: requests are preempted and recomputed, prompt and generated tokens in one chunk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from preft_cases import Case, Checker, prompt

from shared.generation.vllm_engine import VLLMGenerator
from shared.models import ModelConfig

pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.slow]
NAMES = ["lora_p_0", "reft_p_0", None, "lora_p_1", "lora_p_2", "lora_all"]


@pytest.fixture(scope="module")
def engine(model_folder: Path, folders: dict[str, Path]) -> Iterator[VLLMGenerator]:
    settings: dict[str, Any] = {"max_num_seqs": 6, "max_num_batched_tokens": 128, "max_model_len": 128}
    # Four blocks hold the longest request, ten not six of them; two slots make resumed requests queue for them again.
    settings |= {"num_gpu_blocks_override": 11, "block_size": 32, "max_loras": 2, "max_cpu_loras": 16}
    with VLLMGenerator(ModelConfig(str(model_folder)), adapters=folders, **settings) as generator:
        yield generator


def test_preempted_requests_are_recomputed_as_they_were_computed(
    engine: VLLMGenerator, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    preempted: list[str] = []
    original = scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> None:
        own = request._own_lora_request
        preempted.append(own.lora_name if own else "base")
        original(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", preempt)
    for order in (NAMES, NAMES[::-1]):
        engine.llm.reset_prefix_cache()
        checker.check(engine, [Case(name, prompt(40 + i, i)) for i, name in enumerate(order)], max_tokens=40)
    prefill_only = {"lora_p_0", "lora_p_1", "lora_p_2", "reft_p_0"}
    assert prefill_only & set(preempted), f"no prefill-only request was preempted: {preempted}"
