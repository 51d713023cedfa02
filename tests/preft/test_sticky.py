"""Sticky history served: earlier answers stay generated text, and the next turn finds their blocks in the cache."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from preft_cases import prompt, stir

from preft.adapters import Adapter, AdapterConfig
from preft.formats import save_adapter
from preft.reference import greedy_reference
from preft.vllm import runner
from preft.vllm.identity import AdapterRegistry
from preft.vllm.requests import adapter_request
from preft.vllm.sticky import KEY, generated_positions, placed, read_spans
from shared.chat import training_row
from shared.generation.vllm_engine import VLLMGenerator
from shared.history import History
from shared.models import Model, ModelConfig, load
from shared.tokens import Message, Phase

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.slow]
BLOCK = 32


@pytest.fixture(scope="module")
def sticky(model: Model) -> dict[str, Adapter]:
    configs = {
        "prompt": AdapterConfig(rank=4, history=History.STICKY),
        "edit": AdapterConfig("direft", rank=4, history=History.STICKY),
        "boundary": AdapterConfig(rank=4, phase=Phase.DECODE_BOUNDARY, history=History.STICKY),
        "recompute": AdapterConfig(rank=4),
    }
    return {
        name: stir(Adapter.create(model.hf, config, seed=40 + i), seed=50 + i)
        for i, (name, config) in enumerate(configs.items())
    }


@pytest.fixture(scope="module")
def saved(sticky: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sticky")
    return {name: save_adapter(adapter, root / name) for name, adapter in sticky.items()}


@pytest.fixture(scope="module")
def engine(model_folder: Path, saved: dict[str, Path]) -> Iterator[VLLMGenerator]:
    settings: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256}
    settings |= {"max_loras": 2, "block_size": BLOCK}
    with VLLMGenerator(ModelConfig(str(model_folder)), adapters=saved, **settings) as generator:
        yield generator


class Answer(tuple):
    """Token ids of an answer; `cached` tokens of its prompt came from the cache."""

    cached: int


def ask(
    engine: VLLMGenerator,
    saved: dict[str, Path],
    turns: list[tuple[str, tuple[int, ...], list[int]]],
    count: int,
) -> list[Answer]:
    from vllm import SamplingParams

    outputs = engine.llm.generate(
        [{"prompt_token_ids": list(ids)} for _, ids, _ in turns],
        [
            SamplingParams(
                max_tokens=count, temperature=0, ignore_eos=True, extra_args={KEY: spans} if spans else None
            )
            for _, _, spans in turns
        ],
        lora_request=[adapter_request(name, saved) for name, _, _ in turns],
        use_tqdm=False,
    )
    answers = []
    for output in outputs:
        answers.append(Answer(output.outputs[0].token_ids))
        answers[-1].cached = output.num_cached_tokens or 0
    return answers


def expected(model: Model, adapter: Adapter, ids: tuple[int, ...], spans: list[int], count: int) -> Answer:
    pairs = tuple(zip(spans[::2], spans[1::2]))
    found = greedy_reference(model.hf, adapter, list(ids), count, generated=pairs)
    assert found.smallest_gap > 2e-5
    return Answer(found.tokens)


def test_three_turns_cold_and_warm(
    engine: VLLMGenerator, model: Model, sticky: dict[str, Adapter], saved: dict[str, Path]
) -> None:
    """All adapters in one batch; each turn's prompt is the chat so far and a new question."""
    engine.llm.reset_prefix_cache()
    chats = {name: (prompt(41 + i, i), []) for i, name in enumerate(sticky)}
    for turn in range(3):
        turns = [(name, ids, spans) for name, (ids, spans) in chats.items()]
        answers = ask(engine, saved, turns, 50)
        for (name, ids, spans), answer in zip(turns, answers):
            known = spans if name != "recompute" else []
            assert answer == expected(model, sticky[name], ids, known, 50), (turn, name)
            if turn and name != "recompute":
                assert answer.cached >= (spans[-1] - 1) // BLOCK * BLOCK  # the earlier answer's blocks too
            if turn and name == "recompute":
                assert answer.cached <= spans[-2] // BLOCK * BLOCK
            text = (*ids, *answer)
            chats[name] = ((*text, *prompt(7, turn)), [*spans, len(ids), len(text)])
    cold = [(name, ids, spans) for name, (ids, spans) in chats.items()]
    engine.llm.reset_prefix_cache()
    assert ask(engine, saved, cold, 4) == ask(engine, saved, cold, 4)
    spans_matter = [
        expected(model, sticky[name], ids, [], 4) != expected(model, sticky[name], ids, spans, 4)
        for name, ids, spans in cold[:2]
    ]
    assert any(spans_matter), "the spans change nothing here, so nothing was compared"


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_do_not_matter(
    engine: VLLMGenerator,
    model: Model,
    sticky: dict[str, Adapter],
    saved: dict[str, Path],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.llm.reset_prefix_cache()
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    monkeypatch.setattr(scheduler.scheduler_config, "long_prefill_token_threshold", chunk)
    turns = [(name, prompt(50, 3), [5, 11, 20, 38]) for name in sticky]
    found = ask(engine, saved, turns, 6)
    for (name, ids, spans), answer in zip(turns, found):
        assert answer == expected(model, sticky[name], ids, [] if name == "recompute" else spans, 6), name


@pytest.mark.parametrize("spans", [[3], [5, 3], [3, 3], [0, 99], [-1, 4], ["a", "b"], "3,4", [1, 4, 3, 6]])
def test_impossible_positions_are_refused(engine: VLLMGenerator, saved: dict[str, Path], spans: Any) -> None:
    from vllm.exceptions import VLLMValidationError  # a server answers it with status 400

    with pytest.raises(VLLMValidationError, match="must be positions start, end"):
        ask(engine, saved, [("prompt", prompt(20), spans)], 2)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    with pytest.raises(ValueError, match="must be positions"):
        read_spans({KEY: spans}, 20)


def test_other_adapters_do_not_read_positions(engine: VLLMGenerator, saved: dict[str, Path]) -> None:
    with_positions, without = ask(
        engine, saved, [("recompute", prompt(20), [5, 3]), ("recompute", prompt(20), [])], 2
    )
    assert with_positions == without


def test_the_positions_of_a_chat_are_those_of_training() -> None:
    tokenizer = load("tinyworld").tokenizer
    chat = [
        Message(role="user", content="Where is Boston?"),
        Message(role="assistant", content="In Massachusetts."),
        Message(role="user", content="And Austin?"),
        Message(role="assistant", content="In Texas."),
        Message(role="user", content="And Salem?"),
    ]
    flat = generated_positions(tokenizer, chat)
    row = training_row(tokenizer, [*chat, Message(role="assistant", content="In Oregon.")], History.STICKY)
    marked = [False] * row.prompt_length
    for start, end in zip(flat[::2], flat[1::2]):
        marked[start:end] = [True] * (end - start)
    assert marked == row.generated[: row.prompt_length]
    assert sum(marked) > 4
    assert generated_positions(tokenizer, chat[:1]) == []
    assert read_spans({KEY: flat}, row.prompt_length) == tuple(zip(flat[::2], flat[1::2]))


def test_the_spans_travel_to_other_processes_with_the_adapter(saved: dict[str, Path]) -> None:
    own = adapter_request("prompt", saved)
    assert placed(own, ()) is own
    sent = pickle.loads(pickle.dumps(placed(own, ((3, 5),))))
    assert (sent.lora_name, sent.lora_int_id, sent.lora_path) == (
        own.lora_name,
        own.lora_int_id,
        own.lora_path,
    )
    assert sent.generated == ((3, 5),)


@pytest.fixture
def cold_registry(plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has met no adapter yet: the first step of the first request."""
    monkeypatch.setattr(runner, "worker_adapters", AdapterRegistry())


@pytest.mark.usefixtures("cold_registry")
def test_runner_v1_reads_the_spans_of_each_request(saved: dict[str, Path]) -> None:
    from vllm.v1.worker.gpu_input_batch import InputBatch

    own = adapter_request("prompt", saved)
    number = own.lora_int_id
    placements = {"r0": placed(own, ((2, 4),)), "r1": own}
    batch = SimpleNamespace(
        num_reqs=2,
        request_lora_mapping=np.array([number, number]),
        lora_id_to_lora_request={number: own},
        num_prompt_tokens=np.array([6, 6]),
        num_computed_tokens_cpu=np.array([1, 1]),
        req_ids=list(placements),
        cached_requests={name: SimpleNamespace(lora_request=lora) for name, lora in placements.items()},
    )
    _, tokens, _ = InputBatch.make_lora_inputs(batch, np.array([6, 6]), np.array([1, 1]))
    assert tokens == (number, 0, 0, number, number, 0, *[number] * 5, 0)


@pytest.mark.usefixtures("cold_registry")
def test_runner_v2_reads_the_spans_of_each_request(saved: dict[str, Path]) -> None:
    from vllm.v1.worker.gpu.lora_utils import LoraState

    own = adapter_request("prompt", saved)
    state = LoraState(max_num_reqs=4)
    for i, spans in enumerate([((2, 4),), ()]):
        state.add_request(f"r{i}", i, placed(own, spans))
    state.request_states = SimpleNamespace(
        prompt_len=SimpleNamespace(np=np.array([6, 6, 0, 0])),
        num_computed_tokens_np=np.array([1, 1, 0, 0]),
        req_id_to_index={"r0": 0, "r1": 1},
    )
    _, tokens, _ = state.make_lora_inputs(["r0", "r1"], np.array([0, 1]), np.array([6, 6], dtype=np.int32))
    number = own.lora_int_id
    assert tokens == (number, 0, 0, number, number, 0, *[number] * 5, 0)
