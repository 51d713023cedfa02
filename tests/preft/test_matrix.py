"""The matrix: vLLM equals the masked Hugging Face reference, token for token, in every situation a scheduler creates.

Columns are engines (fixture `engine`), rows are the tests. All kinds of adapters and the base model share each batch.
`test_matrix_v2.py` runs the same file on Model Runner V2.
"""

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from preft_cases import COMPOSED, CONFIGS, Case, Checker, prompt, stir
from preft_engine import V2, Driver, any_engine, chunks_of, few_blocks, scheduler

from preft.adapters import Adapter
from preft.formats import save_adapter
from preft.reference import logprob_reference
from shared.generation.vllm_engine import VLLMGenerator
from shared.models import Model, ModelConfig

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.slow]
BLOCK, SLOTS = 32, 2
COMMON: dict[str, Any] = {"max_num_seqs": 24, "max_num_batched_tokens": 1024, "max_model_len": 256}
COMMON |= {"async_scheduling": False, "max_loras": SLOTS, "max_cpu_loras": 32, "block_size": BLOCK}
COMMON |= {"num_gpu_blocks_override": 200}
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_cache": {"enable_prefix_caching": False},
    "ngram": {"speculative_config": NGRAM},
    "async": {"async_scheduling": True},
}
if V2:
    ENGINES["async_ngram"] = {"async_scheduling": True, "speculative_config": NGRAM | {"method": "ngram_gpu"}}
KINDS = [None, *CONFIGS, COMPOSED]
PREFILL_ONLY = [name for name in CONFIGS if "_p_" in name]


@pytest.fixture(scope="module", params=ENGINES)
def engine(
    request: pytest.FixtureRequest, model_folder: Path, folders: dict[str, Path], composed_folder: Path
) -> Iterator[VLLMGenerator]:
    settings, folders = COMMON | ENGINES[request.param], folders | {COMPOSED: composed_folder}
    with any_engine():
        with VLLMGenerator(ModelConfig(str(model_folder)), adapters=folders, **settings) as generator:
            config = generator.llm.llm_engine.vllm_config
            assert bool(config.scheduler_config.async_scheduling) == ("async" in request.param)
            assert config.use_v2_model_runner == V2
            yield generator


class Mild(NamedTuple):
    """Adapters as small as trained ones: under those of the other rows float32 itself is off by 1e-4."""

    adapters: dict[str, Adapter | None]
    loras: dict[str, Any]


@pytest.fixture(scope="module")
def mild(model: Model, plugin: None, tmp_path_factory: pytest.TempPathFactory) -> Mild:
    from vllm.lora.request import LoRARequest

    root, adapters, loras = tmp_path_factory.mktemp("mild"), {"base": None}, {"base": None}
    for i, (name, config) in enumerate(CONFIGS.items()):
        adapters[name] = stir(Adapter.create(model.hf, config, seed=i), seed=i, size=0.2)
        loras[name] = LoRARequest(f"mild {name}", 100 + i, str(save_adapter(adapters[name], root / name)))
    return Mild(adapters, loras)


def chosen(tokens: Sequence[int], logprobs: Sequence[Any]) -> list[float]:
    """Log-probability of each token out of vLLM's table of each position."""
    return [table[token].logprob for token, table in zip(tokens, logprobs, strict=True)]


@pytest.fixture(autouse=True)
def cold_cache(engine: VLLMGenerator) -> Iterator[None]:
    assert engine.llm.reset_prefix_cache()
    yield
    # A test that failed leaves requests behind, which would be part of the next one.
    inner = engine.llm.llm_engine
    inner.abort_request(list(inner.output_processor.request_states), internal=True)
    Driver(engine).run()


def every_kind(length: int, step: int = 3) -> list[Case]:
    return [Case(name, prompt(length + step * i, i)) for i, name in enumerate(KINDS)]


def test_the_adapters_change_the_answers(checker: Checker) -> None:
    """Otherwise every comparison below would pass without them."""
    for case in every_kind(20):
        if case.adapter:
            assert checker.reference(case, 16) != checker.reference(Case(None, case.prompt), 16)


@pytest.mark.parametrize("seed", range(2))
def test_every_kind_in_one_batch_in_any_order(engine: VLLMGenerator, checker: Checker, seed: int) -> None:
    cases = every_kind(20) + every_kind(41, step=5)
    random.Random(seed).shuffle(cases)
    checker.check(engine, cases)


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_prompts_computed_in_chunks(engine: VLLMGenerator, checker: Checker, chunk: int) -> None:
    cases = every_kind(20) if chunk > 1 else every_kind(9, step=1)  # a step a token
    with chunks_of(engine, chunk) as sizes:
        checker.check(engine, cases, max_tokens=8)
    assert max(sizes) == chunk


def test_prompts_computed_whole(engine: VLLMGenerator, checker: Checker) -> None:
    cases = every_kind(20)
    with chunks_of(engine, 0) as sizes:
        checker.check(engine, cases, max_tokens=8)
    assert max(sizes) > 32


def test_chunks_cut_by_a_small_budget(
    engine: VLLMGenerator, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler(engine), "max_num_scheduled_tokens", 64)
    checker.check(engine, every_kind(41, step=5), max_tokens=8)


@pytest.mark.parametrize("length", [1, 2])
def test_prompts_of_one_token(engine: VLLMGenerator, checker: Checker, length: int) -> None:
    checker.check(engine, [Case(name, prompt(length, 3 + i)) for i, name in enumerate(KINDS)])


def test_prompt_lengths_around_blocks(engine: VLLMGenerator, checker: Checker) -> None:
    names = [None, "lora_p_0", "reft_p_0", "lora_all", "lora_decode", "lora_boundary"]
    for length in (BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK):
        checker.check(engine, [Case(name, prompt(length, 3)) for name in names], max_tokens=8)


def cached_tokens(engine: VLLMGenerator, case: Case) -> int:
    """Tokens of a request that the prefix cache supplied."""
    driver = Driver(engine)
    driver.add("hit", case, max_tokens=1)
    driver.run()
    return driver.outputs["hit"].num_cached_tokens or 0


def caches(engine: VLLMGenerator) -> bool:
    return bool(engine.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching)


def test_a_warm_cache_gives_what_a_cold_one_gives(engine: VLLMGenerator, checker: Checker) -> None:
    cases = every_kind(70, step=4)
    checker.check(engine, cases, max_tokens=8)
    checker.check(engine, cases[::-1], max_tokens=8)
    least = 2 * BLOCK if caches(engine) else 0
    assert all(cached_tokens(engine, case) >= least for case in cases)


def test_a_prompt_cached_but_for_one_token(engine: VLLMGenerator, checker: Checker) -> None:
    names = [None, "lora_p_0", "reft_p_0", "lora_decode", "lora_boundary"]
    checker.check(engine, [Case(name, prompt(2 * BLOCK, 9)) for name in names], max_tokens=4)
    longer = [Case(name, (*prompt(2 * BLOCK, 9), 77)) for name in names]
    checker.check(engine, longer, max_tokens=8)
    assert cached_tokens(engine, longer[1]) == (2 * BLOCK if caches(engine) else 0)


@pytest.mark.parametrize("length", [20, 40, 64])
def test_the_second_turn_does_not_depend_on_the_cache(
    engine: VLLMGenerator, checker: Checker, length: int
) -> None:
    """History is prompt again (policy recompute): generated tokens of turn 1 are adapted in turn 2."""
    first = [Case(name, prompt(length, 7)) for name in (None, "lora_p_0", "reft_p_0", "lora_all")]
    answers = checker.served(engine, first, 40)
    second = [
        Case(case.adapter, (*case.prompt, *answer, *prompt(9, 8))) for case, answer in zip(first, answers)
    ]
    checker.check(engine, second, max_tokens=8)
    engine.llm.reset_prefix_cache()
    checker.check(engine, second, max_tokens=8)


def test_adapters_do_not_share_blocks_of_one_text(engine: VLLMGenerator, checker: Checker) -> None:
    for name in [None, "lora_p_0", "reft_p_0", "lora_p_1", None, "lora_all", "lora_p_0"]:
        checker.check(engine, [Case(name, prompt(80))], max_tokens=8)


def test_a_decode_adapter_shares_the_base_models_prompt_blocks(engine: VLLMGenerator) -> None:
    assert cached_tokens(engine, Case(None, prompt(70))) == 0
    assert cached_tokens(engine, Case("lora_decode", prompt(70))) == (2 * BLOCK if caches(engine) else 0)
    assert cached_tokens(engine, Case("lora_p_0", prompt(70))) == 0


def test_a_short_prompt_leaves_no_false_block(engine: VLLMGenerator, checker: Checker) -> None:
    """A prompt shorter than a block: block 0 is part adapted, part not, and has no parent to tell it by."""
    names = ["lora_p_0", "reft_p_0", "lora_decode"]
    turns = [Case(name, prompt(20, seed)) for name in names for seed in range(5, 9)]
    answers = zip(turns, checker.served(engine, turns, 50))
    texts = {case.adapter: (*case.prompt, *tokens) for case, tokens in answers if len(tokens) == 50}
    assert len(texts) == len(names), "answers ended too soon to fill the block: choose other prompts"
    for name, text in texts.items():
        checker.check(engine, [Case(other, text) for other in (None, "lora_p_1", name)], max_tokens=4)


def test_preempted_requests_are_recomputed_as_they_were_computed(
    engine: VLLMGenerator, checker: Checker
) -> None:
    """Prompt and generated tokens come back in one chunk; two slots make resumed requests queue for them again."""
    names = ["lora_p_0", "reft_p_0", None, "lora_p_1", "lora_p_2", "lora_all"]
    with few_blocks(engine, 10) as preempted:
        for order in (names, names[::-1]):
            checker.check(
                engine, [Case(name, prompt(40 + i, i)) for i, name in enumerate(order)], max_tokens=40
            )
    assert set(PREFILL_ONLY) & set(preempted), f"no prefill-only request was preempted: {preempted}"


def test_a_cache_reset_while_requests_run(engine: VLLMGenerator, checker: Checker) -> None:
    """`reset_prefix_cache(reset_running_requests=True)` preempts all of them at once, output in flight dropped."""
    cases = every_kind(30, step=5)
    driver = Driver(engine)
    for i, case in enumerate(cases):
        driver.add(str(i), case)
    for _ in range(3):
        driver.steps(4)
        assert scheduler(engine).reset_prefix_cache(reset_running_requests=True)
    driver.run()
    for i, case in enumerate(cases):
        assert driver.tokens(str(i)) == checker.reference(case, 16), case.adapter


def test_several_samples_share_one_adapted_prompt(engine: VLLMGenerator, mild: Mild, model: Model) -> None:
    """n > 1: each of the samples, all different, has the reference's log-probabilities."""
    from vllm.sampling_params import RequestOutputKind

    driver = Driver(engine)
    for name, lora in mild.loras.items():
        settings = {"n": 3, "temperature": 1.0, "logprobs": 0}
        case = Case(None, prompt(45, 2))
        driver.add(name, case, 6, lora, **settings, output_kind=RequestOutputKind.FINAL_ONLY)
    driver.run()
    for name in mild.loras:
        samples = driver.outputs[name].outputs
        assert len({tuple(sample.token_ids) for sample in samples}) == 3
        for sample in samples:
            want = logprob_reference(
                model.hf, mild.adapters[name], list(prompt(45, 2)), list(sample.token_ids)
            )
            assert chosen(sample.token_ids, sample.logprobs) == pytest.approx(want.answer, abs=1e-5), name


def test_cancelled_requests_disturb_no_other(engine: VLLMGenerator, checker: Checker) -> None:
    """Cancelled while waiting for a slot, between chunks and while decoding; the rest are answered as before."""
    cases = {str(i): case for i, case in enumerate(every_kind(30, step=5) + every_kind(44, step=3))}
    driver = Driver(engine)
    for name, case in cases.items():
        driver.add(name, case)
    for name in list(cases)[::3]:
        driver.step()
        driver.abort(name)
        del cases[name]
    driver.run()
    for name, case in cases.items():
        assert driver.tokens(name) == checker.reference(case, 16), case.adapter


def test_adapters_swapped_while_others_decode(
    engine: VLLMGenerator, checker: Checker, model: Model, adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    """Weights change under one name and id in mid-run: who decodes goes on, who comes next gets the new ones."""
    from vllm.lora.request import LoRARequest

    folder = tmp_path / "swapped"
    versions = {"old": adapters["lora_p_0"], "new": stir(Adapter.create(model.hf, CONFIGS["lora_p_0"]), 77)}
    checks = Checker(model, versions)
    save_adapter(versions["old"], folder)
    driver, number = Driver(engine), 90
    decoding = {f"d{i}": Case("old", prompt(33 + i, i)) for i in range(3)}
    for name, case in decoding.items():
        driver.add(name, case, lora=LoRARequest("swapped", number, str(folder)))
    driver.until_decoding(list(decoding))
    shutil.rmtree(folder)
    save_adapter(versions["new"], folder)
    driver.engine.add_lora(LoRARequest("swapped", number, str(folder), load_inplace=True))
    later = {f"n{i}": Case("new", prompt(33 + i, i)) for i in range(3)}
    for name, case in later.items():
        driver.add(name, case, lora=LoRARequest("swapped", number, str(folder)))
    driver.run()
    for name, case in (decoding | later).items():
        assert driver.tokens(name) == checks.reference(case, 16), name
    assert checks.reference(decoding["d0"], 16) != checks.reference(later["n0"], 16)
    assert driver.engine.remove_lora(number)


def test_adapters_swapped_while_others_are_read(
    engine: VLLMGenerator,
    model: Model,
    adapters: dict[str, Adapter],
    tmp_path: Path,
) -> None:
    """No prompt is read by two versions: what is not read to its end begins anew; nor are old blocks taken for new."""
    from vllm.lora.request import LoRARequest

    folder, number, driver = tmp_path / "versions", 92, Driver(engine)
    versions = [adapters["reft_p_0"], stir(Adapter.create(model.hf, CONFIGS["reft_p_0"]), 78)]
    checks = Checker(model, {str(i): version for i, version in enumerate(versions)})

    def load(version: int, load_inplace: bool) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        save_adapter(versions[version], folder)
        driver.engine.add_lora(LoRARequest("versions", number, str(folder), load_inplace=load_inplace))

    load(0, load_inplace=False)
    for turn, version in enumerate([1, 0, 1]):
        cases = {f"{i} of turn {turn}": Case(None, prompt(80, 2 * turn + i)) for i in range(2)}
        for name, case in cases.items():
            driver.add(name, case, 8, lora=LoRARequest("versions", number, str(folder)))
        with chunks_of(engine, 35):
            driver.steps(2)
        assert all(0 < request.num_computed_tokens < 80 for request in scheduler(engine).running)
        load(version, load_inplace=True)
        driver.run()
        for name, case in cases.items():
            assert driver.tokens(name) == checks.reference(case._replace(adapter=str(version)), 8)
    assert driver.engine.remove_lora(number)


def test_new_weights_are_loaded_on_purpose_or_not_at_all(
    engine: VLLMGenerator, checker: Checker, folders: dict[str, Path], tmp_path: Path
) -> None:
    """What acts on other tokens needs another id even once the first is removed: requests may still run under it."""
    from vllm.lora.request import LoRARequest

    folder, driver = tmp_path / "changed", Driver(engine)
    shutil.copytree(folders["lora_p_0"], folder)
    driver.add("first", Case(None, prompt(20)), 1, lora=LoRARequest("changed", 93, str(folder)))
    driver.run()
    shutil.rmtree(folder)
    shutil.copytree(folders["lora_all"], folder)
    with pytest.raises(ValueError, match="changed after they were loaded"):
        driver.add("second", Case(None, prompt(20)), 1, lora=LoRARequest("changed", 93, str(folder)))
    with pytest.raises(ValueError, match=r"was loaded with phase 'prefill'.*load it under another id"):
        driver.engine.add_lora(LoRARequest("changed", 93, str(folder), load_inplace=True))
    assert driver.engine.remove_lora(93)
    with pytest.raises(ValueError, match=r"with phase 'prefill'.*load it under another id"):
        driver.add("third", Case(None, prompt(20)), 1, lora=LoRARequest("changed", 93, str(folder)))
    with pytest.raises(ValueError, match="load it under another id"):
        driver.engine.add_lora(LoRARequest("changed", 93, str(folder)))
    case = Case("lora_all", prompt(20))
    driver.add("other id", case, lora=LoRARequest("changed", 95, str(folder)))
    driver.run()
    assert driver.tokens("other id") == checker.reference(case, 16)


def test_a_folder_without_adapter_is_refused_and_the_engine_lives_on(
    engine: VLLMGenerator, checker: Checker, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        Driver(engine).add("bad", Case(None, prompt(20)), lora=LoRARequest("nothing", 94, str(tmp_path)))
    checker.check(engine, [Case("lora_p_0", prompt(20))])


def test_an_adapter_removed_while_its_requests_decode(
    engine: VLLMGenerator, checker: Checker, folders: dict[str, Path], tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    folder = tmp_path / "gone"
    shutil.copytree(folders["lora_p_0"], folder)
    driver, case = Driver(engine), Case("lora_p_0", prompt(50, 1))
    driver.add("decoding", case, lora=LoRARequest("gone", 91, str(folder)))
    driver.until_decoding(["decoding"])
    assert driver.engine.remove_lora(91)
    shutil.rmtree(folder)
    driver.run()
    assert driver.tokens("decoding") == checker.reference(case, 16)


def test_more_adapters_than_slots_decode_together(engine: VLLMGenerator, checker: Checker) -> None:
    cases = {name: Case(name, prompt(25 + i, i)) for i, name in enumerate(PREFILL_ONLY)}
    driver, together = Driver(engine), 0
    for name, case in cases.items():
        driver.add(name, case, max_tokens=24)
    while driver.engine.has_unfinished_requests():
        driver.step()
        running = scheduler(engine).running
        if all(request.num_computed_tokens >= request.num_prompt_tokens for request in running):
            together = max(together, len({request._own_lora_request.lora_name for request in running}))
    assert together == len(PREFILL_ONLY) > SLOTS
    for name, case in cases.items():
        assert driver.tokens(name) == checker.reference(case, 24)


def test_all_token_adapters_wait_for_a_slot(engine: VLLMGenerator, checker: Checker) -> None:
    names = ["lora_all", "reft_all", "lora_decode", "lora_boundary", "lora_p_0"]
    checker.check(engine, [Case(name, prompt(25 + i, i)) for i, name in enumerate(names)])


def test_a_prompt_cached_but_for_one_token_waits_for_a_slot(engine: VLLMGenerator, checker: Checker) -> None:
    """With speculation vLLM pads its one token with drafts, whose adapter finds no slot: all of them wait, or none."""
    late = {
        name: Case(name, prompt(2 * BLOCK + 1, 9)) for name in ("lora_decode", "lora_boundary", "lora_p_0")
    }
    checker.check(engine, list(late.values()), max_tokens=4)
    holders = {name: Case(name, prompt(20, 1)) for name in ("lora_all", "reft_all")}
    driver = Driver(engine)
    for name, case in holders.items():
        driver.add(name, case, max_tokens=24)
    driver.until_decoding(list(holders))
    for name, case in late.items():
        driver.add(name, case, max_tokens=12)
    driver.run()
    for name, case in holders.items():
        assert driver.tokens(name) == checker.reference(case, 24)
    for name, case in late.items():
        assert driver.tokens(name) == checker.reference(case, 12)


@pytest.mark.parametrize("length", [1, 20, 50])
def test_log_probabilities(engine: VLLMGenerator, mild: Mild, model: Model, length: int) -> None:
    """Of the answer's tokens and of the prompt's, to 1e-5 of the reference's."""
    driver = Driver(engine)
    prompts = {name: prompt(length + 2 * i, i) for i, name in enumerate(mild.loras)}
    for name, lora in mild.loras.items():
        driver.add(name, Case(None, prompts[name]), 10, lora, logprobs=0, prompt_logprobs=0)
    driver.run()
    for name, text in prompts.items():
        output = driver.outputs[name]
        want = logprob_reference(model.hf, mild.adapters[name], list(text), driver.tokens(name))
        answer = chosen(driver.tokens(name), output.outputs[0].logprobs)
        assert answer == pytest.approx(want.answer, abs=1e-5), name
        assert chosen(text[1:], output.prompt_logprobs[1:]) == pytest.approx(want.prompt, abs=1e-5), name


def test_repetitive_prompts(engine: VLLMGenerator, checker: Checker) -> None:
    """Text that n-gram speculation drafts from: several tokens a step are accepted, and the answers are the same."""
    driver = Driver(engine)
    cases = {str(name): Case(name, prompt(1, i) * 30) for i, name in enumerate(KINDS)}
    for name, case in cases.items():
        driver.add(name, case, max_tokens=28)
    driver.run()
    for name, case in cases.items():
        assert driver.tokens(name) == checker.reference(case, 28), name
    speculates = engine.llm.llm_engine.vllm_config.speculative_config is not None
    assert (driver.longest_advance > 1) == speculates
