"""The Triton kernels, run by Triton's interpreter, against a loop over segments in float64."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from preft.vllm import triton_kernels
from preft.vllm.kernels import Segment
from preft.vllm.residual import PADDING
from preft.vllm.triton_kernels import TILE, edit_, expand_, shrink_, tiles
from preft.vllm.triton_wrapper import SWITCH, TritonOperators, switched_on

pytest.importorskip("triton")
SLOTS, RANK, WIDTH, OUT, ROWS = 3, 24, 40, 50, 45
# Plain rows in front, between and behind; an empty segment; one longer than a tile; one slot twice.
RUNS = [Segment(2, 3, 0), Segment(3, 22, 1), Segment(22, 22, 0), Segment(25, 30, 2), Segment(31, 44, 0)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    """Triton reads the variable when a kernel is made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        triton_kernels._kernels.cache_clear()
        yield
    triton_kernels._kernels.cache_clear()


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def factors(
    ranks: list[int], columns: int, rows: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A and B of slots padded to one rank; what lies beyond a slot's own rank is no number, so it may not be read."""
    a, b = (
        randn(SLOTS, 1, size, columns, dtype=dtype, seed=1),
        randn(SLOTS, 1, rows, size, dtype=dtype, seed=2),
    )
    for slot, rank in enumerate(ranks):
        a[slot, :, rank:] = torch.nan
        b[slot, :, :, rank:] = torch.nan
    return a, b


def updated(y: Tensor, x: Tensor, a: Tensor, b: Tensor, ranks: list[int], offset: int = 0) -> Tensor:
    """y + (x A^T) B^T by segment, in float64; columns of A beyond x are a bias (the first) and padding."""
    y, width = y.double(), x.shape[1]
    for start, end, slot in RUNS:
        a_RJ, b_OR = a[slot, 0, : ranks[slot]].double(), b[slot, 0, :, : ranks[slot]].double()
        low = x[start:end].double() @ a_RJ[:, :width].T
        low = low + (a_RJ[:, width] if a_RJ.shape[1] > width else 0)
        y[start:end, offset : offset + b_OR.shape[0]] += low @ b_OR.T
    return y


def close(found: Tensor, expected: Tensor) -> None:
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[found.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ranks", [[RANK, 8, 1], [16, 0, RANK]], ids=str)
def test_shrink_and_expand_into_a_slice(dtype: torch.dtype, ranks: list[int]) -> None:
    a, b = factors(ranks, WIDTH, OUT, RANK, dtype)
    x, y = randn(ROWS, WIDTH, dtype=dtype, seed=3), randn(ROWS, OUT + 9, dtype=dtype, seed=4)
    step, ranks_S = tiles(RUNS, "cpu"), torch.tensor(ranks, dtype=torch.int32)
    low, found = torch.full((ROWS, RANK), torch.nan), y.clone()
    shrink_(low, x, a, ranks_S, step)
    expand_(found, low, b, ranks_S, step, offset=5)
    close(found, updated(y, x, a, b, ranks, offset=5))
    plain = torch.ones(ROWS, dtype=torch.bool)
    for start, end, slot in RUNS:
        plain[start:end] = ranks[slot] == 0
    assert torch.equal(found[plain], y[plain])
    assert torch.equal(found[:, :5], y[:, :5])
    assert torch.equal(found[:, 5 + OUT :], y[:, 5 + OUT :])


@pytest.mark.parametrize("size", [1, 16, 256])
def test_ranks_from_one_to_256_in_tensors_laid_out_either_way(size: int) -> None:
    ranks = [size, 1, max(1, size - 7)]
    a, b = factors(ranks, WIDTH, OUT, size, torch.float32)
    a, b = a.mT.contiguous().mT, b.mT.contiguous().mT  # strides, not shapes, say how they lie
    x, y = randn(ROWS, WIDTH, seed=3), randn(ROWS, OUT, seed=4)
    step, ranks_S = tiles(RUNS, "cpu"), torch.tensor(ranks, dtype=torch.int32)
    low, found = torch.full((ROWS, size), torch.nan), y.clone()
    shrink_(low, x, a, ranks_S, step, scale=1.0)
    expand_(found, low, b, ranks_S, step)
    close(found, updated(y, x, a, b, ranks))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pair", [True, False])
def test_residual_edit(dtype: torch.dtype, pair: bool) -> None:
    ranks = [RANK, 3, 0]
    a, b = factors(ranks, WIDTH + PADDING, WIDTH, RANK, dtype)
    hidden, residual = randn(ROWS, WIDTH, dtype=dtype, seed=5), randn(ROWS, WIDTH, dtype=dtype, seed=6)
    found = hidden.clone()
    edit_(found, residual if pair else None, a, b, torch.tensor(ranks, dtype=torch.int32), tiles(RUNS, "cpu"))
    close(found, updated(hidden, hidden + residual if pair else hidden, a, b, ranks))


class StockWrapper:
    """Stands for vLLM's GPU wrapper, which cannot be built without a GPU."""

    device = "cpu"

    def update_metadata(self, *_: Any) -> None:
        """Stock metadata are not looked at."""


class Operators(TritonOperators, StockWrapper):
    pass


class Mapping(NamedTuple):
    index_mapping: tuple[int, ...]


def test_the_wrapper_adds_every_slice_and_sees_a_slot_change_hands() -> None:
    a = (randn(SLOTS, 1, RANK, WIDTH, seed=1), randn(SLOTS, 1, RANK, WIDTH, seed=2))
    b = (randn(SLOTS, 1, OUT, RANK, seed=3), randn(SLOTS, 1, 9, RANK, seed=4))
    a[0][1, :, 5:] = torch.nan  # slot 1: rank 5 in the first slice; in the second first none, then full
    operators, ids = Operators(), [7, 8, 9]
    slot_of = {row: run.slot for run in RUNS for row in range(run.start, run.end)}
    index = tuple(ids[slot_of[row]] if row in slot_of else 0 for row in range(ROWS))
    operators.update_metadata(Mapping(index), ids)
    x, y = randn(ROWS, WIDTH, seed=5), randn(ROWS, OUT + 9, seed=6)
    full = {a[0].data_ptr(): RANK, a[1].data_ptr(): RANK}
    for slot in (0, 2):
        operators.slot_filled(slot, full)
    operators.slot_filled(1, {a[0].data_ptr(): 5})
    for change in (False, True):
        if change:
            operators.slot_filled(1, full | {a[0].data_ptr(): 5})
        found = y.clone()
        operators.add_lora_linear(found, x, a, b, 1.0, (OUT, 9))
        expected = updated(y, x, a[0], b[0], [RANK, 5, RANK])
        expected = updated(expected, x, a[1], b[1], [RANK, RANK if change else 0, RANK], offset=OUT)
        close(found, expected)


def test_the_switch_is_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not switched_on()
    monkeypatch.setenv(SWITCH, "1")
    assert switched_on()
    monkeypatch.setenv(SWITCH, "yes")
    with pytest.raises(ValueError, match="must be 0 or 1"):
        switched_on()


def test_tiles_cover_every_segment_once() -> None:
    table = tiles(RUNS, "cpu").table_3N
    rows = [(row, slot) for start, count, slot in table.T.tolist() for row in range(start, start + count)]
    assert rows == [(row, run.slot) for run in RUNS for row in range(run.start, run.end)]
    assert table[1].max() == TILE
    assert tiles([], "cpu").total == 0
