"""Adapters pushed from memory into a running vLLM: every request is answered by the version it was submitted under."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from preft_cases import CONFIGS, Case, Checker, prompt, stir
from safetensors.torch import load, save

from preft.adapters import Adapter, AdapterConfig, AdapterError
from preft.vllm import memory_worker
from preft.vllm.identity import PHASE_SECTION, memory_identity, memory_path
from preft.vllm.memory import Ledger, Package, ledger_of, push, push_async, remove, remove_async
from preft.vllm.memory_worker import held_by
from shared.generation.vllm_engine import VLLMGenerator
from shared.models import Model, ModelConfig

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.slow]
SLOTS, CACHED = 2, 3
KINDS = ["lora_p_0", "lora_p_3", "reft_p_0", "reft_p_1", "lora_all", "lora_decode", "reft_all"]


@pytest.fixture(scope="module")
def generator(model_folder: Path) -> Iterator[VLLMGenerator]:
    settings: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "max_model_len": 256}
    settings |= {"enable_lora": True, "max_loras": SLOTS, "max_cpu_loras": CACHED, "max_lora_rank": 8}
    with VLLMGenerator(ModelConfig(str(model_folder)), block_size=32, **settings) as generator:
        yield generator


@pytest.fixture
def llm(generator: VLLMGenerator, versions: list[Adapter]) -> Any:
    """The engine with nothing pushed but the retired remains of "another"; other names begin at version 1."""
    llm = generator.llm
    assert not llm.llm_engine.has_unfinished_requests(), "an earlier test broke the engine"
    ledger = ledger_of(llm.llm_engine.input_processor)
    for name in list(ledger.current):
        remove(llm, name)
    drop_retired(llm, versions[0])
    for name in set(ledger.numbers) - {"another"}:
        del ledger.numbers[name]
    return llm


def drop_retired(llm: Any, adapter: Adapter) -> None:
    """What is retired is dropped by the next call, once no request runs."""
    for _ in range(2):
        push(llm, "another", adapter)
        remove(llm, "another")
    retired = ledger_of(llm.llm_engine.input_processor).retired
    assert {request.lora_name.partition("@")[0] for request in retired} == {"another"}


@pytest.fixture(scope="module")
def versions(model: Model) -> list[Adapter]:
    """One policy after each of six updates."""
    return [stir(Adapter.create(model.hf, AdapterConfig(rank=4)), seed=40 + i) for i in range(6)]


@pytest.fixture(scope="module")
def by_version(model: Model, versions: list[Adapter]) -> Checker:
    return Checker(model, {f"policy@{i}": adapter for i, adapter in enumerate(versions, 1)})


def params(max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=max_tokens, temperature=0)


def tokens(llm: Any, lora: Any, prompt_ids: tuple[int, ...], max_tokens: int = 8) -> list[int]:
    [output] = llm.generate(
        {"prompt_token_ids": list(prompt_ids)}, params(max_tokens), lora_request=lora, use_tqdm=False
    )
    return list(output.outputs[0].token_ids)


def worker_manager(llm: Any) -> Any:
    [manager] = llm.collective_rpc(lambda worker: worker.model_runner.lora_manager)
    return manager


@pytest.mark.parametrize("kind", KINDS)
def test_a_pushed_adapter_equals_the_reference(
    llm: Any, adapters: dict[str, Adapter], checker: Checker, kind: str
) -> None:
    lora = push(llm, kind, adapters[kind])
    for length in (20, 70):
        assert tokens(llm, lora, prompt(length, 4)) == checker.reference(Case(kind, prompt(length, 4)), 8)
    remove(llm, kind)


@pytest.mark.parametrize("pin", [False, True])
def test_versions_pushed_while_requests_decode(
    llm: Any, by_version: Checker, versions: list[Adapter], pin: bool
) -> None:
    """Six versions over two slots and three places in the cache; every text is asked again under every version."""
    engine = llm.llm_engine
    cases: dict[str, Case] = {}
    answers: dict[str, list[int]] = {}

    def step() -> None:
        answers.update(
            (output.request_id, list(output.outputs[0].token_ids))
            for output in engine.step()
            if output.finished
        )

    for version, adapter in enumerate(versions, 1):
        lora = push(llm, "policy", adapter, pin=pin)
        assert lora.lora_name == f"policy@{version}"
        for i, length in enumerate((40, 70)):
            request_id = f"{version}-{i}"
            cases[request_id] = Case(lora.lora_name, prompt(length, 9))
            engine.add_request(
                request_id,
                {"prompt_token_ids": list(cases[request_id].prompt)},
                params(24),
                lora_request=lora,
            )
        for _ in range(3):  # the prompts take two steps; the third and later ones decode
            step()
        assert engine.has_unfinished_requests()
    while engine.has_unfinished_requests():
        step()
    wrong = [key for key, case in cases.items() if answers[key] != by_version.reference(case, 24)]
    assert not wrong
    assert len({tuple(answers[f"{v}-0"]) for v in range(1, 7)}) == 6, "the versions answer alike"


def test_preempted_requests_find_their_version_again(
    llm: Any, by_version: Checker, versions: list[Adapter]
) -> None:
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    old = push(llm, "policy", versions[0])
    case = Case("policy@1", prompt(70, 9))
    engine.add_request("old", {"prompt_token_ids": list(case.prompt)}, params(20), lora_request=old)
    for _ in range(6):
        engine.step()
    for adapter in versions[1:5]:
        push(llm, "policy", adapter)
    scheduler.reset_prefix_cache(reset_running_requests=True)
    answers = []
    while engine.has_unfinished_requests():
        answers += [list(output.outputs[0].token_ids) for output in engine.step() if output.finished]
    assert answers == [by_version.reference(case, 20)]


def test_old_versions_are_dropped_when_no_request_needs_them(llm: Any, versions: list[Adapter]) -> None:
    held = held_by(worker_manager(llm))
    engine = llm.llm_engine
    first = push(llm, "policy", versions[0])
    engine.add_request("1", {"prompt_token_ids": list(prompt(30))}, params(40), lora_request=first)
    engine.step()
    for adapter in versions[1:4]:
        push(llm, "policy", adapter)
    # Held: the current version, the one retired last, and the first, under which a request runs.
    assert len(held) == 3
    assert first.lora_path in held
    while engine.has_unfinished_requests():
        engine.step()
    push(llm, "policy", versions[4])
    assert len(held) == 2
    assert first.lora_path not in held
    assert first.lora_int_id not in llm.llm_engine.list_loras()
    remove(llm, "policy")


def test_a_replaced_version_takes_no_new_requests(llm: Any, versions: list[Adapter]) -> None:
    old, new = push(llm, "policy", versions[0]), push(llm, "policy", versions[1])
    with pytest.raises(ValueError, match="Use the LoRARequest of the latest push"):
        tokens(llm, old, prompt(20))
    assert tokens(llm, new, prompt(20))
    remove(llm, "policy")
    with pytest.raises(ValueError, match="latest push"):
        tokens(llm, new, prompt(20))
    with pytest.raises(AdapterError, match="no adapter 'policy' in memory"):
        remove(llm, "policy")


def test_an_evicted_version_is_loaded_from_memory_again(
    llm: Any, by_version: Checker, versions: list[Adapter]
) -> None:
    lora = push(llm, "policy", versions[0])
    for i in range(CACHED):
        push(llm, f"other-{i}", versions[1 + i])
    assert lora.lora_int_id not in llm.llm_engine.list_loras()
    assert tokens(llm, lora, prompt(40)) == by_version.reference(Case("policy@1", prompt(40)), 8)
    for name in ("policy", "other-0", "other-1", "other-2"):
        remove(llm, name)


def test_a_pinned_version_is_not_evicted(llm: Any, versions: list[Adapter]) -> None:
    push(llm, "policy", versions[1], pin=True)
    lora = push(llm, "policy", versions[0], pin=True)
    for i in range(CACHED + 1):
        push(llm, "other", versions[1 + i])
    assert lora.lora_int_id in llm.llm_engine.list_loras()
    push(llm, "second", versions[5], pin=True)
    with pytest.raises(AdapterError, match="max_cpu_loras=3 no more than 2 adapters can be pinned"):
        push(llm, "third", versions[4], pin=True)
    for name in ("policy", "other", "second"):
        remove(llm, name)


class TestRefusals:
    """A bad adapter is refused with the reason, leaves nothing behind, and the engine lives on."""

    @pytest.fixture(autouse=True)
    def unharmed(self, llm: Any, checker: Checker) -> Iterator[None]:
        held = set(held_by(worker_manager(llm)))
        yield
        assert set(held_by(worker_manager(llm))) == held
        assert tokens(llm, None, prompt(20)) == checker.reference(Case(None, prompt(20)), 8)

    def test_a_rank_above_the_engines(self, llm: Any, model: Model) -> None:
        with pytest.raises(AdapterError, match="rank 16 is greater than max_lora_rank 8"):
            push(llm, "big", Adapter.create(model.hf, AdapterConfig(rank=16)))

    def test_a_module_that_is_not_served(self, llm: Any, versions: list[Adapter]) -> None:
        package = Package.of(versions[0])
        other = package.tensors.replace(b"down_proj", b"down_port")
        with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.down_port, .* are not adapted here"):
            push(llm, "other", Package(package.config, other))

    def test_a_layer_that_is_not_there(self, llm: Any, versions: list[Adapter]) -> None:
        package = Package.of(versions[0])
        deeper = Package(package.config, package.tensors.replace(b".layers.0.", b".layers.9."))
        with pytest.raises(AdapterError, match=r"layers\.9\.\S+, .* are not adapted here"):
            push(llm, "deeper", deeper)

    @pytest.mark.parametrize(
        ("module", "factor"), [("q_proj", 0), ("k_proj", 1), ("down_proj", 0), ("down_proj", 1)]
    )
    @pytest.mark.parametrize("grown", [0.5, 2])
    def test_another_width(
        self, llm: Any, versions: list[Adapter], module: str, factor: int, grown: float
    ) -> None:
        with pytest.raises(AdapterError, match=rf"{module} maps .* it belongs to another model"):
            push(llm, "other", resized(versions[0], module, factor, grown))

    def test_what_vllm_fails_on_leaves_no_half_filled_slot(
        self, llm: Any, versions: list[Adapter], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(memory_worker, "_check_modules", lambda manager, lora: None)
        before = llm.llm_engine.list_loras()
        with pytest.raises(AdapterError, match="size of tensor"):
            push(llm, "wide", resized(versions[0], "down_proj", 0, 2))
        assert llm.llm_engine.list_loras() == before
        slots = worker_manager(llm)._adapter_manager.lora_index_to_id
        assert {number for number in slots if number} <= before

    def test_an_adapter_without_weights(self, llm: Any) -> None:
        empty = Package('{"r": 1, "lora_alpha": 1, "target_modules": []}', save({}))
        with pytest.raises(AdapterError, match="it has no weights"):
            push(llm, "empty", empty)


def resized(adapter: Adapter, module: str, factor: int, grown: float) -> Package:
    """The adapter of a model that is as much wider or narrower at one module (0: what goes in, 1: what comes out)."""
    package = Package.of(adapter)
    tensors = load(package.tensors)
    name = next(name for name in tensors if f".{module}." in name and f"_{'AB'[factor]}." in name)
    size = list(tensors[name].shape)
    size[1 - factor] = int(size[1 - factor] * grown)
    return Package(package.config, save(tensors | {name: torch.ones(size)}))


def test_a_package_says_what_the_adapter_is(adapters: dict[str, Adapter]) -> None:
    digests = set()
    for name, config in CONFIGS.items():
        package = Package.of(adapters[name])
        path = memory_path("na me/x@3", json.loads(package.config)[PHASE_SECTION], package.digest)
        identity = memory_identity(path)
        assert (identity.phase, identity.method, identity.digest) == (
            config.phase,
            config.method,
            package.digest,
        )
        digests.add(package.digest)
    assert len(digests) == len(CONFIGS)


def test_the_digest_follows_one_changed_value(model: Model) -> None:
    adapter = stir(Adapter.create(model.hf, AdapterConfig(rank=2)), seed=1)
    before = Package.of(adapter).digest
    assert Package.of(adapter).digest == before
    with torch.no_grad():
        next(adapter.parameters())[0, 0] += 1e-6
    assert Package.of(adapter).digest != before


def test_the_ledger_keeps_what_requests_name() -> None:
    from vllm.lora.request import LoRARequest

    old, new = LoRARequest("a@1", 1, "memory:a@1?digest=0"), LoRARequest("a@2", 2, "memory:a@2?digest=1")
    ledger = Ledger({"a": old})
    ledger.retire("a")
    ledger.current["a"] = new
    assert ledger.droppable({1}) == []
    assert ledger.retired == [old]
    assert ledger.droppable({2}) == [old]
    assert ledger.retired == []
    assert ledger.current == {"a": new}


class FakeFront:
    """The front end of an engine that holds nothing: what it was asked, in order."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.input_processor = SimpleNamespace(lora_config=object())
        self.output_processor = SimpleNamespace(request_states={})

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[None]:
        self.asked.append((method, [one for one in args if not isinstance(one, int)]))
        return [None]

    def remove_lora(self, lora_id: int) -> bool:
        self.asked.append("remove_lora")
        return True


class FakeAsyncFront(FakeFront):
    """The same, as `AsyncLLM` answers."""

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[None]:  # type: ignore[override]
        return super().collective_rpc(method, args)

    async def remove_lora(self, lora_id: int) -> bool:  # type: ignore[override]
        return super().remove_lora(lora_id)


def test_the_asynchronous_engine_is_asked_the_same(versions: list[Adapter]) -> None:
    front, async_front = FakeFront(), FakeAsyncFront()
    for adapter in versions[:3]:
        push(front, "policy", adapter)
    remove(front, "policy")

    async def same() -> None:
        for adapter in versions[:3]:
            await push_async(async_front, "policy", adapter)
        await remove_async(async_front, "policy")

    asyncio.run(same())
    assert front.asked == async_front.asked
    assert [asked for asked in front.asked if asked == "remove_lora"] == ["remove_lora"] * 2
    with pytest.raises(AdapterError, match="enable_lora=True"):
        push(SimpleNamespace(input_processor=SimpleNamespace(lora_config=None)), "policy", versions[0])


def test_an_engine_in_another_process(
    model_folder: Path,
    model: Model,
    by_version: Checker,
    versions: list[Adapter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors, refusals and drops travel to a worker that shares nothing with this process."""
    from vllm import envs

    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    with VLLMGenerator(
        ModelConfig(str(model_folder)), block_size=32, enable_lora=True, max_loras=1, max_lora_rank=8
    ) as generator:
        engine = generator.llm.llm_engine
        assert not hasattr(engine.engine_core, "engine_core"), "the engine runs in this process"
        cases: dict[str, Case] = {}
        answers: dict[str, list[int]] = {}
        for version, adapter in enumerate(versions[:3], 1):
            lora = push(generator.llm, "policy", adapter)
            cases[str(version)] = Case(lora.lora_name, prompt(40, 9))
            engine.add_request(
                str(version), {"prompt_token_ids": list(prompt(40, 9))}, params(24), lora_request=lora
            )
            engine.step()
        with pytest.raises(AdapterError, match="rank 16 is greater than max_lora_rank 8"):
            push(generator.llm, "big", Adapter.create(model.hf, AdapterConfig(rank=16)))
        while engine.has_unfinished_requests():
            outputs = [output for output in engine.step() if output.finished]
            answers |= {output.request_id: list(output.outputs[0].token_ids) for output in outputs}
        assert answers == {key: by_version.reference(case, 24) for key, case in cases.items()}
        last = push(generator.llm, "policy", versions[3])
        assert set(engine.list_loras()) == {last.lora_int_id}
