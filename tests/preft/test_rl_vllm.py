"""GRPO with rollouts in vLLM: every step samples under the adapter as the step before left it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from preft_cases import CONFIGS, stir

from preft.adapters import Adapter, AdapterConfig, AdapterError
from preft.rl import GRPOConfig, GRPOTrainer, Row, VLLMSampler
from preft.vllm.memory import ledger_of, remove
from shared.generation.vllm_engine import VLLMGenerator
from shared.models import Model, ModelConfig

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.slow]
ROWS = [Row(text) for text in ("abc", "hello there, what is your name", "1 + 2 =", "x")]


@pytest.fixture(scope="module")
def sampler(model_folder: Path) -> Iterator[VLLMSampler]:
    settings: dict[str, Any] = {"max_model_len": 128, "block_size": 32, "enable_chunked_prefill": False}
    settings |= {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 3, "max_lora_rank": 8}
    with VLLMGenerator(ModelConfig(str(model_folder)), **settings) as generator:
        yield VLLMSampler(generator)


@pytest.mark.parametrize(
    "name", ["lora_p_0", "lora_p_3", "reft_p_0", "reft_p_1", "lora_all", "lora_boundary"]
)
def test_trainer_and_server_agree_after_every_update(model: Model, sampler: VLLMSampler, name: str) -> None:
    """The adapter is far from a no-op, and the steps are long: a version behind, or a wrong mask, would show."""
    adapter = stir(Adapter.create(model.hf, CONFIGS[name]), seed=3, size=0.3)
    config = GRPOConfig(
        steps=3,
        prompts_per_step=4,
        num_generations=4,
        max_completion_length=12,
        temperature=0.9,
        learning_rate=3e-2,
        warmup_steps=1,
    )
    figures: list[dict[str, float]] = []
    GRPOTrainer(
        model,
        adapter,
        sampler,
        ROWS,
        lambda text, row: float(len(set(text))),
        config,
        log=lambda step, **found: figures.append(found),
    ).train()
    assert len(figures) == 3
    assert all(0 < figure["logprob_gap_mean"] <= figure["logprob_gap_max"] <= 1e-5 for figure in figures)
    assert any(figure["reward_std"] > 0 for figure in figures)


def test_a_server_one_update_behind_is_noticed(model: Model, sampler: VLLMSampler) -> None:
    class Late(VLLMSampler):
        """Samples under the adapter it got first."""

        def update(self, adapter: Adapter) -> None:
            if not ledger_of(self.generator.llm.llm_engine.input_processor).current.get("policy"):
                super().update(adapter)

    remove(sampler.generator.llm, "policy")
    config = GRPOConfig(
        steps=2, prompts_per_step=2, num_generations=4, max_completion_length=8, warmup_steps=1
    )
    late = GRPOTrainer(
        model,
        Adapter.create(model.hf, AdapterConfig(rank=4)),
        Late(sampler.generator),
        ROWS,
        lambda text, row: float(len(set(text))),
        config,
    )
    with pytest.raises(AdapterError, match="step 1: trainer and sampler differ by"):
        late.train()
