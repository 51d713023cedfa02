"""Several adapters with weights on one request: each acts on the tokens of its own phase.

With adapters i of weight w_i, phase masks m_it and scales s_i, tokens as rows:

    y_t  = W0 x_t + sum_i w_i m_it s_i B_i (A_i x_t)       at a linear layer
    h'_t = h_t    + sum_i w_i m_it B_i A_i (h_t, 1)        at the output of a block (ReFT: A = [W | b], B = R^T)

Every update is computed from the same x_t or h_t: two edits of one block are a parallel sum, and none sees the other's
effect there. So the order of the adapters does not matter, and a composition is again a low-rank update at every
module, another one for each kind of token (`preft.parts`, which saves it for serving).

`Composition` is the reference: it applies the adapters themselves, unmerged, to a Hugging Face model.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import nn

from preft.adapters import Acting, Adapter, AdapterError, MaskOf, applied_together
from preft.parts import Source, common_history, save_source, source_of, sum_sources
from shared.history import History


class Weighted(NamedTuple):
    """One adapter of a composition and the weight of its update."""

    adapter: Adapter
    weight: float = 1.0


@dataclass(frozen=True)
class Composition:
    """Adapters that act together; AdapterError for none, a weight that is no number, or two history policies."""

    adapters: tuple[Weighted, ...]

    def __post_init__(self) -> None:
        if not self.adapters:
            raise AdapterError("a composition needs at least one adapter")
        if bad := [weight for _, weight in self.adapters if not math.isfinite(weight)]:
            raise AdapterError(f"weights must be finite numbers, not {bad[0]}")
        common_history(self._sources())

    @property
    def history(self) -> History:
        """What earlier assistant turns count as for every adapter."""
        return common_history(self._sources())

    def applied_to(self, hf: nn.Module, mask_of: MaskOf) -> AbstractContextManager[None]:
        """Inside, the model's forward passes carry each adapter on the tokens of its phase."""
        return applied_together(
            hf,
            [
                Acting(adapter, weight, mask_of(adapter.config.phase))
                for adapter, weight in self.adapters
                if weight
            ],
        )

    def save(self, folder: Path | str, base_model: str = "", fingerprint: str | None = None) -> Path:
        """Write the merged adapter folder that vLLM with this project's plugin serves; returns the folder."""
        source = sum_sources(
            [(source, weight) for source, (_, weight) in zip(self._sources(), self.adapters)]
        )
        return save_source(source._replace(base_model=base_model, fingerprint=fingerprint), folder)

    def _sources(self) -> list[Source]:
        return [source_of(adapter) for adapter, _ in self.adapters]


AnyAdapter = Adapter | Composition


def compose(adapters: Sequence[tuple[Adapter, float]]) -> Composition:
    """The composition of (adapter, weight) pairs."""
    return Composition(tuple(Weighted(adapter, weight) for adapter, weight in adapters))


__all__ = ["AnyAdapter", "Composition", "Weighted", "compose"]
