"""The learning rate of an arm at a size: a walk on one grid, the same rule for every arm.

Begin where the size before ended (the first in the middle of the grid), try both neighbours of the best rate so far,
and stop when the best has no untried neighbour. So the chosen rate is better than its neighbours, or the grid's end,
which the report then says.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Tuned(NamedTuple):
    """Validation loss of every rate that was tried, and the best of them."""

    losses: dict[float, float]
    rate: float

    def at_end(self, rates: Sequence[float]) -> bool:
        """Whether the best rate is the grid's first or last: a better one may lie beyond."""
        return self.rate in (rates[0], rates[-1])


def walk(rates: Sequence[float], start: float | None, loss: Callable[[float], float]) -> Tuned:
    """Tune on ascending rates; a loss that is not finite counts as the worst."""
    place = len(rates) // 2 if start is None else rates.index(start)
    tried: dict[int, float] = {place: loss(rates[place])}
    while True:
        best = min(tried, key=lambda i: tried[i] if math.isfinite(tried[i]) else math.inf)
        fresh = [i for i in (best - 1, best + 1) if 0 <= i < len(rates) and i not in tried]
        if not fresh:
            return Tuned({rates[i]: tried[i] for i in sorted(tried)}, rates[best])
        tried |= {i: loss(rates[i]) for i in fresh}
