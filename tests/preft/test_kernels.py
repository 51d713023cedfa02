"""The CPU operators against a loop over tokens, and their index tensors against vLLM's own."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from preft.vllm.cpu_layers import lay_out
from preft.vllm.kernels import (
    PLAIN,
    expand_,
    segmented_wrapper,
    segments,
    shrink_,
    slot_products,
    slots_of,
)

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.usefixtures("plugin")]
SLOTS, RANK, WIDTH, OUT = 3, 4, 6, 5
slot_maps = st.lists(st.integers(PLAIN, SLOTS - 1), min_size=1, max_size=14)


def stacked(seed: int, *shape: int) -> Tensor:
    return torch.randn(SLOTS, 1, *shape, generator=torch.Generator().manual_seed(seed))


def by_token(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, slots: list[int]) -> Tensor:
    """The update one token at a time; plain tokens get nothing."""
    y = y.clone()
    for t, slot in enumerate(slots):
        if slot != PLAIN:
            y[t] += b[slot, 0] @ (a[slot, 0] @ x[t]) * scale
    return y


@given(slot_maps)
@settings(deadline=None)
def test_segments_cover_the_adapted_rows_once_and_in_order(slots: list[int]) -> None:
    covered = [(t, run.slot) for run in segments(np.array(slots)) for t in range(run.start, run.end)]
    assert covered == [(t, slot) for t, slot in enumerate(slots) if slot != PLAIN]


@given(slot_maps, st.floats(0.1, 2.0))
@settings(max_examples=40, deadline=None)
def test_shrink_and_expand_equal_a_loop_over_tokens(slots: list[int], scale: float) -> None:
    x, y = torch.randn(len(slots), WIDTH), torch.randn(len(slots), OUT)
    a, b = stacked(1, RANK, WIDTH), stacked(2, OUT, RANK)
    found, low = y.clone(), torch.empty(len(slots), RANK)
    runs = segments(np.array(slots))
    shrink_(low, x, a, scale, runs)
    expand_(found, low, b, 0, runs, add=True)
    torch.testing.assert_close(found, by_token(y, x, a, b, scale, slots), rtol=1e-5, atol=1e-5)
    plain = [t for t, slot in enumerate(slots) if slot == PLAIN]
    assert torch.equal(found[plain], y[plain])


class Slices(nn.Module):
    """What a wrapped linear layer of two slices holds; slot 0 has full rank, slot 1 half in slice 0 only."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = (OUT, 2)
        self.lora_a_stacked: Any = tuple(stacked(i, RANK, WIDTH) for i in (1, 2))
        self.lora_b_stacked: Any = (stacked(3, OUT, RANK), stacked(4, 2, RANK))
        self.lora_a_stacked[0][1, :, RANK // 2 :] = 0
        self.lora_a_stacked[1][1] = 0

    def laid_out(self) -> "Slices":
        """The same values in the layout of the CPU operators."""
        before = (*self.lora_a_stacked, *self.lora_b_stacked)
        lay_out(self)
        for old, new in zip(before, (*self.lora_a_stacked, *self.lora_b_stacked), strict=True):
            assert old.shape == new.shape
            assert not new.any()
            new.copy_(old)  # as vLLM's set_lora does, slot by slot
        return self

    def fill(self, ours: Any) -> None:
        """Tell the operators the ranks."""
        for slot, ranks in enumerate([(RANK, RANK), (RANK // 2, 0), (RANK, RANK)]):
            ours.slot_filled(
                slot, {a.data_ptr(): rank for a, rank in zip(self.lora_a_stacked, ranks) if rank}
            )

    def by_token(self, y: Tensor, x: Tensor, slots: list[int]) -> Tensor:
        parts = zip(y.split(self.widths, dim=1), self.lora_a_stacked, self.lora_b_stacked)
        return torch.cat([by_token(part, x, a, b, 1.0, slots) for part, a, b in parts], dim=1)


@given(slot_maps, st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_module_of_slices_equals_a_loop_over_tokens(slots: list[int], laid_out: bool) -> None:
    """Full and partial ranks, slices an adapter leaves alone, any mixture of segments, either memory layout."""
    module = Slices().laid_out() if laid_out else Slices()
    x, y = torch.randn(len(slots), WIDTH), torch.randn(len(slots), OUT + 2)
    ours, found = wrapper(), y.clone()
    module.fill(ours)
    ours.token_runs = segments(np.array(slots))
    ours.add_lora_linear(found, x, module.lora_a_stacked, module.lora_b_stacked, 1.0, module.widths)
    torch.testing.assert_close(found, module.by_token(y, x, slots), rtol=1e-5, atol=1e-5)
    plain = [t for t, slot in enumerate(slots) if slot == PLAIN]
    assert torch.equal(found[plain], y[plain])


def test_slices_of_full_rank_share_one_shrink() -> None:
    module = Slices().laid_out()
    arguments = (module.lora_a_stacked, module.lora_b_stacked, ((0, OUT), (OUT, OUT + 2)))
    [product] = slot_products(*arguments, (RANK, RANK), 0, torch.float32)
    assert product.A_IR.shape == (WIDTH, 2 * RANK)
    [product] = slot_products(*arguments, (RANK // 2, 0), 1, torch.float32)
    assert product.A_IR.shape == (WIDTH, RANK // 2)
    assert product.A_IR.data_ptr() == module.lora_a_stacked.beside[1].data_ptr()  # a view, no copy


class Mapping:
    """What vLLM's LoRAMapping holds."""

    def __init__(self, index: list[int], prompt: list[int]) -> None:
        self.index_mapping, self.prompt_mapping, self.is_prefill = tuple(index), tuple(prompt), True


def wrapper(max_batches: int = 2) -> Any:
    return segmented_wrapper()(max_num_batched_tokens=32, max_batches=max_batches, device="cpu")


IDS = [40, None, 17]  # slot -> adapter id


@given(st.lists(st.sampled_from([0, 40, 17]), min_size=1, max_size=14))
@settings(max_examples=30, deadline=None)
def test_index_tensors_equal_vllms(ids: list[int]) -> None:
    from vllm.lora.punica_wrapper.utils import convert_mapping

    mapping, ours = Mapping(ids, ids[:3]), wrapper()
    ours.update_metadata(mapping, IDS, SLOTS + 1, 100)
    base, sampler, padded, embeddings, lengths = convert_mapping(mapping, IDS, SLOTS + 1, 100, "cpu")
    assert torch.equal(ours.token_lora_indices, base)
    assert torch.equal(ours.sampler_indices, sampler)
    assert torch.equal(ours.sampler_indices_padded, padded)
    assert torch.equal(ours._embeddings_indices[: len(ids)], embeddings)
    assert ours.indices_len == lengths


def test_an_adapter_without_a_slot_is_an_error() -> None:
    with pytest.raises(KeyError):
        slots_of((0, 99), IDS)


class TestWrapper:
    def test_linear_layers_of_several_slices(self) -> None:
        slots = [0, 0, PLAIN, 2, 2, PLAIN, 0]
        ids = [IDS[slot] or 0 if slot != PLAIN else 0 for slot in slots]
        a, b = (
            (stacked(1, RANK, WIDTH), stacked(2, RANK, WIDTH)),
            (stacked(3, OUT, RANK), stacked(4, 2, RANK)),
        )
        x, y = torch.randn(7, WIDTH), torch.randn(7, OUT + 2)
        ours, found = wrapper(), y.clone()
        for slot in (0, 2):
            ours.slot_filled(slot, {part.data_ptr(): RANK for part in a})
        ours.update_metadata(Mapping(ids, ids[-1:]), IDS, SLOTS + 1, 100)
        ours.add_lora_linear(found, x, a, b, 1.0, (OUT, 2))
        expected = torch.cat(
            [
                by_token(y[:, :OUT], x, a[0], b[0], 1.0, slots),
                by_token(y[:, OUT:], x, a[1], b[1], 1.0, slots),
            ],
            1,
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_a_resumed_request_gives_two_segments_in_an_engine_for_one(self) -> None:
        """vLLM's buffers hold max_num_seqs segments; adapted prompt and plain tail of one request are two."""
        ours = wrapper(max_batches=1)
        ours.update_metadata(Mapping([40] * 5 + [0] * 3, [0]), IDS, SLOTS + 1, 100)
        assert [tuple(run) for run in ours.token_runs] == [(0, 5, 0)]

    def test_stock_operators_still_have_the_faults_that_made_these_necessary(self) -> None:
        """When this fails, vLLM has mended them: the wrapper may go."""
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        stock = PunicaWrapperCPU(max_num_batched_tokens=32, max_batches=1, device="cpu")
        with pytest.raises(RuntimeError):
            stock.update_metadata(Mapping([40] * 5 + [0] * 3, [0]), IDS, SLOTS + 1, 100)
        stock = PunicaWrapperCPU(max_num_batched_tokens=32, max_batches=4, device="cpu")
        stock.update_metadata(Mapping([40, 0], [0]), IDS, SLOTS + 1, 100)
        y = torch.zeros(2, OUT)
        stock.add_lora_linear(
            y, torch.ones(2, WIDTH), (stacked(1, RANK, WIDTH),), (stacked(2, OUT, RANK),), 1.0, (OUT,)
        )
        assert y[1].abs().sum() > 0  # the plain token got the last slot's adapter

    def test_a_slot_that_changes_hands(self) -> None:
        """Rank 1, then full rank: what the first adapter computed is forgotten."""
        a, b = stacked(1, RANK, WIDTH), stacked(2, OUT, RANK)
        ours, x = wrapper(), torch.randn(1, WIDTH)
        ours.update_metadata(Mapping([40], [40]), IDS, SLOTS + 1, 100)
        with pytest.raises(KeyError):
            ours.add_lora_linear(torch.zeros(1, OUT), x, (a,), (b,), 1.0, (OUT,))
        for rank in (1, RANK, 0):
            ours.slot_filled(0, {a.data_ptr(): rank})
            y = torch.zeros(1, OUT)
            ours.add_lora_linear(y, x, (a,), (b,), 1.0, (OUT,))
            expected = by_token(torch.zeros(1, OUT), x, a[:, :, :rank], b[..., :rank], 1.0, [0])
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)

    def test_prompt_logprobs_under_an_lm_head_adapter_are_refused(self) -> None:
        ours = wrapper()
        ours.update_metadata(Mapping([40] * 4, [40]), IDS, SLOTS + 1, 100)
        y, x, a = torch.zeros(3, OUT), torch.randn(3, WIDTH), stacked(1, RANK, WIDTH)
        ours.slot_filled(0, {a.data_ptr(): RANK})
        with pytest.raises(RuntimeError, match="prompt_logprobs"):
            ours.add_lora_logits(y, x, a, stacked(2, OUT, RANK), 1.0)
