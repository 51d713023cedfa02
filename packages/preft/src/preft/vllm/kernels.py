"""Low-rank updates on the CPU, one contiguous segment of tokens at a time.

vLLM 0.32's CPU operators gather a full copy of A and of B for every token, and use the index -1 of a plain token as a
tensor index, so in a mixed batch plain tokens get the adapter of the last slot. They also size their segment buffers by
the number of requests, while a request resumed after preemption gives two segments (adapted, then plain).

Here the step's token map becomes a list of segments (start, end, slot), plain tokens left out, and each is two small
matrix products, the second written straight into the rows and columns it belongs to:

    low             = x[start:end] A[slot]        (shrink; A of I x R, R the adapter's own rank, not the slots' size)
    y[start:end, c] += low B[slot]                (expand; B of R x O, columns c of the slice)

Slices that share an input (q, k and v; gate and up) share one shrink where their A lie side by side
(`preft.vllm.cpu_layers`). Where every segment is one token, as when all-token adapters decode, the segments are one
batched product. A module that an adapter does not touch is skipped.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

PLAIN = -1


class Segment(NamedTuple):
    """Rows [start, end) of a step that use one adapter slot."""

    start: int
    end: int
    slot: int


def segments(slot_K: Int[ndarray, "K"]) -> list[Segment]:
    """The runs of equal slots, without the plain ones."""
    if not len(slot_K):
        return []
    edges = np.flatnonzero(np.diff(slot_K)) + 1
    starts, ends = [0, *edges.tolist()], [*edges.tolist(), len(slot_K)]
    return [
        Segment(start, end, slot)
        for start, end, slot in zip(starts, ends, slot_K[starts].tolist())
        if slot != PLAIN
    ]


def slots_of(adapter_ids: tuple[Any, ...], slot_to_id: list[int | None]) -> Int[ndarray, "K"]:
    """Slot of every adapter id, -1 for id 0; KeyError if an adapter is not in a slot."""
    unique, inverse = np.unique(np.asarray(adapter_ids, dtype=np.int64), return_inverse=True)
    id_to_slot = {adapter: slot for slot, adapter in enumerate(slot_to_id) if adapter is not None} | {
        0: PLAIN
    }
    return np.array([id_to_slot[adapter] for adapter in unique.tolist()], dtype=np.int64)[inverse]


class Expand(NamedTuple):
    """Columns [low, high) of the shrunk rows times B give the columns [start, end) of the output."""

    low: int
    high: int
    start: int
    end: int
    B_RO: Float[Tensor, "R O"]


class Product(NamedTuple):
    """One shrink and the expands that read its result."""

    A_IR: Float[Tensor, "I R"]
    expands: tuple[Expand, ...]


def slot_products(
    a_stacked: Sequence[Tensor],
    b_stacked: Sequence[Tensor],
    ends: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    slot: int,
    dtype: torch.dtype,
) -> tuple[Product, ...]:
    """What a slot computes in a module of one or more slices; `ends` are the output columns of each slice.

    `ranks` are the adapter's own in each slice, 0 where it leaves it alone. All slices of full rank whose A lie side by
    side are one product.
    """
    b_all = [b.reshape(b.shape[0], *b.shape[-2:])[slot] for b in b_stacked]
    beside = getattr(a_stacked, "beside", None)
    if beside is not None and all(rank == a.shape[-2] for rank, a in zip(ranks, a_stacked)):
        starts = [sum(ranks[:i]) for i in range(len(ranks))]
        expands = tuple(
            Expand(low, low + rank, *end, b[: end[1] - end[0]].T.to(dtype))
            for low, rank, end, b in zip(starts, ranks, ends, b_all)
        )
        return (Product(beside[slot].to(dtype), expands),)
    return tuple(
        Product(
            a[slot, 0, :rank].T.to(dtype),
            (Expand(0, rank, *end, b[: end[1] - end[0], :rank].T.to(dtype)),),
        )
        for a, b, rank, end in zip(a_stacked, b_all, ranks, ends)
        if rank
    )


def add_products_(
    y_KO: Tensor, x_KI: Tensor, runs: Sequence[Segment], products: Sequence[tuple[Product, ...]]
) -> None:
    """y[rows] += x[rows] A B for every segment; `products` holds each segment's."""
    for (start, end, _), mine in zip(runs, products):
        x_kI, y_kO = x_KI[start:end], y_KO[start:end]
        for A_IR, expands in mine:
            low_kR = x_kI @ A_IR
            for low, high, first, last, B_RO in expands:
                y_kO[:, first:last].addmm_(low_kR[:, low:high], B_RO)


def add_single_tokens_(
    y_KO: Tensor,
    x_KI: Tensor,
    runs: Sequence[Segment],
    a_stacked: Sequence[Tensor],
    b_stacked: Sequence[Tensor],
    ends: Sequence[tuple[int, int]],
) -> None:
    """`add_products_` where every segment is one token: two batched products a slice, at the slots' full rank."""
    runs = sorted(runs, key=lambda run: run.slot)  # all slots in order are a view, no copy
    rows, slots = [run.start for run in runs], [run.slot for run in runs]
    x_K1I = pick(x_KI, rows)[:, None]
    beside = getattr(a_stacked, "beside", None)
    if beside is not None:
        lows = torch.bmm(x_K1I, pick(beside, slots).to(x_KI.dtype)).chunk(len(a_stacked), dim=2)
    else:
        lows = tuple(torch.bmm(x_K1I, pick(a[:, 0].mT, slots).to(x_KI.dtype)) for a in a_stacked)
    for low_K1R, b, (first, last) in zip(lows, b_stacked, ends):
        B_KRO = pick(b.reshape(b.shape[0], *b.shape[-2:])[:, : last - first].mT, slots).to(x_KI.dtype)
        delta_KO = torch.bmm(low_K1R, B_KRO)[:, 0]
        y_KO[:, first:last].index_add_(0, torch.tensor(rows), delta_KO)


def pick(x: Tensor, rows: Sequence[int]) -> Tensor:
    """x[rows]; a view where the rows are consecutive."""
    first, last = rows[0], rows[-1] + 1
    if list(rows) == list(range(first, last)):
        return x[first:last]
    return x.index_select(0, torch.tensor(rows))


def shrink_(y: Tensor, x: Tensor, a_stacked: Tensor, scale: float, runs: Sequence[Segment]) -> None:
    """y[rows] = scale * x[rows] A[slot]^T for every segment; y is K R in float32, A is slots 1 R I."""
    for start, end, slot in runs:
        torch.mm(x[start:end].to(y.dtype), a_stacked[slot, 0].to(y.dtype).T, out=y[start:end])
        if scale != 1.0:
            y[start:end] *= scale


def expand_(y: Tensor, x: Tensor, b_stacked: Tensor, offset: int, runs: Sequence[Segment], add: bool) -> None:
    """y[rows, offset:offset + O] += x[rows] B[slot]^T for every segment (or =, without `add`); B is slots 1 O R."""
    weight = b_stacked.reshape(b_stacked.shape[0], *b_stacked.shape[-2:])
    width = min(weight.shape[1], y.shape[1] - offset)  # vLLM's lm_head may be padded differently from B
    for start, end, slot in runs:
        rows = y[start:end, offset : offset + width]
        rows.addmm_(x[start:end].to(y.dtype), weight[slot, :width].to(y.dtype).T, beta=1 if add else 0)


@cache
def segmented_wrapper() -> type:
    """The class `SegmentedPunicaWrapper`, built on first use because its base imports vLLM."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    class SegmentedPunicaWrapper(PunicaWrapperCPU):
        """vLLM's CPU wrapper with the operators of this module."""

        def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
            super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
            self.token_runs: list[Segment] = []
            self.sampled_runs: list[Segment] = []
            self._ranks: dict[int, dict[int, int]] = {}  # by slot, then by the address of a slot tensor
            self._products: dict[int, dict[tuple[int, torch.dtype], tuple[Product, ...]]] = {}

        def update_metadata(
            self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **_: Any
        ) -> None:
            """Read the step's token map; the index tensors that the stock embedding and head use are filled too."""
            token_K = slots_of(mapping.index_mapping, lora_index_to_id)
            sampled_S = slots_of(mapping.prompt_mapping, lora_index_to_id)
            self.token_runs, self.sampled_runs = segments(token_K), segments(sampled_S)
            self.no_lora, self.is_prefill = not self.token_runs, True
            self._fill(self._token_lora_indices, token_K)
            self._fill(self._sampler_indices, sampled_S)
            padded_S = np.where(sampled_S == PLAIN, max_loras - 1, sampled_S) * len(sampled_S)
            self._fill(self._sampler_indices_padded, padded_S + np.arange(len(sampled_S)))
            self._fill(self._embeddings_indices, np.maximum(token_K, 0) * vocab_size)
            self.indices_len[:] = [len(token_K), len(sampled_S), len(sampled_S), len(token_K)]

        def _fill(self, buffer: Tensor, values: ndarray) -> None:
            buffer[: len(values)].copy_(torch.from_numpy(values))

        def slot_filled(self, slot: int, ranks: dict[int, int]) -> None:
            """Another adapter is in a slot; `ranks` has its rank by the address of every slot tensor it uses."""
            self._ranks[slot], self._products[slot] = ranks, {}

        def runs_using(self, stacked: Tensor, runs: list[Segment]) -> list[Segment]:
            """The segments whose adapter uses a slot tensor."""
            return [run for run in runs if self._rank(stacked, run.slot)]

        def _rank(self, stacked: Tensor, slot: int) -> int:
            return self._ranks[slot].get(stacked.data_ptr(), 0)

        def _add(
            self, y: Tensor, x: Tensor, a_stacked: Any, b_stacked: Any, widths: Any, runs: list[Segment]
        ) -> None:
            """y += x A B on the rows of `runs`, slice after slice of `widths` columns."""
            x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            starts = [sum(widths[:i]) for i in range(len(widths))]
            # vLLM's lm_head may be padded differently from B.
            ends = [(start, min(start + width, y.shape[1])) for start, width in zip(starts, widths)]
            if len(runs) > 1 and all(run.end == run.start + 1 for run in runs):
                if any(self.runs_using(a, runs) for a in a_stacked):
                    add_single_tokens_(y, x, runs, a_stacked, b_stacked, ends)
                return
            products = []
            for _, _, slot in runs:
                known, key = self._products[slot], (a_stacked[0].data_ptr(), x.dtype)
                if key not in known:
                    ranks = [self._rank(a, slot) for a in a_stacked]
                    known[key] = slot_products(a_stacked, b_stacked, ends, ranks, slot, x.dtype)
                products.append(known[key])
            add_products_(y, x, runs, products)

        def add_shrink(self, y: Any, x: Tensor, lora_a_stacked: Any, scale: float, **_: Any) -> None:
            x = x.reshape(-1, x.shape[-1])
            for y_i, a_i in zip(y, lora_a_stacked):
                y_i = y_i.view(-1, y_i.shape[-1])
                shrink_(y_i, x, a_i, scale, self.runs_using(a_i, self.token_runs))

        def add_expand(
            self,
            y: Tensor,
            x: Any,
            lora_b_stacked: Any,
            output_slices: tuple[int, ...],
            offset_start: int = 0,
            add_inputs: bool = True,
            **_: Any,
        ) -> None:
            y = y.view(-1, y.shape[-1])
            for x_i, b_i, width in zip(x, lora_b_stacked, output_slices):
                expand_(y, x_i, b_i, offset_start, self.token_runs, add_inputs)
                offset_start += width

        def add_lora_linear(
            self,
            y: Tensor,
            x: Tensor,
            lora_a_stacked: Any,
            lora_b_stacked: Any,
            scale: float,
            output_slices: tuple[int, ...],
            **_: Any,
        ) -> None:
            if self.token_runs:
                if scale != 1.0:
                    raise RuntimeError(f"vLLM folds the scale into B, but asked for {scale}")
                self._add(y, x, lora_a_stacked, lora_b_stacked, output_slices, self.token_runs)

        def add_lora_embedding(
            self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **_: Any
        ) -> None:
            runs = self.runs_using(lora_b_stacked, self.token_runs)
            expand_(y.view(-1, y.shape[-1]), x, lora_b_stacked, 0, runs, add_inputs)

        def add_lora_logits(
            self,
            y: Tensor,
            x: Tensor,
            lora_a_stacked: Tensor,
            lora_b_stacked: Tensor,
            scale: float,
            **_: Any,
        ) -> None:
            runs = self.runs_using(lora_a_stacked, self.sampled_runs)
            if not runs:
                return
            if len(x.reshape(-1, x.shape[-1])) != len(self.sampler_indices):
                raise RuntimeError("prompt_logprobs cannot be computed under an adapter of the lm_head")
            self._add(y, x, (lora_a_stacked,), (lora_b_stacked,), (lora_b_stacked.shape[-2],), runs)

    SegmentedPunicaWrapper.__module__ = __name__
    return SegmentedPunicaWrapper


def __getattr__(name: str) -> Any:
    # vLLM resolves the wrapper by its dotted name.
    if name == "SegmentedPunicaWrapper":
        return segmented_wrapper()
    raise AttributeError(name)
