"""Faults of earlier implementations of prefill-only adapters, and traps of vLLM, each with the test that owns it.

The numbers are those of the digest of the paper, section 5 (1 to 11) and sections 3 and 4 (the traps, 12). A row names
a test here or elsewhere (file and function, without "test_"); `test_every_fault_has_its_test` checks that it is there.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from preft_cases import Case, Checker, prompt, stir
from preft_engine import Driver, scheduler

from preft.adapters import Adapter, AdapterConfig
from preft.formats import save_adapter
from preft.vllm.identity import AdapterIdentity, AdapterRegistry
from preft.vllm.metrics import WorkerCounts
from shared.generation.vllm_engine import VLLMGenerator
from shared.models import Model, ModelConfig
from shared.tokens import Phase

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.slow]
HERE = Path(__file__).parent
FAULTS = {
    "1 preemption adapts recomputed generated tokens": (
        "matrix",
        "preempted_requests_are_recomputed_as_they_were_computed",
    ),
    "2 a one-token chunk of the prompt passes for decoding": ("matrix", "prompts_computed_in_chunks"),
    "2 idem, one token left by the cache": ("matrix", "a_prompt_cached_but_for_one_token"),
    "2 idem, prompts of one token": ("matrix", "prompts_of_one_token"),
    "3 verifying drafts passes for prefill": ("matrix", "repetitive_prompts"),
    "4 generated blocks pass for adapted ones": ("matrix", "the_second_turn_does_not_depend_on_the_cache"),
    "4 idem, a prompt shorter than a block": ("matrix", "a_short_prompt_leaves_no_false_block"),
    "4 idem, the boundary inside a block": ("scheduling", "where_the_boundary_lies_in_a_block_matters"),
    "4 idem, two adapters and one text": ("matrix", "adapters_do_not_share_blocks_of_one_text"),
    "5 a slot is held while decoding": ("matrix", "more_adapters_than_slots_decode_together"),
    "6 decoding launches adapter kernels": ("faults", "6_decoding_runs_the_operators_of_the_base_model"),
    "6 idem, on the graph of the base model": (
        "plugin",
        "a_step_without_adapted_tokens_replays_the_base_graph",
    ),
    "7 memory for each adapter, layer and position": ("many_adapters", "512_adapters_in_8_slots"),
    "8 the step loops over its tokens": ("faults", "8_the_map_of_a_step_does_not_loop_over_tokens"),
    "9 loading ignores missing and unknown tensors": ("formats", "tensors_that_do_not_fit_are_named"),
    "10 an edit acts on all tokens": ("faults", "10_the_first_token_tells_the_phases_apart"),
    "11 no route to the server": ("server", "adapters_are_models_and_their_phase_is_kept"),
    "12 index -1 leaks the last slot": (
        "kernels",
        "stock_operators_still_have_the_faults_that_made_these_necessary",
    ),
    "12 more segments than requests": (
        "kernels",
        "a_resumed_request_gives_two_segments_in_an_engine_for_one",
    ),
    "12 the grid of a specialised graph (V1)": ("plugin", "runner_v1_maps_a_step"),
    "12 the grid of a specialised graph (V2)": ("plugin", "specialised_graphs_reach_the_last_slot"),
    "12 output in flight at a preemption": ("matrix", "a_cache_reset_while_requests_run"),
    "12 a failed load of the cache rolls back": ("faults", "12_a_failed_load_of_blocks_is_computed_again"),
    "12 streaming input moves the boundary": ("async_engine", "streaming_input_reads_its_history_as_prompt"),
    "12 weights change while a request is read": ("matrix", "adapters_swapped_while_others_are_read"),
}


@pytest.mark.parametrize(("file", "name"), FAULTS.values(), ids=FAULTS)
def test_every_fault_has_its_test(file: str, name: str) -> None:
    """It is there, it runs wherever the suite does, and it can fail."""
    tree = ast.parse((HERE / f"test_{file}.py").read_text())
    [test] = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS) and node.name == f"test_{name}"]
    assert not [mark for mark in test.decorator_list if "skip" in ast.unparse(mark)]
    assert not {"skip", "importorskip"} & {
        node.attr for node in ast.walk(test) if isinstance(node, ast.Attribute)
    }
    body = "".join(ast.unparse(statement) for statement in test.body)
    assert any(check in body for check in ("assert ", ".check(", "pytest.raises("))


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
VARIANTS = {
    "lora": AdapterConfig(rank=4),
    "lora of one module": AdapterConfig(rank=4, target_modules=("down_proj",)),
    "lora of one layer": AdapterConfig(rank=4, layers=(1,)),
    "direft": AdapterConfig("direft", rank=4),
    "loreft": AdapterConfig("loreft", rank=4),
    "direft of one layer": AdapterConfig("direft", rank=4, layers=(1,)),
}


@pytest.fixture(scope="module")
def variants(model: Model) -> dict[str, Adapter]:
    from dataclasses import replace

    return {
        f"{name}, {phase}": stir(Adapter.create(model.hf, replace(config, phase=phase), seed=3), seed=4)
        for name, config in VARIANTS.items()
        for phase in Phase
    }


@pytest.fixture(scope="module")
def engine(
    model_folder: Path, variants: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VLLMGenerator]:
    root = tmp_path_factory.mktemp("variants")
    folders = {name: save_adapter(adapter, root / name) for name, adapter in variants.items()}
    settings: dict[str, Any] = {"max_num_seqs": 32, "max_num_batched_tokens": 256, "max_model_len": 128}
    settings |= {"max_loras": 2, "max_cpu_loras": 32, "block_size": 32}
    with VLLMGenerator(ModelConfig(str(model_folder)), adapters=folders, **settings) as generator:
        yield generator


@pytest.mark.parametrize("name", VARIANTS)
def test_10_the_first_token_tells_the_phases_apart(
    engine: VLLMGenerator, variants: dict[str, Adapter], model: Model, name: str
) -> None:
    """A decode adapter leaves the first generated token as the base model has it; all others change it."""
    checker, driver = Checker(model, variants), Driver(engine)
    cases = {phase: Case(f"{name}, {phase}", prompt(24, 6)) for phase in Phase}
    driver.add("base", Case(None, prompt(24, 6)), max_tokens=12, logprobs=0)
    for phase, case in cases.items():
        driver.add(phase, case, max_tokens=12, logprobs=0)
    driver.run()

    def first(request: str) -> float:
        output = driver.outputs[request].outputs[0]
        return output.logprobs[0][output.token_ids[0]].logprob

    assert first(Phase.DECODE) == pytest.approx(first("base"), abs=1e-6)
    for phase in (Phase.PREFILL, Phase.DECODE_BOUNDARY, Phase.ALL):
        assert abs(first(phase) - first("base")) > 1e-4
    for phase, case in cases.items():
        assert driver.tokens(phase) == checker.reference(case, 12), phase


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts every operator that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_6_decoding_runs_the_operators_of_the_base_model(engine: VLLMGenerator) -> None:
    """Not one operator more, whatever adapters the decoding requests were read under."""

    def decode(names: list[str | None]) -> Counter[str]:
        driver = Driver(engine)
        for i, name in enumerate(names):
            driver.add(str(i), Case(name, prompt(24, 6 + i)), max_tokens=6)
        driver.until_decoding([str(i) for i in range(len(names))])
        with Operators() as operators:
            driver.step()
        driver.run()
        return operators.counts

    base = decode([None, None, None])
    adapted = decode(["lora, prefill", "direft, prefill", "loreft, prefill"])
    assert base == adapted
    assert decode(["lora, all", "direft, all", None]) != base


def test_8_the_map_of_a_step_does_not_loop_over_tokens(plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the runner's arrays to the operators' segments: as many bytecodes for 8192 tokens as for 128."""
    from vllm.lora.request import LoRARequest

    from preft.vllm import runner
    from preft.vllm.kernels import segmented_wrapper

    requests, slots = 64, list(range(1, 65))
    registry = AdapterRegistry()
    registry._known = {(i, f"/{i}"): AdapterIdentity(Phase.PREFILL, "lora", "d", ()) for i in slots}
    monkeypatch.setattr(runner, "worker_adapters", registry)
    monkeypatch.setattr(runner, "worker_counts", WorkerCounts())
    wrapper = segmented_wrapper()(8192, requests, "cpu")
    make_inputs = runner.make_lora_inputs_v1(lambda *_: ((), (), []))
    one_R = np.ones(requests, dtype=np.int64)
    batch = SimpleNamespace(
        num_reqs=requests,
        request_lora_mapping=np.array(slots),
        lora_id_to_lora_request={i: LoRARequest(str(i), i, f"/{i}") for i in slots},
        num_prompt_tokens=one_R * 500,
        num_computed_tokens_cpu=one_R * 100,
        req_ids=[str(i) for i in slots],
        cached_requests={str(i): SimpleNamespace(lora_request=None) for i in slots},
    )

    def bytecodes(scheduled: int) -> int:
        executed = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal executed
            frame.f_trace_opcodes = True
            executed += event == "opcode"
            return trace

        sys.settrace(trace)
        try:
            sampled, tokens, _ = make_inputs(batch, one_R * scheduled, one_R)
            mapping = SimpleNamespace(index_mapping=tokens, prompt_mapping=sampled)
            wrapper.update_metadata(mapping, slots, len(slots), 1000)
        finally:
            sys.settrace(None)
        assert len(wrapper.token_runs) == requests
        assert wrapper.token_runs[-1].end == requests * scheduled
        return executed

    bytecodes(2)  # what is looked up once
    assert bytecodes(128) == bytecodes(2) > 1000


def test_12_a_failed_load_of_blocks_is_computed_again(
    engine: VLLMGenerator, variants: dict[str, Adapter], model: Model
) -> None:
    """A decoding request loses a block of its prompt: the adapter comes back for the prompt tokens after it."""
    checker, driver, owner = Checker(model, variants), Driver(engine), scheduler(engine)
    cases = {name: Case(name, prompt(70, 9)) for name in ("lora, prefill", "direft, prefill")}
    for name, case in cases.items():
        driver.add(name, case)
    driver.until_decoding(list(cases))
    for request in owner.running:
        (blocks,) = owner.kv_cache_manager.get_block_ids(request.request_id)
        owner._update_requests_with_invalid_blocks([request], {blocks[1]}, {})
        assert request.num_computed_tokens == 32
        assert request.lora_request is not None
    driver.run()
    for name, case in cases.items():
        assert driver.tokens(name) == checker.reference(case, 16)
