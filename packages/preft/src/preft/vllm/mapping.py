"""Which adapter every token of a scheduler step gets (digest of the paper, section 1.2: the boundary is the request's).

Request i has s tokens computed and k scheduled in this step, an original prompt of n tokens, and an adapter whose phase
covers the positions [low, high):

    prefill [0, n)   decode [n, inf)   decode_boundary [n - 1, inf)   all [0, inf)

Of its k tokens the first clip(low - s, 0, k) are plain, those up to clip(high - s, 0, k) carry the adapter, the rest
are plain again. Nothing else enters: not the batch order, the chunk, the step, nor whether the tokens were prompt or
generated when they were first computed. So the map is right for chunks, one-token tails, speculation, cache hits and
recomputation after preemption. Both runners of vLLM (V1 and V2) call the same function.

Letters: R requests of the step, K its tokens, S its sampled rows. Adapter id 0 means no adapter.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from shared.tokens import Phase

NO_ADAPTER = 0
ENDLESS = np.iinfo(np.int64).max


class Interval(NamedTuple):
    """Positions [low, high) of a request on which its adapter acts."""

    low: int
    high: int


class StepMap(NamedTuple):
    """Adapter id of every token, of every sampled row, and which requests have an adapted token in the step."""

    token_K: Int[ndarray, "K"]
    sampled_S: Int[ndarray, "S"]
    active_R: Bool[ndarray, "R"]


def phase_interval(phase: Phase, prompt_length: int) -> Interval:
    """The positions an adapter of this phase acts on, for a prompt of `prompt_length` tokens."""
    match Phase(phase):
        case Phase.ALL:
            return Interval(0, ENDLESS)
        case Phase.PREFILL:
            return Interval(0, prompt_length)
        case Phase.DECODE:
            return Interval(prompt_length, ENDLESS)
        case Phase.DECODE_BOUNDARY:
            return Interval(max(prompt_length - 1, 0), ENDLESS)


def map_step(
    adapter_R: Int[ndarray, "R"],
    low_R: Int[ndarray, "R"],
    high_R: Int[ndarray, "R"],
    computed_R: Int[ndarray, "R"],
    scheduled_R: Int[ndarray, "R"],
    sampled_R: Int[ndarray, "R"],
) -> StepMap:
    """Map one step; `low_R`, `high_R` are each request's adapted positions, `sampled_R` its rows that are sampled.

    A sampled row is the hidden state of one of the last `sampled_R` tokens of the request's chunk, and gets what that
    token gets.
    """
    token_K, adapted_R = _spread(adapter_R, low_R, high_R, computed_R, scheduled_R)
    sampled_S, _ = _spread(adapter_R, low_R, high_R, computed_R + scheduled_R - sampled_R, sampled_R)
    return StepMap(token_K, sampled_S, (adapted_R > 0) & (adapter_R != NO_ADAPTER))


def _spread(
    adapter_R: Int[ndarray, "R"],
    low_R: Int[ndarray, "R"],
    high_R: Int[ndarray, "R"],
    start_R: Int[ndarray, "R"],
    count_R: Int[ndarray, "R"],
) -> tuple[Int[ndarray, "K"], Int[ndarray, "R"]]:
    """Adapter ids of the positions [start, start + count) of every request, and how many of them are adapted."""
    before_R = np.clip(low_R - start_R, 0, count_R)
    until_R = np.maximum(np.clip(high_R - start_R, 0, count_R), before_R)
    counts_3R = np.stack([before_R, until_R - before_R, count_R - until_R], axis=1).ravel()
    plain_R = np.full_like(adapter_R, NO_ADAPTER)
    ids_3R = np.stack([plain_R, adapter_R, plain_R], axis=1).ravel()
    return np.repeat(ids_3R, counts_3R), until_R - before_R
