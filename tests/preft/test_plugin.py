"""The ground the plugin stands on: these fail, by name, when a vLLM release moves it."""

import importlib
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from preft.adapters import AdapterError
from preft.vllm import plugin, runner
from preft.vllm.identity import AdapterIdentity
from shared.tokens import Phase

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.usefixtures("plugin")]


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

    assert load_plugins_by_group(DEFAULT_PLUGINS_GROUP)["preft"] is plugin.register


def test_the_patched_functions_are_as_the_wrappers_expect() -> None:
    assert plugin.moved_ground() == []


def test_a_moved_signature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_input_batch import InputBatch

    def make_lora_inputs(self: Any, num_scheduled_tokens: Any) -> None:
        """Another release's."""

    monkeypatch.setattr(InputBatch, "make_lora_inputs", make_lora_inputs)
    [moved] = plugin.moved_ground()
    assert "InputBatch.make_lora_inputs(self, num_scheduled_tokens)" in moved


def test_a_missing_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    monkeypatch.delattr(WorkerLoRAManager, "_load_adapter")
    [moved] = plugin.moved_ground()
    assert "WorkerLoRAManager._load_adapter" in moved


def test_a_second_registration_changes_nothing() -> None:
    from vllm.v1.worker.gpu_input_batch import InputBatch

    before = InputBatch.make_lora_inputs
    plugin.register()
    assert InputBatch.make_lora_inputs is before
    assert not hasattr(before._innerworks_original, "_innerworks_original")


def test_every_importer_of_the_hash_keys_has_ours() -> None:
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.simple_kv_offload import manager

    ours = kv_cache_utils.generate_block_hash_extra_keys
    assert hasattr(ours, "_innerworks_original")
    assert block_pool.generate_block_hash_extra_keys is ours
    assert manager.generate_block_hash_extra_keys is ours


def test_calls_between_processes_are_decoded_as_before() -> None:
    """The engine process turns a plain list back into a LoRARequest by the annotations of the method it calls."""
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    add_lora = EngineCore.add_lora.__get__(object())  # bound, as the engine process looks it up
    [decoded] = EngineCoreProc._convert_msgspec_args(add_lora, (["name", 3, "/path"],))
    assert isinstance(decoded, LoRARequest)


@pytest.mark.parametrize("patch", plugin.PATCHES, ids=lambda patch: f"{patch.owner}.{patch.name}")
def test_wrappers_show_the_signature_of_the_original(patch: plugin.Patch) -> None:
    function = getattr(plugin._owner(patch), patch.name)
    assert inspect.signature(function) == inspect.signature(function._innerworks_original)


READ = {
    "v1.worker.gpu_input_batch:InputBatch": (
        "num_reqs request_lora_mapping lora_id_to_lora_request num_prompt_tokens num_computed_tokens_cpu"
    ),
    "v1.request:Request": (
        "lora_request num_computed_tokens num_prompt_tokens num_preemptions block_hashes update_block_hashes"
    ),
    "v1.core.sched.scheduler:Scheduler": (
        "running requests prev_step_scheduled_req_ids _free_request_blocks lora_config kv_cache_manager"
    ),
    "v1.engine.core:EngineCore": "scheduler",
    "v1.worker.gpu_model_runner:GPUModelRunner": "lora_config input_batch",
    "v1.worker.gpu.model_runner:GPUModelRunner": "lora_config lora_state req_states",
    "v1.worker.gpu.lora_utils:LoraState": "lora_ids lora_requests get_activate_loras make_lora_inputs",
    "v1.worker.gpu.states:RequestState": "prompt_len num_computed_tokens_np req_id_to_index",
    "lora.model_manager:LoRAModelManager": (
        "lora_index_to_id punica_wrapper_mapping supported_lora_modules model modules"
    ),
    "lora.worker_manager:WorkerLoRAManager": "_adapter_manager",
    "lora.request:LoRARequest": "lora_name lora_int_id lora_path load_inplace",
    "config.lora:LoRAConfig": "max_loras lora_dtype target_modules",
    "lora.punica_wrapper.punica_cpu:PunicaWrapperCPU": (
        "_token_lora_indices _sampler_indices _sampler_indices_padded _embeddings_indices indices_len no_lora "
        "is_prefill sampler_indices add_shrink add_expand add_lora_linear add_lora_embedding add_lora_logits"
    ),
    "model_executor.layers.linear:LinearBase": "output_size",
}


@pytest.mark.parametrize(("place", "names"), READ.items(), ids=READ)
def test_what_the_wrappers_read_is_there(place: str, names: str) -> None:
    """Attributes of vLLM's objects, set in their code (`self.name = ...`) or declared in their class."""
    module, _, owner = place.partition(":")
    cls = getattr(importlib.import_module(f"vllm.{module}"), owner)
    source = "".join(inspect.getsource(base) for base in cls.__mro__ if base.__module__.startswith("vllm"))
    assigned = set(re.findall(r"\bself\.(\w+)(?::[^=\n]+)?\s*=", source)) | set(
        re.findall(r"self\.(\w+): ", source)
    )
    declared = {name for base in cls.__mro__ for name in vars(base)} | set(
        getattr(cls, "__annotations__", {})
    )
    assert not set(names.split()) - assigned - declared


class TestAssumptions:
    """What the wrappers rely on inside functions they do not replace."""

    def test_the_step_is_mapped_before_the_graph_is_chosen(self) -> None:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        source = inspect.getsource(GPUModelRunner.execute_model)
        assert source.index("self._prepare_inputs(") < source.index(
            "self._determine_batch_execution_and_padding("
        )

    def test_the_worker_gets_the_adapter_before_the_counter_moves(self) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler

        source = inspect.getsource(Scheduler.schedule)
        assert source.index("NewRequestData.from_request") < source.index("self._update_after_schedule(")

    def test_the_sampling_parameters_are_there_when_the_adapter_is_set(self) -> None:
        """The spans of a sticky chat are among them."""
        from vllm.v1.request import Request

        source = inspect.getsource(Request.__init__)
        assert source.index("self.sampling_params = ") < source.index("self.lora_request = ")

    def test_every_chunk_is_measured_by_the_slots(self) -> None:
        """For running and for admitted requests the hook has the last word before blocks are allocated."""
        from vllm.v1.core.sched.scheduler import Scheduler

        source = inspect.getsource(Scheduler.schedule)
        loops = source.split("# Next, schedule the WAITING requests.")
        assert len(loops) == 2
        for loop in loops:
            assert loop.index("self._reserve_prefill_lookahead(") < loop.index("allocate_slots(")
            assert loop.count("self._reserve_prefill_lookahead(") == 1

    def test_preemption_resets_the_counter_that_decides(self) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler

        assert "request.num_computed_tokens = 0" in inspect.getsource(Scheduler._preempt_request)

    @pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
    def test_decoder_layers_return_hidden_and_residual(self, name: str) -> None:
        from preft.vllm.residual import PAIR_LAYERS

        module = importlib.import_module(f"vllm.model_executor.models.{name}")
        found = [
            value
            for key, value in vars(module).items()
            if key in PAIR_LAYERS and value.__module__ == module.__name__
        ]
        assert found
        for layer in found:
            source = inspect.getsource(layer.forward)
            assert "return hidden_states, residual" in source
            assert "hidden_states, residual)" in source  # a norm that adds the residual stream up

    def test_the_v2_runner_has_what_its_map_reads(self) -> None:
        from vllm.v1.worker.gpu import lora_utils, states

        source = inspect.getsource(states.RequestState.__init__)
        assert "self.prompt_len = " in source
        assert "self.num_computed_tokens_np = " in source
        assert "self.req_id_to_index" in source
        assert "get_activate_loras" in inspect.getsource(lora_utils.get_num_active_loras_for_dispatch)


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"alora_invocation_tokens": [5]},
        {"alora_invocation_tokens": []},
        {"layer_replication": [[0, 2]]},
        {"use_bdlora": {"nblocks": 2}},
        {"use_qalora": True},
        {"modules_to_save": ["embed_tokens"]},
        *(
            {"init_lora_weights": start}
            for start in (True, False, "gaussian", "Gaussian", "eva", "orthogonal")
        ),
        *({"init_lora_weights": start} for start in ("mica", "lora_ga", "pissa", "pissa_niter_4", "PiSSA")),
        *({"init_lora_weights": start} for start in ("olora", "corda", "loftq")),
    ],
    ids=str,
)
def test_what_vllm_refuses_is_refused_here(
    folders: dict[str, Path], tmp_path: Path, setting: dict[str, Any]
) -> None:
    from vllm.lora.peft_helper import PEFTHelper

    from preft.formats import read_adapter

    content = json.loads((folders["lora_all"] / "adapter_config.json").read_text()) | setting
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    if PEFTHelper.from_dict(content)._validate_features():
        with pytest.raises(AdapterError, match=next(iter(setting))):
            read_adapter(tmp_path)
    else:
        read_adapter(tmp_path)


def one_of_many_versions(number: int) -> Any:
    """All under one name, as while an adapter is being replaced: vLLM compares these by name."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("name", number, f"/{number}")


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapter ids 1 and 2 are prefill-only, 3 acts on all tokens, 4 on decode."""
    known = {1: Phase.PREFILL, 2: Phase.PREFILL, 3: Phase.ALL, 4: Phase.DECODE}
    identities = {(i, f"/{i}"): AdapterIdentity(phase, "lora", "d", ()) for i, phase in known.items()}
    monkeypatch.setattr(runner.worker_adapters, "_known", identities)


REQUESTS = [  # adapter, prompt, computed, scheduled
    (1, 10, 4, 3),  # inside the prompt
    (2, 5, 5, 1),  # decoding
    (0, 5, 0, 2),  # base
    (2, 3, 0, 5),  # recomputed after preemption: prompt, then generated tokens
    (3, 5, 9, 1),  # all tokens, decoding
    (4, 5, 3, 3),  # decode only, across the boundary
]
TOKENS = (1, 1, 1, 0, 0, 0, 2, 2, 2, 0, 0, 3, 0, 0, 4)
SAMPLED = (1, 0, 0, 0, 3, 4)


def columns() -> tuple[np.ndarray, ...]:
    return tuple(np.array(column, dtype=np.int32) for column in zip(*REQUESTS))


@pytest.mark.usefixtures("phases")
def test_runner_v1_maps_a_step() -> None:
    from vllm.v1.worker.gpu_input_batch import InputBatch

    adapter, prompt, computed, scheduled = columns()
    batch = SimpleNamespace(
        num_reqs=len(REQUESTS),
        request_lora_mapping=adapter,
        lora_id_to_lora_request={number: one_of_many_versions(number) for number in (1, 2, 3, 4)},
        num_prompt_tokens=prompt,
        num_computed_tokens_cpu=computed,
        req_ids=[str(i) for i in range(len(REQUESTS))],
        cached_requests={str(i): SimpleNamespace(lora_request=None) for i in range(len(REQUESTS))},
    )
    sampled, tokens, active = InputBatch.make_lora_inputs(batch, scheduled, np.ones_like(scheduled))
    assert tokens == TOKENS
    assert sampled == SAMPLED
    assert {lora.lora_int_id for lora in active} == {1, 2, 3, 4}
    assert batch.num_active_adapters == 5  # four adapters, and tokens without any


@pytest.mark.usefixtures("phases")
def test_runner_v2_maps_a_step_in_its_own_order() -> None:
    from vllm.v1.worker.gpu.lora_utils import LoraState, get_num_active_loras_for_dispatch

    order = [4, 0, 3, 1, 5, 2]  # where the persistent state keeps each request of the batch
    state = LoraState(max_num_reqs=8)
    prompt_len, computed_np = np.zeros(8, dtype=np.int32), np.zeros(8, dtype=np.int32)
    for place, (number, prompt, computed, _) in zip(order, REQUESTS):
        lora = one_of_many_versions(number) if number else None
        state.add_request(f"r{place}", place, lora)
        prompt_len[place], computed_np[place] = prompt, computed
    ids = [f"r{place}" for place in order]
    state.request_states = SimpleNamespace(
        prompt_len=SimpleNamespace(np=prompt_len),
        num_computed_tokens_np=computed_np,
        req_id_to_index=dict(zip(ids, order)),
    )
    scheduled = np.array([row[3] for row in REQUESTS], dtype=np.int32)
    sampled, tokens, active = state.make_lora_inputs(ids, np.array(order), scheduled)
    assert (sampled, tokens) == (SAMPLED, TOKENS)
    assert {lora.lora_int_id for lora in active} == {1, 2, 3, 4}
    decoding = [ids[1]]  # a prefill-only adapter on a decoding request: the base graph
    assert get_num_active_loras_for_dispatch(object(), state, decoding, False) == 0
    assert get_num_active_loras_for_dispatch(object(), state, ids, False) == 5  # and tokens without any


@pytest.mark.parametrize("specialised", [False, True])
@pytest.mark.usefixtures("phases")
def test_specialised_graphs_reach_the_last_slot(specialised: bool) -> None:
    """V2's own dispatch: a step of n adapters and plain tokens needs a graph for n + 1 ids, "no adapter" being one."""
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
    from vllm.v1.worker.gpu.lora_utils import (
        LoraState,
        get_lora_capture_cases,
        get_num_active_loras_for_dispatch,
    )

    lora_config = SimpleNamespace(max_loras=4, specialize_active_lora=specialised)
    manager: Any = object.__new__(CudaGraphManager)
    manager.lora_capture_cases = get_lora_capture_cases(
        lora_config, SimpleNamespace(cudagraph_specialize_lora=True)
    )
    manager._lora_dispatch_map, manager._max_lora_case = manager._build_lora_dispatch_map()
    manager._graphs_captured = False
    for active in range(5):
        state = LoraState(max_num_reqs=8)
        state.get_activate_loras = lambda req_ids, active=active: set(range(active))
        count = get_num_active_loras_for_dispatch(lora_config, state, [], False)
        graph = manager.dispatch(8, 8, None, count).num_active_loras
        assert graph in manager.lora_capture_cases
        assert graph == 0 if active == 0 else graph >= active + 1


def test_a_step_without_adapted_tokens_replays_the_base_graph() -> None:
    seen: list[dict[str, Any]] = []
    wrapped = runner.determine_batch_execution(lambda _, **kwargs: seen.append(kwargs))
    engine = SimpleNamespace(lora_config=SimpleNamespace(max_loras=4), input_batch=SimpleNamespace())
    for active in (0, 2, 9):
        engine.input_batch.num_active_adapters = active
        wrapped(engine, num_tokens=1)
    wrapped(engine, num_tokens=1, force_num_active_loras=3, force_has_lora=True)  # capture: left alone
    counts = [call["force_num_active_loras"] for call in seen]
    assert counts == [0, 2, 5, 3]
    assert [call["force_has_lora"] for call in seen] == [False, True, True, True]


def test_an_edit_is_refused_where_the_model_has_no_site(folders: dict[str, Any]) -> None:
    from vllm.lora.request import LoRARequest

    load = runner.load_adapter(lambda manager, request: "loaded")
    manager = SimpleNamespace(
        _adapter_manager=SimpleNamespace(supported_lora_modules=["q_proj"], model=object())
    )
    assert load(manager, LoRARequest("a", 50, str(folders["lora_p_0"]))) == "loaded"
    with pytest.raises(ValueError, match="edits the residual stream"):
        load(manager, LoRARequest("b", 51, str(folders["reft_p_0"])))
