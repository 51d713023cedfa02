"""vLLM's LoRA operators on a GPU with the kernels of `preft.vllm.triton_kernels`, behind a switch.

Stock vLLM has good GPU operators and they are the default. `INNERWORKS_TRITON_LORA=1` takes these instead for linear
layers: a grid of real tiles and true ranks, made from the host's token map alone. The grid differs from step to step,
which a compiled graph cannot hold: the engine must run with enforce_eager.

What stays vLLM's: embeddings and logits. So the metadata of their operators is prepared too, once a step, with its
sort of the tokens on the device and its wait for that. A residual edit goes through its site's linear operator as on a
CPU; `triton_kernels.edit_`, which needs no copy of (h, 1), is not called from here. No GPU has run this class; its
arithmetic is tested in Triton's interpreter.
"""

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from preft.vllm.kernels import Segment, segments, slots_of
from preft.vllm.triton_kernels import Tiles, expand_, shrink_, tiles

SWITCH = "INNERWORKS_TRITON_LORA"
QUALIFIED_NAME = "preft.vllm.triton_wrapper.SegmentedTritonWrapper"


def switched_on() -> bool:
    """Whether the environment asks for these operators; ValueError unless the switch is 0 or 1."""
    value = os.environ.get(SWITCH, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{SWITCH} must be 0 or 1, not {value!r}")
    return value == "1"


class TritonOperators:
    """Replaces a wrapper's linear operator; mixed into vLLM's class, which keeps embeddings and logits."""

    step: Tiles

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._by_slot: dict[int, dict[int, int]] = {}
        self._ranks: dict[int, Tensor] = {}  # by the address of a module's A: the rank of every slot

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any
    ) -> None:
        """Cut the step's token map into tiles."""
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)  # type: ignore[misc]
        runs: list[Segment] = segments(slots_of(mapping.index_mapping, lora_index_to_id))
        self.step = tiles(runs, self.device)  # type: ignore[attr-defined]

    def slot_filled(self, slot: int, ranks: dict[int, int]) -> None:
        """Another adapter is in a slot; `ranks` has its rank by the address of every slot tensor it uses."""
        self._by_slot[slot] = ranks
        self._ranks.clear()

    def ranks(self, a_stacked: Tensor) -> Tensor:
        """True rank of every slot in a module, on the device; sent there without waiting."""
        key = a_stacked.data_ptr()
        if key not in self._ranks:
            of_slots = [self._by_slot.get(slot, {}).get(key, 0) for slot in range(len(a_stacked))]
            self._ranks[key] = torch.tensor(of_slots, dtype=torch.int32).to(
                a_stacked.device, non_blocking=True
            )
        return self._ranks[key]

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        """y += scale * x A B on the adapted rows, slice after slice."""
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        low_KR = torch.empty(len(x), lora_a_stacked[0].shape[2], dtype=torch.float32, device=x.device)
        offset = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices):
            ranks = self.ranks(a)
            shrink_(low_KR, x, a, ranks, self.step, scale)
            expand_(y, low_KR, b, ranks, self.step, offset)
            offset += width


@cache
def wrapper_class() -> type:
    """The class `SegmentedTritonWrapper`, built on first use because its base imports vLLM."""
    from vllm.config import get_current_vllm_config
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    class SegmentedTritonWrapper(TritonOperators, PunicaWrapperGPU):  # type: ignore[misc]
        """vLLM's GPU wrapper with this project's linear operator."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if not get_current_vllm_config().model_config.enforce_eager:
                raise ValueError(f"{SWITCH}=1 needs enforce_eager=True: its grids differ from step to step")
            super().__init__(*args, **kwargs)

    SegmentedTritonWrapper.__module__ = __name__
    return SegmentedTritonWrapper


def __getattr__(name: str) -> Any:
    # vLLM resolves the wrapper by its dotted name.
    if name == "SegmentedTritonWrapper":
        return wrapper_class()
    raise AttributeError(name)
