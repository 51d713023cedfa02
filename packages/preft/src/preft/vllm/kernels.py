"""Low-rank updates on the CPU, one contiguous segment of tokens at a time.

vLLM 0.32's CPU operators gather a full copy of A and of B for every token, and use the index -1 of a plain token as a
tensor index, so in a mixed batch plain tokens get the adapter of the last slot. They also size their segment buffers by
the number of requests, while a request resumed after preemption gives two segments (adapted, then plain).

Here the step's token map becomes a list of segments (start, end, slot), plain tokens left out, and each is two small
matrix products:

    buffer[start:end] = scale * x[start:end] A[slot]^T          (shrink, float32)
    y[start:end]     += buffer[start:end] B[slot]^T             (expand, in y's type)

A slot whose A is zero in a module (the adapter does not touch that module) is skipped.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
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


def shrink_(y: Tensor, x: Tensor, a_stacked: Tensor, scale: float, runs: list[Segment]) -> None:
    """y[rows] = scale * x[rows] A[slot]^T for every segment; y is K R in float32, A is slots 1 R in."""
    for start, end, slot in runs:
        torch.mm(x[start:end].to(y.dtype), a_stacked[slot, 0].to(y.dtype).T, out=y[start:end])
        if scale != 1.0:
            y[start:end] *= scale


def expand_(y: Tensor, x: Tensor, b_stacked: Tensor, offset: int, runs: list[Segment], add: bool) -> None:
    """y[rows, offset:offset + out] += x[rows] B[slot]^T for every segment (or =, without `add`); B is slots 1 out R."""
    weight = b_stacked.reshape(b_stacked.shape[0], *b_stacked.shape[-2:])
    width = min(weight.shape[1], y.shape[1] - offset)  # vLLM's lm_head may be padded differently from B
    for start, end, slot in runs:
        rows = y[start:end, offset : offset + width]
        delta = x[start:end].to(y.dtype) @ weight[slot, :width].to(y.dtype).T
        rows.add_(delta) if add else rows.copy_(delta)


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
            self._used: dict[tuple[int, int], bool] = {}

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

        def slot_changed(self, slot: int) -> None:
            """Forget which modules use a slot: another adapter was put there."""
            self._used = {key: used for key, used in self._used.items() if key[1] != slot}

        def runs_using(self, stacked: Tensor, runs: list[Segment]) -> list[Segment]:
            """The segments whose slot is not all zero in a module's slot tensor."""
            return [run for run in runs if self._uses(stacked, run.slot)]

        def _uses(self, stacked: Tensor, slot: int) -> bool:
            key = (stacked.data_ptr(), slot)
            if key not in self._used:
                self._used[key] = bool(stacked[slot].any())
            return self._used[key]

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
            *,
            buffer: Any = None,
            add_inputs: bool = True,
            **_: Any,
        ) -> None:
            if not self.token_runs:
                return
            x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            offset = 0
            for i, (a_i, b_i, width) in enumerate(zip(lora_a_stacked, lora_b_stacked, output_slices)):
                if runs := self.runs_using(a_i, self.token_runs):
                    low_KR = buffer[i] if buffer is not None else x.new_empty(len(x), a_i.shape[-2]).float()
                    shrink_(low_KR, x, a_i, scale, runs)
                    expand_(y, low_KR, b_i, offset, runs, add_inputs)
                offset += width

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
            *,
            buffer: Tensor | None = None,
            **_: Any,
        ) -> None:
            runs = self.runs_using(lora_a_stacked, self.sampled_runs)
            if not runs:
                return
            x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            if len(x) != len(self.sampler_indices):
                raise RuntimeError("prompt_logprobs cannot be computed under an adapter of the lm_head")
            low_SR = buffer if buffer is not None else x.new_empty(len(x), lora_a_stacked.shape[-2]).float()
            shrink_(low_SR, x, lora_a_stacked, scale, runs)
            expand_(y, low_SR, lora_b_stacked, 0, runs, add=True)

    SegmentedPunicaWrapper.__module__ = __name__
    return SegmentedPunicaWrapper


def __getattr__(name: str) -> Any:
    # vLLM resolves the wrapper by its dotted name.
    if name == "SegmentedPunicaWrapper":
        return segmented_wrapper()
    raise AttributeError(name)
