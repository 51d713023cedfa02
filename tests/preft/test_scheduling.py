"""Adapter need and block identity of a request, on vLLM's own Request and block hasher, without an engine."""

import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preft.adapters import Adapter, AdapterConfig
from preft.formats import save_adapter
from preft.vllm import renewal, scheduling
from preft.vllm.identity import AdapterIdentity, AdapterRegistry, content_digest, read_identity
from preft.vllm.mapping import KINDS, Kind
from preft.vllm.scheduling import adapter_registry, block_keys
from preft.vllm.sticky import KEY
from shared.history import History
from shared.models import Model
from shared.tokens import Phase

pytestmark = pytest.mark.xdist_group(__name__)
BLOCK = 8


def digest(value: Any) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()


@pytest.fixture(scope="module", autouse=True)
def first_parent(plugin: None) -> None:
    """Every chain of hashes starts from one value that vLLM draws at random when its engine starts."""
    from vllm.v1.core.kv_cache_utils import init_none_hash

    init_none_hash(digest)


def make_request(
    lora: Any, prompt: int, total: int | None = None, first: int = 0, generated: list[int] | None = None
) -> Any:
    """A vLLM request with `prompt` prompt tokens, then generated ones up to `total`."""
    from vllm import SamplingParams
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    request = Request(
        request_id="r",
        prompt_token_ids=list(range(first, first + prompt)),
        sampling_params=SamplingParams(max_tokens=100, extra_args=generated and {KEY: generated}),
        pooling_params=None,
        lora_request=lora,
        block_hasher=get_request_block_hasher(BLOCK, digest),
    )
    for token in range(first + prompt, first + (total or prompt)):
        request.append_output_token_ids(token)
    return request


def lora_request(folders: dict[str, Path], name: str, number: int = 1) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(folders[name]))


class TestNeed:
    def test_a_prefill_adapter_is_needed_until_the_prompt_is_computed(self, folders: dict[str, Path]) -> None:
        lora = lora_request(folders, "lora_p_0")
        request = make_request(lora, prompt=20)
        for computed, needed in [(0, True), (19, True), (20, False), (30, False), (0, True)]:
            request.num_computed_tokens = computed  # 0 at the end: preemption
            assert (request.lora_request is lora) == needed

    @pytest.mark.parametrize(("name", "first"), [("lora_all", 0), ("lora_decode", 20), ("lora_boundary", 19)])
    def test_other_phases_need_theirs_from_their_first_token_on(
        self, folders: dict[str, Path], name: str, first: int
    ) -> None:
        request = make_request(lora_request(folders, name), prompt=20)
        for computed in (0, 18, 19, 20, 25):
            request.num_computed_tokens = computed
            assert (request.lora_request is not None) == (computed >= first)

    @pytest.mark.parametrize("phase", list(Phase))
    def test_a_sticky_adapter_is_needed_where_it_acts(
        self, model: Model, tmp_path: Path, phase: Phase
    ) -> None:
        from vllm.lora.request import LoRARequest

        history = History.RECOMPUTE if phase is Phase.ALL else History.STICKY
        adapter = Adapter.create(model.hf, AdapterConfig(rank=2, phase=phase, history=history))
        lora = LoRARequest("sticky", 60, str(save_adapter(adapter, tmp_path / "sticky")))
        request = make_request(lora, prompt=20, total=24, generated=[5, 9])
        kinds = [Kind.PROMPT] * 4 + [Kind.BOUNDARY] + [Kind.GENERATED] * 4
        kinds += [Kind.PROMPT] * 10 + [Kind.BOUNDARY] + [Kind.GENERATED] * 4
        for position, kind in enumerate(kinds):
            request.num_computed_tokens = position
            assert (request.lora_request is lora) == KINDS[phase][kind]
            fits = scheduling.fit_slots(request, position, 1, {7, 8}, slots=2)
            assert fits == (0 if KINDS[phase][kind] else 1)

    def test_a_request_without_adapter_has_none(self) -> None:
        assert make_request(None, prompt=20).lora_request is None


class TestSlots:
    """A chunk ends before the first token whose adapter finds no slot."""

    @pytest.mark.parametrize(
        ("name", "used", "fits"),
        [
            ("lora_p_0", set(), 30),
            ("lora_p_0", {7}, 30),
            ("lora_p_0", {7, 8}, 0),
            ("lora_p_0", {7, 1}, 30),  # its own slot
            ("lora_decode", {7, 8}, 20),
            ("lora_boundary", {7, 8}, 19),
            ("lora_all", {7, 8}, 0),
        ],
    )
    def test_fit(self, folders: dict[str, Path], name: str, used: set[int], fits: int) -> None:
        request = make_request(lora_request(folders, name), prompt=20, total=30)
        before = set(used)
        assert scheduling.fit_slots(request, 0, 30, used, slots=2) == fits
        assert used == (before | {1} if fits == 30 else before)

    def test_a_decoding_request_of_a_prefill_adapter_takes_none(self, folders: dict[str, Path]) -> None:
        request = make_request(lora_request(folders, "lora_p_0"), prompt=20, total=30)
        used = {7, 8}
        assert scheduling.fit_slots(request, 20, 10, used, slots=2) == 10
        assert used == {7, 8}

    def test_the_set_is_a_steps(self, folders: dict[str, Path]) -> None:
        hook = scheduling.within_slots(lambda scheduler, request, computed, count: count)
        scheduler = SimpleNamespace(current_step=1, lora_config=SimpleNamespace(max_loras=1))
        first = make_request(lora_request(folders, "lora_all", 1), prompt=20)
        second = make_request(lora_request(folders, "lora_boundary", 2), prompt=20)
        base = make_request(None, prompt=20)
        assert [hook(scheduler, request, 0, 20) for request in (first, second, base)] == [20, 19, 20]
        scheduler.current_step = 2
        assert [hook(scheduler, request, 0, 20) for request in (second, first)] == [20, 0]


class TestBlockHashes:
    """Digest section 3c, items 3 to 5: what must share a key and what must not."""

    def hashes(self, lora: Any, prompt: int, total: int | None = None) -> list[bytes]:
        return make_request(lora, prompt, total).block_hashes

    def test_base_requests_keep_vllms_keys(self) -> None:
        from vllm.v1.core import kv_cache_utils

        stock = kv_cache_utils.generate_block_hash_extra_keys._innerworks_original
        request = make_request(None, 20)
        assert kv_cache_utils.generate_block_hash_extra_keys(request, 0, 8, 0) == stock(request, 0, 8, 0)

    def test_a_prompt_shorter_than_a_block_is_no_base_block(self, folders: dict[str, Path]) -> None:
        adapted = self.hashes(lora_request(folders, "lora_p_0"), 5, 16)
        other = self.hashes(lora_request(folders, "lora_p_1", 2), 5, 16)
        base = self.hashes(None, 16)
        assert len({adapted[0], other[0], base[0]}) == 3

    def test_where_the_boundary_lies_in_a_block_matters(self, folders: dict[str, Path]) -> None:
        lora = lora_request(folders, "lora_p_0")
        variants = [self.hashes(lora, n, 16) for n in range(9, 17)]
        assert len({hashes[0] for hashes in variants}) == 1  # block 0 is adapted in all
        assert len({hashes[1] for hashes in variants}) == len(variants)

    def test_generated_blocks_are_not_prompt_blocks_of_the_next_turn(self, folders: dict[str, Path]) -> None:
        lora = lora_request(folders, "lora_p_0")
        first, second = self.hashes(lora, 16, 32), self.hashes(lora, 32)
        assert first[:2] == second[:2]
        assert not set(first[2:]) & set(second[2:])

    def test_repeats_share_and_the_time_of_hashing_does_not_matter(self, folders: dict[str, Path]) -> None:
        lora = lora_request(folders, "lora_p_0")
        late = make_request(lora, 12)
        late.num_computed_tokens = 12  # the adapter is dropped before the block fills
        for token in range(12, 16):
            late.append_output_token_ids(token)
        assert late.block_hashes == self.hashes(lora, 12, 16)

    def test_a_decode_adapter_shares_the_prompt_with_the_base_model(self, folders: dict[str, Path]) -> None:
        adapted, base = self.hashes(lora_request(folders, "lora_decode"), 16, 32), self.hashes(None, 32)
        assert adapted[:2] == base[:2]
        assert not set(adapted[2:]) & set(base[2:])
        boundary = self.hashes(lora_request(folders, "lora_boundary"), 16, 32)
        assert boundary[0] == base[0]
        assert boundary[1] != base[1]

    def test_an_all_token_adapter_keys_every_block(self, folders: dict[str, Path]) -> None:
        lora = lora_request(folders, "lora_all")
        assert self.hashes(lora, 16, 32) == self.hashes(lora, 32)
        assert not set(self.hashes(lora, 32)) & set(self.hashes(None, 32))

    def test_one_name_and_path_with_other_weights_is_another_adapter(
        self, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        from vllm.lora.request import LoRARequest

        path = tmp_path / "adapter"
        shutil.copytree(folders["lora_p_0"], path)
        before = self.hashes(LoRARequest("a", 77, str(path)), 16)
        shutil.rmtree(path)
        shutil.copytree(folders["lora_p_1"], path)
        with pytest.raises(ValueError, match="changed after they were loaded"):
            self.hashes(LoRARequest("a", 77, str(path)), 16)
        after = self.hashes(LoRARequest("a", 77, str(path), load_inplace=True), 16)
        assert not set(before) & set(after)
        assert after == self.hashes(LoRARequest("a", 77, str(path)), 16)

    def test_a_reload_from_another_folder_waits_for_those_that_name_the_old_one(
        self, folders: dict[str, Path]
    ) -> None:
        """Else they would be computed anew with other weights, under the keys of the old ones."""
        from vllm.lora.request import LoRARequest

        request = make_request(LoRARequest("a", 78, str(folders["lora_p_0"])), 16)
        core = SimpleNamespace(scheduler=SimpleNamespace(requests={"r": request}, running=[]))
        loaded: list[Any] = []
        add_lora = renewal.reloading(lambda core, lora_request: not loaded.append(lora_request))
        other = LoRARequest("a", 78, str(folders["lora_p_1"]), load_inplace=True)
        with pytest.raises(
            ValueError, match="requests run under id 78 from .*lora_p_0: load .*lora_p_1 under"
        ):
            add_lora(core, other)
        assert not loaded
        core.scheduler.requests.clear()
        assert add_lora(core, other)
        assert adapter_registry.resolve(other).digest == content_digest(folders["lora_p_1"])


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 16, 20])
def test_keys_say_which_positions_of_the_block_are_adapted(phase: Phase, prompt: int) -> None:
    identity = AdapterIdentity(phase, "lora", "d1", ())
    for start in range(0, 32, BLOCK):
        acts = {
            Phase.ALL: lambda t: True,
            Phase.PREFILL: lambda t: t < prompt,
            Phase.DECODE: lambda t: t >= prompt,
            Phase.DECODE_BOUNDARY: lambda t: t >= prompt - 1,
        }[phase]
        covered = [t - start for t in range(start, start + BLOCK) if acts(t)]
        keys = block_keys("a", identity, prompt, start, start + BLOCK)
        if not covered:
            assert keys == ()
        elif len(covered) == BLOCK:
            assert keys == (("lora", "a", "d1"),)
        else:
            assert keys == (("lora", "a", "d1", covered[0], covered[-1] + 1),)


@pytest.mark.parametrize("phase", list(Phase))
def test_keys_of_a_sticky_chat_are_those_of_its_turns(phase: Phase) -> None:
    """A block that lies in one turn has the key it had when that turn was computed."""
    identity = AdapterIdentity(phase, "lora", "d1", ())
    first, second = 11, 30  # prompt lengths of the two turns; the answer is at [11, 25)
    for start in range(0, 24, BLOCK):
        once = block_keys("a", identity, first, start, start + BLOCK)
        again = block_keys("a", identity, second, start, start + BLOCK, ((first, 25),))
        assert once == again
    later = block_keys("a", identity, second, 24, 32, ((first, 25),))
    acts = [
        KINDS[phase][kind]
        for kind in [Kind.GENERATED, *[Kind.PROMPT] * 4, Kind.BOUNDARY, *[Kind.GENERATED] * 2]
    ]
    found = [False] * BLOCK
    for key in later:
        low, high = key[3:] or (0, BLOCK)
        found[low:high] = [True] * (high - low)
    assert found == acts


class TestIdentity:
    def test_a_plain_peft_adapter_acts_on_all_tokens(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text('{"r": 8}')
        assert read_identity(tmp_path).phase is Phase.ALL

    def test_an_unknown_phase_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text('{"preft": {"phase": "sometimes"}}')
        with pytest.raises(ValueError, match="phase 'sometimes' is not one of prefill, decode"):
            read_identity(tmp_path)

    def test_the_history_is_read(self, model: Model, tmp_path: Path) -> None:
        adapter = Adapter.create(model.hf, AdapterConfig(history=History.STICKY))
        assert read_identity(save_adapter(adapter, tmp_path / "sticky")).history is History.STICKY
        adapter = Adapter.create(model.hf, AdapterConfig())
        assert read_identity(save_adapter(adapter, tmp_path / "plain")).history is History.RECOMPUTE

    def test_an_unknown_history_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text('{"preft": {"history": "often"}}')
        with pytest.raises(ValueError, match="history 'often' is not one of recompute, sticky"):
            read_identity(tmp_path)

    def test_the_digest_is_of_the_content(self, folders: dict[str, Path], tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(folders["lora_p_0"], copy)
        first = read_identity(copy)
        assert first.digest == read_identity(folders["lora_p_0"]).digest
        os.utime(copy / "adapter_model.safetensors", (1, 1))
        assert read_identity(copy).digest == first.digest
        assert read_identity(folders["lora_p_1"]).digest != first.digest

    def test_a_forgotten_id_is_read_anew(self, folders: dict[str, Path]) -> None:
        registry = AdapterRegistry()
        lora = lora_request(folders, "lora_p_0", 5)
        known = registry.resolve(lora)
        assert registry.resolve(lora) is known
        registry.forget(5)
        assert registry.resolve(lora) is not known

    @pytest.mark.parametrize("load_inplace", [False, True])
    def test_a_forgotten_id_comes_back_to_the_same_tokens_only(
        self, folders: dict[str, Path], tmp_path: Path, load_inplace: bool
    ) -> None:
        """The workers still map requests by what the id was."""
        from vllm.lora.request import LoRARequest

        folder, registry = tmp_path / "changed", AdapterRegistry()

        def put(name: str) -> Any:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(folders[name], folder)
            return LoRARequest("changed", 5, str(folder), load_inplace=load_inplace)

        registry.resolve(put("lora_p_0"))
        registry.forget(5)
        assert registry.resolve(put("lora_p_1")).digest == read_identity(folders["lora_p_1"]).digest
        registry.forget(5)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"with phase 'prefill'.*phase 'all'.*under another id"):
                registry.resolve(put("lora_all"))
            with pytest.raises(ValueError, match="load it under another id"):
                registry.check_reload(put("lora_all"))
        assert registry.resolve(put("lora_p_0")).phase is Phase.PREFILL
