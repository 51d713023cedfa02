"""Which adapter every token of a scheduler step gets (digest of the paper, section 1.2: the boundary is the request's).

A request with a prompt of n tokens has tokens of three kinds, in stretches of positions, and a phase is a set of kinds:

    prompt     [0, n - 1)     prefill          prompt, boundary
    boundary   {n - 1}        decode           generated
    generated  [n, inf)       decode_boundary  boundary, generated
                              all              prompt, boundary, generated

In a chat of sticky history (`preft.vllm.sticky`) the earlier answers in the prompt are generated stretches too, each
with a boundary in front. So all that an adapter does to a request is three adapter ids, one a kind, 0 where nothing
acts; a composition has up to three different ones. In a step with s tokens computed and k scheduled, the stretch
[start, next start) gets its id on clip(next start - s, 0, k) - clip(start - s, 0, k) of the k tokens. Nothing else
enters: not the batch order, the chunk, the step, nor whether the tokens were prompt or generated when they were first
computed. So the map is right for chunks, one-token tails, speculation, cache hits and recomputation after preemption.
Both runners of vLLM (V1 and V2) call the same function.

Letters: R requests of the step, P stretches of a request, K tokens of the step, S its sampled rows.
"""

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from shared.tokens import Phase

NO_ADAPTER = 0
ENDLESS = np.iinfo(np.int64).max


class Kind(IntEnum):
    """What a token of a request is to its adapter."""

    PROMPT = 0
    BOUNDARY = 1  # the last prompt token, which yields generated token 0
    GENERATED = 2


# The kinds of token each phase acts on, as three flags.
KINDS: dict[Phase, tuple[bool, bool, bool]] = {
    Phase.PREFILL: (True, True, False),
    Phase.DECODE: (False, False, True),
    Phase.DECODE_BOUNDARY: (False, True, True),
    Phase.ALL: (True, True, True),
}


class Stretch(NamedTuple):
    """Tokens of one kind, from position `start` to the next stretch."""

    start: int
    kind: Kind


class StepMap(NamedTuple):
    """Adapter id of every token and of every sampled row, the ids that a token of the step has, tokens by kind."""

    token_K: Int[ndarray, "K"]
    sampled_S: Int[ndarray, "S"]
    active: frozenset[int]
    count_RK: Int[ndarray, "R 3"]


def stretches(prompt_length: int, generated: Iterable[tuple[int, int]] = ()) -> list[Stretch]:
    """The stretches of a request with a prompt of `prompt_length` tokens, first to last.

    `generated` are the positions [start, end) of earlier answers in the prompt, in order.
    """
    found, position = [], 0
    for start, end in (*generated, (prompt_length, ENDLESS)):
        if position < start - 1:
            found.append(Stretch(position, Kind.PROMPT))
        if position < start:
            found.append(Stretch(start - 1, Kind.BOUNDARY))
        found.append(Stretch(start, Kind.GENERATED))
        position = end
    return found


class Layout(NamedTuple):
    """Adapter id and first position of the stretches of every request; an empty one starts where the next does.

    `kind_RP` is None where the stretches are the kinds in their order.
    """

    adapter_RP: Int[ndarray, "R P"]
    start_RP: Int[ndarray, "R P"]
    kind_RP: Int[ndarray, "R P"] | None = None


def layout(
    adapter_RK: Int[ndarray, "R 3"],
    prompt_R: Int[ndarray, "R"],
    generated: Mapping[int, Iterable[tuple[int, int]]],
) -> Layout:
    """Lay out a batch: adapter ids by kind, prompt lengths, and the earlier answers of the rows that have some."""
    if not generated:
        last_R = prompt_R.astype(np.int64) - 1
        return Layout(adapter_RK, np.stack([np.zeros_like(last_R), last_R, last_R + 1], axis=1))
    rows = [stretches(prompt, generated.get(row, ())) for row, prompt in enumerate(prompt_R.tolist())]
    shape = (len(rows), max(map(len, rows)))
    kind_RP = np.full(shape, Kind.GENERATED, dtype=np.int64)
    start_RP = np.full(shape, ENDLESS, dtype=np.int64)
    for row, several in enumerate(rows):
        kind_RP[row, : len(several)] = [stretch.kind for stretch in several]
        start_RP[row, : len(several)] = [stretch.start for stretch in several]
    return Layout(np.take_along_axis(adapter_RK, kind_RP, axis=1), start_RP, kind_RP)


def map_step(
    batch: Layout,
    computed_R: Int[ndarray, "R"],
    scheduled_R: Int[ndarray, "R"],
    sampled_R: Int[ndarray, "R"],
) -> StepMap:
    """Map one step of a batch with `sampled_R` rows to sample.

    A sampled row is the hidden state of one of the last `sampled_R` tokens of the request's chunk, and gets what that
    token gets.
    """
    adapter_RP, start_RP, kind_RP = batch
    count_RP = _counts(start_RP, computed_R, scheduled_R)
    sampled_RP = _counts(start_RP, computed_R + scheduled_R - sampled_R, sampled_R)
    ids = adapter_RP.ravel()
    return StepMap(
        np.repeat(ids, count_RP.ravel()),
        np.repeat(ids, sampled_RP.ravel()),
        frozenset(adapter_RP[count_RP > 0].tolist()) - {NO_ADAPTER},
        count_RP if kind_RP is None else _by_kind(count_RP, kind_RP),
    )


def _by_kind(count_RP: Int[ndarray, "R P"], kind_RP: Int[ndarray, "R P"]) -> Int[ndarray, "R 3"]:
    return np.stack([(count_RP * (kind_RP == kind)).sum(axis=1) for kind in Kind], axis=1)


def _counts(
    start_RP: Int[ndarray, "R P"], computed_R: Int[ndarray, "R"], scheduled_R: Int[ndarray, "R"]
) -> Int[ndarray, "R P"]:
    """How many of the positions [computed, computed + scheduled) lie in every stretch."""
    before_RP = np.clip(start_RP - computed_R[:, None], 0, scheduled_R[:, None])
    return np.diff(before_RP, axis=1, append=scheduled_R[:, None])
