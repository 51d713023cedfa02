"""Two-way tensor parallelism in two CPU processes: the same tokens, adapters sharded like the layers they adapt."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from preft_cases import CONFIGS, Case, Checker, prompt

from preft.adapters import Adapter
from shared.generation.vllm_engine import VLLMGenerator
from shared.models import ModelConfig

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.slow]
RANKS = 2
BLOCK = "model.layers.0"


@pytest.fixture(scope="module")
def engine(model_folder: Path, folders: dict[str, Path]) -> Iterator[VLLMGenerator]:
    settings: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "max_model_len": 256}
    settings |= {"max_loras": 2, "max_cpu_loras": 16, "block_size": 32}
    settings |= {"tensor_parallel_size": RANKS, "distributed_executor_backend": "mp"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        with VLLMGenerator(ModelConfig(str(model_folder)), adapters=folders, **settings) as generator:
            yield generator


def every_kind(length: int) -> list[Case]:
    return [Case(name, prompt(length + 3 * i, i)) for i, name in enumerate([None, *CONFIGS])]


def test_every_kind_in_one_batch(engine: VLLMGenerator, checker: Checker) -> None:
    for cases in (every_kind(20), every_kind(41)[::-1], every_kind(41)):  # the last from the cache
        checker.check(engine, cases)


class Held(NamedTuple):
    """A and B of one slice of a module, on every rank, as they lie in the adapter's slot."""

    A: list[torch.Tensor]
    B: list[torch.Tensor]


def held(engine: VLLMGenerator, name: str, module: str, piece: int, rank: int) -> Held:
    number = engine._lora(name).lora_int_id  # type: ignore[union-attr]

    def read(worker: Any) -> tuple[torch.Tensor, torch.Tensor]:
        manager = worker.model_runner.lora_manager._adapter_manager
        slot, layer = manager.lora_index_to_id.index(number), manager.modules[f"{BLOCK}.{module}"]
        A, B = layer.lora_a_stacked[piece][slot, 0], layer.lora_b_stacked[piece][slot, 0]
        return A[:rank].clone(), B[:, :rank].clone()

    return Held(*map(list, zip(*engine.llm.collective_rpc(read))))


def equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(found, wanted.detach())


@pytest.mark.parametrize("piece", range(3))
def test_slots_of_a_column_parallel_layer(
    engine: VLLMGenerator, checker: Checker, adapters: dict[str, Adapter], piece: int
) -> None:
    """A whole on every rank, B cut by outputs."""
    checker.check(engine, [Case("lora_p_0", prompt(50, 4))], max_tokens=2)
    parts, part = dict(adapters["lora_p_0"].parts()), f"{BLOCK}.self_attn.{'qkv'[piece]}_proj"
    slices = held(engine, "lora_p_0", "self_attn.qkv_proj", piece, rank=4)
    assert len(slices.A) == RANKS
    assert all(equal(A, parts[part].A_RI) for A in slices.A)
    assert equal(torch.cat(slices.B), parts[part].B_OR * parts[part].scale)


def test_slots_of_a_row_parallel_layer(
    engine: VLLMGenerator, checker: Checker, adapters: dict[str, Adapter]
) -> None:
    """A cut by inputs, B whole on every rank."""
    checker.check(engine, [Case("lora_p_0", prompt(50, 4))], max_tokens=2)
    part = dict(adapters["lora_p_0"].parts())[f"{BLOCK}.self_attn.o_proj"]
    slices = held(engine, "lora_p_0", "self_attn.o_proj", 0, rank=4)
    assert equal(torch.cat(slices.A, dim=1), part.A_RI)
    assert all(equal(B, part.B_OR * part.scale) for B in slices.B)


def test_slots_of_the_residual_stream_are_whole(
    engine: VLLMGenerator, checker: Checker, adapters: dict[str, Adapter]
) -> None:
    checker.check(engine, [Case("reft_p_0", prompt(50, 4))], max_tokens=2)
    factors = dict(adapters["reft_p_0"].parts())[BLOCK].factors()
    slices = held(engine, "reft_p_0", "residual_edit", 0, rank=4)
    assert len(slices.A) == RANKS
    assert all(equal(A[:, : factors.A.shape[1]], factors.A) for A in slices.A)
    assert all(equal(B, factors.B) for B in slices.B)
