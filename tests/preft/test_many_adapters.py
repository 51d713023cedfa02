"""512 adapters over 8 slots: all are answered as the reference says, side by side, in slots that do not grow."""

from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from preft_cases import Case, Checker, prompt, stir
from preft_engine import Driver, scheduler

from preft.adapters import Adapter, AdapterConfig
from preft.formats import save_adapter
from shared.generation.vllm_engine import VLLMGenerator
from shared.models import Model, ModelConfig

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.slow]
ADAPTERS, SLOTS, SEQUENCES, TOKENS = 512, 8, 64, 6
CONFIG = AdapterConfig(rank=1, target_modules=("o_proj",))


@pytest.fixture(scope="module")
def many(model: Model) -> dict[str, Adapter]:
    fresh = (Adapter.create(model.hf, CONFIG, seed=i) for i in range(ADAPTERS))
    return {f"user{i}": stir(adapter, seed=i, size=2.0) for i, adapter in enumerate(fresh)}


@pytest.fixture(scope="module")
def engine(
    model_folder: Path, many: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VLLMGenerator]:
    root = tmp_path_factory.mktemp("many")
    folders = {name: save_adapter(adapter, root / name) for name, adapter in many.items()}
    settings: dict[str, Any] = {"max_num_seqs": SEQUENCES, "max_num_batched_tokens": 256, "max_model_len": 64}
    settings |= {"max_loras": SLOTS, "max_cpu_loras": ADAPTERS, "block_size": 32}
    with VLLMGenerator(ModelConfig(str(model_folder)), adapters=folders, **settings) as generator:
        yield generator


def device_bytes(engine: VLLMGenerator) -> int:
    """Bytes of all storage that the model runner reaches, without the `LoRAModel`s that wait in host memory."""
    from vllm.lora.lora_model import LoRAModel

    worker = engine.llm.llm_engine.model_executor.driver_worker.worker
    storages: dict[int, int] = {}
    todo, seen = [worker.model_runner], set[int]()
    skipped = (LoRAModel, type, ModuleType, FunctionType, str, bytes)
    while todo:
        if id(item := todo.pop()) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        if isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            todo += item
        if not isinstance(item, skipped):
            todo.append(getattr(item, "__dict__", None))
    assert len(storages) > 50
    return sum(storages.values())


def test_512_adapters_in_8_slots(engine: VLLMGenerator, model: Model, many: dict[str, Adapter]) -> None:
    checker, driver = Checker(model, many), Driver(engine)
    cases = {name: Case(name, prompt(9, i % 7)) for i, name in enumerate(many)}
    checker.served(engine, list(cases.values())[:SEQUENCES], TOKENS)  # what is allocated on first use
    before = device_bytes(engine)
    for name, case in cases.items():
        driver.add(name, case, max_tokens=TOKENS)
    together = 0
    while driver.engine.has_unfinished_requests():
        driver.step()
        running = scheduler(engine).running
        decoding = [
            request for request in running if request.num_computed_tokens >= request.num_prompt_tokens
        ]
        together = max(together, len(decoding))
    wrong = [name for name, case in cases.items() if driver.tokens(name) != checker.reference(case, TOKENS)]
    assert not wrong
    assert together > 2 * SLOTS  # decoding requests, each of another adapter, count against nothing
    assert device_bytes(engine) == before
    base = {case.prompt: checker.reference(Case(None, case.prompt), TOKENS) for case in cases.values()}
    changed = sum(driver.tokens(name) != base[case.prompt] for name, case in cases.items())
    assert changed > ADAPTERS / 2, "the adapters do too little to be told apart"
