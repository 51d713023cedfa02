"""vLLM equals the masked Hugging Face reference, token for token, in the situations a scheduler creates."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from preft_cases import CONFIGS, Case, Checker, prompt, stir

from preft.adapters import Adapter
from preft.formats import load_adapter, save_adapter
from shared.generation import Request, Sampling
from shared.generation.vllm_engine import VLLMGenerator
from shared.models import Model, ModelConfig

pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.slow]
BLOCK = 32
SLOTS = 2


@pytest.fixture(scope="module")
def engine(model_folder: Path, folders: dict[str, Path]) -> Iterator[VLLMGenerator]:
    settings: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "max_model_len": 256}
    settings |= {"max_loras": SLOTS, "max_cpu_loras": 16, "block_size": BLOCK}
    with VLLMGenerator(ModelConfig(str(model_folder)), adapters=folders, **settings) as generator:
        yield generator


@pytest.fixture(autouse=True)
def cold_cache(engine: VLLMGenerator) -> None:
    # A step that raised leaves requests behind, over which the engine would loop for ever.
    assert not engine.llm.llm_engine.has_unfinished_requests(), "an earlier test broke the engine"
    engine.llm.reset_prefix_cache()


def scheduler(engine: VLLMGenerator) -> Any:
    return engine.llm.llm_engine.engine_core.engine_core.scheduler


def every_kind(length: int, step: int = 3) -> list[Case]:
    return [Case(name, prompt(length + step * i, i)) for i, name in enumerate([None, *CONFIGS])]


def test_the_adapters_change_the_answers(checker: Checker) -> None:
    """Otherwise every comparison below would pass without them."""
    for case in every_kind(20):
        if case.adapter:
            assert checker.reference(case, 16) != checker.reference(Case(None, case.prompt), 16)


@pytest.mark.parametrize("seed", range(3))
def test_every_kind_in_one_batch_in_any_order(engine: VLLMGenerator, checker: Checker, seed: int) -> None:
    cases = every_kind(20) + every_kind(41, step=5)
    random.Random(seed).shuffle(cases)
    checker.check(engine, cases)


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_prompts_computed_in_chunks(
    engine: VLLMGenerator, checker: Checker, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler(engine).scheduler_config, "long_prefill_token_threshold", chunk)
    checker.check(engine, every_kind(20), max_tokens=8)


@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 63, 64, 65, 130])
def test_prompt_lengths_around_chunks_and_blocks(
    engine: VLLMGenerator, checker: Checker, length: int
) -> None:
    names = [None, "lora_p_0", "reft_p_0", "lora_all", "lora_decode", "lora_boundary"]
    checker.check(engine, [Case(name, prompt(length, 3)) for name in names], max_tokens=8)


def test_more_adapters_than_slots_decode_together(engine: VLLMGenerator, checker: Checker) -> None:
    names = ["lora_p_0", "lora_p_1", "lora_p_2", "lora_p_3", "reft_p_0", "reft_p_1"]
    running: list[set[str]] = []
    original = scheduler(engine).schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        requests = scheduler(engine).running
        if len(output.num_scheduled_tokens) == len(requests):
            running.append({request._own_lora_request.lora_name for request in requests})
        return output

    scheduler(engine).schedule = schedule
    try:
        checker.check(engine, [Case(name, prompt(25 + i, i)) for i, name in enumerate(names)], max_tokens=24)
    finally:
        scheduler(engine).schedule = original
    assert max(map(len, running)) == len(names) > SLOTS


def test_all_token_adapters_wait_for_a_slot(engine: VLLMGenerator, checker: Checker) -> None:
    names = ["lora_all", "reft_all", "lora_decode", "lora_boundary", "lora_p_0"]
    checker.check(engine, [Case(name, prompt(25 + i, i)) for i, name in enumerate(names)])


def cached_tokens(engine: VLLMGenerator, case: Case) -> int:
    """Tokens of a request that the prefix cache supplied."""
    lora = engine._lora(case.adapter)
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0)
    [output] = engine.llm.generate(
        {"prompt_token_ids": list(case.prompt)}, params, lora_request=lora, use_tqdm=False
    )
    return output.num_cached_tokens or 0


def test_a_warm_cache_gives_what_a_cold_one_gives(engine: VLLMGenerator, checker: Checker) -> None:
    cases = every_kind(70, step=4)
    checker.check(engine, cases, max_tokens=8)
    checker.check(engine, cases[::-1], max_tokens=8)
    hits = {case.adapter: cached_tokens(engine, case) for case in cases}
    assert all(hit >= 2 * BLOCK for hit in hits.values()), hits


def test_adapters_do_not_share_blocks_of_one_text(engine: VLLMGenerator, checker: Checker) -> None:
    for name in [None, "lora_p_0", "reft_p_0", "lora_p_1", None, "lora_all", "lora_p_0"]:
        checker.check(engine, [Case(name, prompt(80))], max_tokens=8)


def test_a_decode_adapter_shares_the_base_models_prompt_blocks(engine: VLLMGenerator) -> None:
    assert cached_tokens(engine, Case(None, prompt(70))) == 0
    assert cached_tokens(engine, Case("lora_decode", prompt(70))) == 2 * BLOCK
    assert cached_tokens(engine, Case("lora_p_0", prompt(70))) == 0


@pytest.mark.parametrize("name", ["lora_p_0", "reft_p_0", "lora_all", "lora_decode", "lora_boundary"])
def test_a_short_prompt_leaves_no_false_block(engine: VLLMGenerator, checker: Checker, name: str) -> None:
    """A prompt shorter than a block: block 0 is part adapted, part not, and has no parent to tell it by."""
    for seed in range(5, 15):  # some answers end too soon to fill the block
        turn = Case(name, prompt(20, seed))
        [tokens] = checker.served(engine, [turn], 60)
        text = (*turn.prompt, *tokens)
        if len(text) > 2 * BLOCK:
            break
    assert len(text) > 2 * BLOCK
    for other in (None, "lora_p_1", name):
        checker.check(engine, [Case(other, text)], max_tokens=8)


@pytest.mark.parametrize("length", [20, 40, 64])
def test_the_second_turn_does_not_depend_on_the_cache(
    engine: VLLMGenerator, checker: Checker, length: int
) -> None:
    """History is prompt again (policy recompute): generated tokens of turn 1 are adapted in turn 2."""
    names = [None, "lora_p_0", "reft_p_0", "lora_all"]
    first = [Case(name, prompt(length, 7)) for name in names]
    answers = checker.served(engine, first, 40)
    second = [
        Case(case.adapter, (*case.prompt, *answer, *prompt(9, 8))) for case, answer in zip(first, answers)
    ]
    checker.check(engine, second, max_tokens=8)
    engine.llm.reset_prefix_cache()
    checker.check(engine, second, max_tokens=8)


def test_a_prompt_cached_but_for_one_token(engine: VLLMGenerator, checker: Checker) -> None:
    for name in (None, "lora_p_0", "reft_p_0"):
        checker.check(engine, [Case(name, prompt(2 * BLOCK, 9))], max_tokens=4)
        checker.check(engine, [Case(name, (*prompt(2 * BLOCK, 9), 77))], max_tokens=4)


class TestReload:
    """Weights that change on disk under one name."""

    @pytest.fixture
    def loaded(self, model: Model, folders: dict[str, Path], tmp_path: Path) -> tuple[Path, Any]:
        from vllm.lora.request import LoRARequest

        folder = tmp_path / "adapter"
        shutil.copytree(folders["lora_p_0"], folder)
        return folder, LoRARequest("reloaded", 90, str(folder))

    def answer(self, engine: VLLMGenerator, lora: Any) -> list[int]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=8, temperature=0)
        prompts = {"prompt_token_ids": list(prompt(70))}
        [output] = engine.llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    def test_old_blocks_are_not_used_for_new_weights(
        self, engine: VLLMGenerator, model: Model, adapters: dict[str, Adapter], loaded: tuple[Path, Any]
    ) -> None:
        from vllm.lora.request import LoRARequest

        folder, lora = loaded
        old = self.answer(engine, lora)
        changed = save_adapter(stir(load_adapter(folder, model.hf), seed=5), folder)
        with pytest.raises(ValueError, match="changed after they were loaded"):
            self.answer(engine, lora)
        engine.llm.llm_engine.add_lora(LoRARequest("reloaded", 90, str(changed), load_inplace=True))
        new = Checker(model, {"new": load_adapter(changed, model.hf)}).reference(Case("new", prompt(70)), 8)
        assert self.answer(engine, lora) == new != old
        assert engine.llm.llm_engine.remove_lora(90)

    def test_a_folder_without_adapter_is_refused_and_the_engine_lives_on(
        self, engine: VLLMGenerator, checker: Checker, tmp_path: Path
    ) -> None:
        from vllm.lora.request import LoRARequest

        with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
            self.answer(engine, LoRARequest("nothing", 91, str(tmp_path)))
        checker.check(engine, [Case("lora_p_0", prompt(20))])


def test_several_samples_share_one_adapted_prompt(engine: VLLMGenerator, checker: Checker) -> None:
    case = Case("lora_p_0", prompt(40))
    sampling = Sampling(max_tokens=6, temperature=1e-6, n=3, logprobs=None)
    [samples] = engine.generate([Request(list(case.prompt), adapter=case.adapter, seed=0)], sampling)
    assert [sample.token_ids for sample in samples] == [checker.reference(case, 6)] * 3
