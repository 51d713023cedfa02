"""The range of doses worth trying: as far as replies stay coherent, found without a grid.

1. From `start`, the dose is doubled while the coherence of both signs (share of coherent replies over the unedited
   share) stays at or above `floor`; the search stops at the first dose at which it drops, or at `limit`.
2. Between the last dose that held and the first that did not, the geometric mean is tried `refinements` times.

The largest dose that held is the range. Every dose tried is kept with its coherence: replies may get coherent again
further out, where they are no longer about anything, so no dose beyond a drop is ever taken.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from assumptions.chats import Chat
from assumptions.coherence import coherent, surprises
from assumptions.conditions import SteeredEngine, answer, dosed
from assumptions.steering import Direction, Scope, Unit
from shared.errors import UserError
from shared.generation import Sampling
from shared.models import Model


class Tried(NamedTuple):
    """A dose and the coherence of its replies, the worse of both signs."""

    dose: float
    coherence: float


@dataclass(frozen=True)
class DoseRange:
    """The largest dose that keeps coherence (0: none did), whether it is the limit, and what was tried, in order."""

    largest: float
    limited: bool
    tried: tuple[Tried, ...]

    def doses(self, steps: int = 3) -> list[float]:
        """An even grid from minus the largest dose to it, 2 `steps` + 1 doses; UserError where none is coherent."""
        if not self.largest:
            raise UserError(
                f"no dose from {self.tried[0].dose:g} on keeps replies coherent; start the search at a smaller one"
            )
        return [self.largest * i / steps for i in range(-steps, steps + 1)]


def search_range(
    coherence_of: Callable[[float], float],
    start: float = 1.0,
    limit: float = 64.0,
    floor: float = 0.9,
    refinements: int = 3,
) -> DoseRange:
    """Search the largest dose whose coherence is at least `floor`; `coherence_of` answers for a dose of both signs."""
    if not 0 < start <= limit:
        raise UserError(f"the search needs 0 < start <= limit, got start {start:g} and limit {limit:g}")
    tried: list[Tried] = []

    def holds(dose: float) -> bool:
        tried.append(Tried(dose, coherence_of(dose)))
        return tried[-1].coherence >= floor

    good, dose = 0.0, start
    while holds(dose):
        good = dose
        if dose == limit:
            return DoseRange(good, True, tuple(tried))
        dose = min(2 * dose, limit)
    bad = dose
    for _ in range(refinements if good else 0):
        middle = math.sqrt(good * bad)
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return DoseRange(good, False, tuple(tried))


def coherence_under(
    engine: SteeredEngine,
    model: Model,
    chats: Sequence[Chat],
    direction: Direction,
    sampling: Sampling,
    *,
    unit: Unit = "proj_sd",
    scope: Scope = "all",
    seed: int = 0,
) -> Callable[[float], float]:
    """What `search_range` asks: coherence of the replies to the chats at a dose and its opposite, the worse of both."""
    unedited = answer(engine, chats, dosed([], [], unit, scope), sampling, seed=seed)
    reference = surprises(model, chats, unedited)

    def coherence_of(dose: float) -> float:
        conditions = dosed([direction], [-dose, dose], unit, scope)[1:]
        edited = answer(engine, chats, conditions, sampling, seed=seed)
        good = coherent([*unedited, *edited], [*reference, *surprises(model, chats, edited)])
        shares = [good[start : start + len(unedited)].mean() for start in range(0, len(good), len(unedited))]
        return float(min(shares[1:]) / shares[0]) if shares[0] else 0.0

    return coherence_of
