"""Adapter memory: the formula against the tensors vLLM allocates, and 512 adapters of an 8B model over 8 slots."""

from pathlib import Path
from typing import Any

import pytest
import torch

from preft.vllm.slot_memory import allocated_slot_bytes, slot_bytes
from shared.generation.vllm_engine import VLLMGenerator
from shared.models import Model, ModelConfig

pytestmark = pytest.mark.xdist_group(__name__)


def manager(engine: VLLMGenerator) -> Any:
    core = engine.llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "rank"), [(2, 8), (3, 16)])
def test_an_engine_allocates_what_the_formula_says(
    model: Model, model_folder: Path, folders: dict[str, Path], slots: int, rank: int
) -> None:
    settings: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 64, "block_size": 32}
    settings |= {"max_loras": slots, "max_lora_rank": rank, "max_cpu_loras": 16}
    with VLLMGenerator(ModelConfig(str(model_folder)), adapters=folders, **settings) as engine:
        assert allocated_slot_bytes(manager(engine)) == slots * slot_bytes(model.hf, rank, torch.float32)


def test_512_adapters_of_an_8b_model_take_less_than_a_gibibyte() -> None:
    """Resident in 512 slots they would take 24 GiB."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config)
    one = slot_bytes(hf, rank=8)
    assert one == 16 * (32 * (2 * 8192 + 2 * 5120 + 3 * 18432) + 2 * (128256 + 4096) + 32 * (2 * 4096 + 8))
    assert 8 * one < 2**30 < 512 * one
