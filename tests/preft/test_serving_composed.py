"""Compositions and interventions in vLLM equal their Hugging Face references, token for token.

One engine with two slots and a cache too small for a full batch: adapters wait for slots and requests are preempted.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from preft_cases import Case, Checker, prompt
from preft_engine import allow_engines_after_numba

from preft.adapters import Adapter
from preft.composition import Composition, compose
from preft.vllm.requests import adapter_folder, adapter_request
from shared.generation import Request, Sampling
from shared.generation.hf import HFGenerator
from shared.generation.vllm_engine import VLLMGenerator
from shared.interventions import Add, Intervention, LowRank, Scale, Set, save_interventions
from shared.models import Model, ModelConfig
from shared.tokens import Phase

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.slow]
BLOCK = 32
SLOTS = 2
SUMS = {
    "two": {"lora_p_0": 0.7, "lora_p_2": 0.5},
    "mixed": {"lora_p_2": 1.0, "reft_p_0": -1.0},
    "edits": {"reft_p_0": 1.0, "reft_p_1": -0.5},
    "then": {"lora_p_0": 1.0, "lora_decode": 1.0},
    "meet": {"reft_p_0": 1.0, "lora_boundary": 0.5},
    "over": {"lora_all": 0.5, "reft_p_1": 1.0},
}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def interventions(width: int) -> dict[str, list[Intervention]]:
    last = "blocks.2.output"
    return {
        "calm": [Add("blocks.1.output", noise(width))],
        "low": [LowRank(last, noise(3, width) / 8, noise(width, 3) / 8, noise(width), phase=Phase.PREFILL)],
        "fixed": [Set("blocks.0.output", 9.0, indices=[3, 90], phase=Phase.DECODE)],
        "phases": [
            Add(last, noise(width), phase=Phase.PREFILL),
            Scale(last, 5.0, indices=[1, 2, 3], phase=Phase.DECODE_BOUNDARY),
        ],
    }


@pytest.fixture(scope="module")
def sums(adapters: dict[str, Adapter]) -> dict[str, Composition]:
    return {
        name: compose([(adapters[part], weight) for part, weight in parts.items()])
        for name, parts in SUMS.items()
    }


@pytest.fixture(scope="module")
def saved(
    model: Model,
    folders: dict[str, Path],
    sums: dict[str, Composition],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Path]]:
    """Every adapter, composition and folder of interventions by name; a cache of their own."""
    root = tmp_path_factory.mktemp("saved")
    composed = {name: one.save(root / name) for name, one in sums.items()}
    edits = {
        name: save_interventions(root / name, several, model)
        for name, several in interventions(model.architecture.width).items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFT_CACHE", str(root / "cache"))
        yield folders | composed | edits


@pytest.fixture(scope="module")
def engine(model_folder: Path, saved: dict[str, Path]) -> Iterator[VLLMGenerator]:
    settings: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 160}
    settings |= {"max_loras": SLOTS, "max_cpu_loras": 16, "block_size": BLOCK, "num_gpu_blocks_override": 17}
    adapters = {name: adapter_folder(name, saved) for name in saved}
    with VLLMGenerator(ModelConfig(str(model_folder)), adapters=adapters, **settings) as generator:
        yield generator


@pytest.fixture(autouse=True)
def cold_cache(engine: VLLMGenerator) -> None:
    assert not engine.llm.llm_engine.has_unfinished_requests(), "an earlier test broke the engine"
    engine.llm.reset_prefix_cache()


@pytest.fixture(scope="module")
def checker(model: Model, adapters: dict[str, Adapter], sums: dict[str, Composition]) -> Checker:
    return Checker(model, adapters | sums)


def scheduler(engine: VLLMGenerator) -> Any:
    return engine.llm.llm_engine.engine_core.engine_core.scheduler


def every_sum(length: int) -> list[Case]:
    names = [None, *SUMS, "lora_decode", "lora_all"]
    return [Case(name, prompt(length + 3 * i, i)) for i, name in enumerate(names)]


def test_the_compositions_change_the_answers(checker: Checker) -> None:
    for name, parts in SUMS.items():
        answers = [checker.reference(Case(one, prompt(33)), 16) for one in (None, name, *parts)]
        assert all(answers[1] != other for other in (answers[0], *answers[2:])), name


@pytest.mark.parametrize("chunk", [0, 1, 7, 16])
def test_mixed_batches_in_chunks(
    engine: VLLMGenerator, checker: Checker, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler(engine).scheduler_config, "long_prefill_token_threshold", chunk)
    checker.check(engine, every_sum(20), max_tokens=8)


@pytest.mark.parametrize("length", [1, 2, BLOCK, BLOCK + 1])
def test_short_prompts_and_full_blocks(engine: VLLMGenerator, checker: Checker, length: int) -> None:
    checker.check(engine, [Case(name, prompt(length, 3)) for name in (None, *SUMS)], max_tokens=6)


def test_preempted_requests_are_recomputed_within_the_slots(
    engine: VLLMGenerator, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt and generated tokens come back in one chunk, which may need two adapters where there is one slot left."""
    preempted, used = [], []
    preempt, schedule = scheduler(engine)._preempt_request, scheduler(engine).schedule

    def noting(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request._own_lora_request and request._own_lora_request.lora_name)
        preempt(request, *args, **kwargs)

    def counting(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        used.append(len(scheduler(engine)._adapters_in_step[1]))
        return output

    monkeypatch.setattr(scheduler(engine), "_preempt_request", noting)
    monkeypatch.setattr(scheduler(engine), "schedule", counting)
    for order in (1, -1):
        engine.llm.reset_prefix_cache()
        cases = [Case(name, prompt(60 + i, i)) for i, name in enumerate([None, *SUMS])]
        checker.check(engine, cases[::order], max_tokens=48)
    assert {"then", "meet", "over"} & set(preempted), preempted
    assert max(used) == SLOTS


def test_a_decoding_part_holds_its_slot_and_a_prompt_part_gives_it_back(
    engine: VLLMGenerator, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    schedule = scheduler(engine).schedule

    def noting(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        running = [request for request in scheduler(engine).running if request.num_computed_tokens > 25]
        seen.append({request.lora_request.lora_name for request in running if request.lora_request})
        return output

    monkeypatch.setattr(scheduler(engine), "schedule", noting)
    checker.check(engine, [Case("then", prompt(25))], max_tokens=12)
    assert len(seen) > 8
    assert len(set().union(*seen)) == 1  # the decode part, from the first generated token on
    seen.clear()
    checker.check(engine, [Case("two", prompt(25))], max_tokens=12)
    assert not set().union(*seen)


def cached_tokens(engine: VLLMGenerator, name: str | None, ids: tuple[int, ...]) -> int:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0)
    [output] = engine.llm.generate(
        {"prompt_token_ids": list(ids)}, params, lora_request=engine._lora(name), use_tqdm=False
    )
    return output.num_cached_tokens or 0


@pytest.mark.parametrize("name", ["then", "meet", "over", "mixed"])
def test_cold_and_warm_caches_agree(engine: VLLMGenerator, checker: Checker, name: str) -> None:
    first = Case(name, prompt(70, 4))
    checker.check(engine, [first], max_tokens=40)
    checker.check(engine, [first], max_tokens=40)
    assert cached_tokens(engine, name, first.prompt) == 2 * BLOCK
    assert cached_tokens(engine, None, first.prompt) == 0
    second = Case(name, (*first.prompt, *checker.reference(first, 40), *prompt(5, 5)))
    checker.check(engine, [second], max_tokens=6)
    engine.llm.reset_prefix_cache()
    checker.check(engine, [second], max_tokens=6)


def edited(model: Model, edits: list[Intervention], ids: tuple[int, ...]) -> list[int]:
    """What shared's own generation says under the interventions."""
    generator = HFGenerator(model, edits)
    [[answer]] = generator.generate([Request(list(ids))], Sampling(max_tokens=10, logprobs=None))
    return answer.token_ids


def ask(
    engine: VLLMGenerator, names: list[str], known: dict[str, Path], ids: tuple[int, ...]
) -> list[list[int]]:
    from vllm import SamplingParams

    outputs = engine.llm.generate(
        [{"prompt_token_ids": list(ids)}] * len(names),
        [SamplingParams(max_tokens=10, temperature=0)] * len(names),
        lora_request=[adapter_request(name, known) for name in names],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_interventions_are_served_as_they_edit(
    engine: VLLMGenerator, model: Model, saved: dict[str, Path]
) -> None:
    edits = interventions(model.architecture.width)
    ids = prompt(37, 6)
    expected = [edited(model, several, ids) for several in edits.values()]
    assert ask(engine, list(edits), saved, ids) == expected
    assert len({tuple(tokens) for tokens in [*expected, edited(model, [], ids)]}) == len(edits) + 1
    answers = engine.generate(
        [Request(list(ids), adapter=name) for name in edits], Sampling(max_tokens=10, logprobs=None)
    )
    assert [answer[0].token_ids for answer in answers] == expected


def test_the_folder_of_interventions_is_a_lora_path(
    engine: VLLMGenerator, model: Model, saved: dict[str, Path]
) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    ids = prompt(41, 2)
    lora = LoRARequest("raw", 77, str(saved["phases"]))
    assert engine.llm.llm_engine.add_lora(lora)
    [output] = engine.llm.generate(
        {"prompt_token_ids": list(ids)},
        SamplingParams(max_tokens=10, temperature=0),
        lora_request=lora,
        use_tqdm=False,
    )
    assert list(output.outputs[0].token_ids) == edited(model, interventions(128)["phases"], ids)
    before = engine.llm.llm_engine.list_loras()
    assert engine.llm.llm_engine.remove_lora(77)
    assert len(before - engine.llm.llm_engine.list_loras()) == 3  # one part a kind of token


def test_strengths_and_sums_by_name(
    engine: VLLMGenerator, model: Model, adapters: dict[str, Adapter], saved: dict[str, Path]
) -> None:
    ids = prompt(29, 1)
    width = model.architecture.width
    base = Checker(model, {}).reference(Case(None, ids), 10)
    halves = compose([(adapters["lora_p_0"], 0.5), (adapters["lora_decode"], 2.0)])
    found = ask(engine, ["calm:0", "calm:0.5", "calm:-2", "lora_p_0:0.5+lora_decode:2"], saved, ids)
    assert found == [
        base,
        edited(model, [Add("blocks.1.output", noise(width), 0.5)], ids),
        edited(model, [Add("blocks.1.output", noise(width), -2.0)], ids),
        Checker(model, {"sum": halves}).reference(Case("sum", ids), 10),  # type: ignore[dict-item]
    ]
    assert len({tuple(tokens) for tokens in found}) == len(found)


def test_interventions_of_another_model_are_refused(
    engine: VLLMGenerator, checker: Checker, tmp_path: Path
) -> None:
    import json
    import shutil

    from shared.models import load

    other = load(ModelConfig("random:qwen3"))
    folder = save_interventions(
        tmp_path / "other", [Add("blocks.0.output", torch.ones(other.architecture.width))], other
    )
    document = json.loads((folder / "interventions.json").read_text())
    document["model"]["n_layers"] += 1
    (folder / "interventions.json").write_text(json.dumps(document))
    with pytest.raises(
        ValueError, match=r"'other' was made for a model of \d+ blocks of width \d+; this one has 3"
    ):
        ask(engine, ["other"], {"other": folder}, prompt(9))
    shutil.rmtree(folder)
    checker.check(engine, [Case("then", prompt(20))], max_tokens=4)


def test_speculation_on_a_prompt_cached_but_for_one_token(
    model_folder: Path, checker: Checker, saved: dict[str, Path]
) -> None:
    """The scheduler pads that token's chunk with drafts, so that one chunk needs the parts of both sides."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    settings: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "max_model_len": 160}
    settings |= {"max_loras": 3, "max_cpu_loras": 8, "block_size": BLOCK, "speculative_config": ngram}
    allow_engines_after_numba()
    names = ["then", "meet", "lora_decode", "lora_p_0"]
    text = prompt(20, 1) * 3  # repeats itself, as n-grams like it
    cases = [Case(name, (*text, *text[:4], 77 + i)) for i, name in enumerate(names)]
    assert all(len(case.prompt) == 2 * BLOCK + 1 for case in cases)
    adapters = {name: saved[name] for name in names}
    with VLLMGenerator(ModelConfig(str(model_folder)), adapters=adapters, **settings) as generator:
        checker.check(generator, cases, max_tokens=12)
        for case in [*cases, *cases]:  # warm, alone and beside a request that decodes
            checker.check(generator, [case], max_tokens=12)
        checker.check(generator, cases, max_tokens=12)
