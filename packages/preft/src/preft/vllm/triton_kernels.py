"""Low-rank updates and residual edits on a GPU, grouped by segment; the torch reference is `preft.vllm.kernels`.

A step's segments are cut into tiles of `TILE` rows, each with its first row, its number of rows and its slot. The tiles
are known on the host from the token map, so the grid holds the real ones only and nothing waits for the device; the
kernels read the table, and the slots' true ranks, from device memory.

    shrink   low[t] = scale * (x[t] (+ residual[t])) A[slot]^T (+ A's last column)     grid: tiles, blocks of rank
    expand   y[t, offset:] += low[t] B[slot]^T                                         grid: tiles, blocks of columns

A program whose block lies beyond its slot's rank ends at once, and the expand sums over the true rank only. Sums are
in float32 for every type of x, A and B; low is float32. With `residual` and a bias column the shrink is that of a ReFT
edit (`preft.vllm.residual`): it reads hidden and residual and needs neither their sum nor (h, 1) in memory.

Run in Triton's interpreter only (tests/preft/test_triton.py): no GPU has run these kernels.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from preft.vllm.kernels import Segment

TILE = 16  # rows of a tile; the least that tensor cores take


class Tiles(NamedTuple):
    """The tiles of a step: first row, rows and slot of each, on the device."""

    table_3N: Int32[Tensor, "3 N"]

    @property
    def total(self) -> int:
        """Number of tiles."""
        return self.table_3N.shape[1]


def tiles(runs: Sequence[Segment], device: torch.device | str) -> Tiles:
    """Cut segments into tiles; empty segments give none."""
    rows = [
        (start, min(TILE, run.end - start), run.slot)
        for run in runs
        for start in range(run.start, run.end, TILE)
    ]
    table_3N = np.array(rows, dtype=np.int32).reshape(-1, 3).T
    return Tiles(torch.from_numpy(np.ascontiguousarray(table_3N)).to(device, non_blocking=True))


@cache
def _kernels() -> tuple[Any, Any]:
    import triton
    import triton.language as tl

    @triton.jit
    def shrink(  # type: ignore[no-untyped-def]
        low, x, residual, a, table, ranks, count, width, scale,
        low_row, x_row, residual_row, a_slot, a_rank, a_column,
        HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, DOT: tl.constexpr,
        M: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    ):  # fmt: skip
        tile = tl.program_id(0)
        start, rows = tl.load(table + tile), tl.load(table + count + tile)
        slot = tl.load(table + 2 * count + tile)
        rank = tl.load(ranks + slot)
        first = tl.program_id(1) * R
        if first < rank:
            m, r, k = tl.arange(0, M), first + tl.arange(0, R), tl.arange(0, K)
            row = (start + m).to(tl.int64)
            a_block = a + slot.to(tl.int64) * a_slot + r[None, :] * a_rank
            total = tl.full((M, R), 0.0, tl.float32)
            for at in range(0, width, K):
                column = at + k
                inside = (m < rows)[:, None] & (column < width)[None, :]
                x_MK = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0)
                if HAS_RESIDUAL:
                    cells = residual + row[:, None] * residual_row + column[None, :]
                    x_MK = x_MK.to(tl.float32) + tl.load(cells, mask=inside, other=0.0).to(tl.float32)
                a_KR = tl.load(
                    a_block + column[:, None] * a_column,
                    mask=(column < width)[:, None] & (r < rank)[None, :],
                    other=0.0,
                )
                total += tl.dot(x_MK.to(DOT), a_KR.to(DOT), input_precision="ieee")
            if HAS_BIAS:
                bias_1R = tl.load(a_block + width * a_column, mask=(r < rank)[None, :], other=0.0)
                total += bias_1R.to(tl.float32)
            inside = (m < rows)[:, None] & (r < rank)[None, :]
            tl.store(low + row[:, None] * low_row + r[None, :], total * scale, mask=inside)

    @triton.jit
    def expand(  # type: ignore[no-untyped-def]
        y, low, b, table, ranks, count, width, offset,
        y_row, low_row, b_slot, b_column, b_rank,
        DOT: tl.constexpr, M: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    ):  # fmt: skip
        tile = tl.program_id(0)
        start, rows = tl.load(table + tile), tl.load(table + count + tile)
        slot = tl.load(table + 2 * count + tile)
        rank = tl.load(ranks + slot)
        if rank > 0:
            m, r = tl.arange(0, M), tl.arange(0, R)
            n = tl.program_id(1) * N + tl.arange(0, N)
            row = (start + m).to(tl.int64)
            total = tl.full((M, N), 0.0, tl.float32)
            for at in range(0, rank, R):
                inside = (m < rows)[:, None] & (at + r < rank)[None, :]
                low_MR = tl.load(low + row[:, None] * low_row + at + r[None, :], mask=inside, other=0.0)
                b_RN = tl.load(
                    b + slot.to(tl.int64) * b_slot + n[None, :] * b_column + (at + r)[:, None] * b_rank,
                    mask=(at + r < rank)[:, None] & (n < width)[None, :],
                    other=0.0,
                )
                total += tl.dot(low_MR.to(DOT), b_RN.to(DOT), input_precision="ieee")
            inside = (m < rows)[:, None] & (n < width)[None, :]
            cells = y + row[:, None] * y_row + offset + n[None, :]
            before = tl.load(cells, mask=inside, other=0.0).to(tl.float32)
            tl.store(cells, (before + total).to(y.dtype.element_ty), mask=inside)

    return shrink, expand


def shrink_(
    low_KR: Float[Tensor, "K R"],
    x_KI: Float[Tensor, "K I"],
    a_stacked: Float[Tensor, "slots 1 R J"],
    ranks: Int32[Tensor, "slots"],
    step: Tiles,
    scale: float = 1.0,
    residual_KI: Float[Tensor, "K I"] | None = None,
) -> None:
    """low[rows] = scale * x[rows] A[slot]^T for every tile; only the columns below a slot's rank are written.

    With J > I, A's column I is a bias. `low` is float32.
    """
    width = x_KI.shape[1]
    if not step.total:
        return
    block = min(64, _power(a_stacked.shape[2]))
    residual = x_KI if residual_KI is None else residual_KI
    shrink, _ = _kernels()
    shrink[step.total, -(-a_stacked.shape[2] // block)](
        low_KR, x_KI, residual, a_stacked, step.table_3N, ranks, step.total, width, scale,
        low_KR.stride(0), x_KI.stride(0), residual.stride(0),
        a_stacked.stride(0), a_stacked.stride(2), a_stacked.stride(3),
        HAS_RESIDUAL=residual_KI is not None, HAS_BIAS=a_stacked.shape[3] > width, DOT=_dot_type(x_KI.dtype),
        M=TILE, R=block, K=min(64, _power(width)),
    )  # fmt: skip


def expand_(
    y_KO: Float[Tensor, "K O"],
    low_KR: Float[Tensor, "K R"],
    b_stacked: Float[Tensor, "slots 1 N R"],
    ranks: Int32[Tensor, "slots"],
    step: Tiles,
    offset: int = 0,
) -> None:
    """y[rows, offset:offset + N] += low[rows] B[slot]^T for every tile, over the true rank of its slot."""
    width = min(b_stacked.shape[2], y_KO.shape[1] - offset)
    if not step.total:
        return
    block = min(128, _power(width))
    _, expand = _kernels()
    expand[step.total, -(-width // block)](
        y_KO, low_KR, b_stacked, step.table_3N, ranks, step.total, width, offset,
        y_KO.stride(0), low_KR.stride(0),
        b_stacked.stride(0), b_stacked.stride(2), b_stacked.stride(3),
        DOT=_dot_type(b_stacked.dtype), M=TILE, R=min(64, _power(b_stacked.shape[3])), N=block,
    )  # fmt: skip


def edit_(
    hidden_KD: Float[Tensor, "K D"],
    residual_KD: Float[Tensor, "K D"] | None,
    a_stacked: Float[Tensor, "slots 1 R J"],
    b_stacked: Float[Tensor, "slots 1 D R"],
    ranks: Int32[Tensor, "slots"],
    step: Tiles,
) -> None:
    """hidden[rows] += B (W h + b) with h = hidden (+ residual) and A = [W | b | 0]: a ReFT edit, in two launches."""
    low_KR = torch.empty(len(hidden_KD), a_stacked.shape[2], dtype=torch.float32, device=hidden_KD.device)
    shrink_(low_KR, hidden_KD, a_stacked, ranks, step, residual_KI=residual_KD)
    expand_(hidden_KD, low_KR, b_stacked, ranks, step)


def _dot_type(dtype: torch.dtype) -> Any:
    """Type of a dot's operands: the tensors' own, but for bfloat16 in the interpreter, which multiplies its bits."""
    import triton
    import triton.language as tl

    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return getattr(tl, str(dtype).removeprefix("torch."))


def _power(n: int) -> int:
    """The least power of two that is at least n and 16, the least that tensor cores take."""
    return max(16, 1 << (n - 1).bit_length())
