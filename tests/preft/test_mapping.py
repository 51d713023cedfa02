"""The token map of a step against a reference that walks token by token with shared's own definition of the phases."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preft.vllm.mapping import KINDS, NO_ADAPTER, map_step, stretches
from shared.tokens import Phase, phase_mask


class Row(NamedTuple):
    """One request of a step: its adapters, each acting in its phase where no earlier one does."""

    adapters: tuple[tuple[int, Phase], ...]
    prompt: int
    computed: int
    scheduled: int
    sampled: int


@st.composite
def rows(draw: st.DrawFn) -> Row:
    scheduled = draw(st.integers(1, 12))
    adapter = st.tuples(st.sampled_from([1, 2, 7]), st.sampled_from(list(Phase)))
    return Row(
        adapters=tuple(draw(st.lists(adapter, max_size=3))),
        prompt=draw(st.integers(1, 20)),
        computed=draw(st.integers(0, 24)),
        scheduled=scheduled,
        sampled=draw(st.integers(1, scheduled)),
    )


def one(phase: Phase, prompt: int, computed: int, scheduled: int) -> Row:
    """A request of adapter 3, one row of which is sampled."""
    return Row(((3, phase),), prompt, computed, scheduled, sampled=1)


def adapter_at(row: Row, position: int) -> int:
    """The adapter that acts at a position, by the definition of the phases in shared.tokens."""
    position_11, one_11 = torch.tensor([[position]]), torch.ones(1, 1, dtype=torch.long)
    for number, phase in row.adapters:
        if bool(phase_mask(phase, position_11, torch.tensor([row.prompt]), one_11).item()):
            return number
    return NO_ADAPTER


def by_kind(row: Row) -> list[int]:
    """The row's adapter on every kind of token."""
    return [
        next((number for number, phase in row.adapters if KINDS[phase][kind]), NO_ADAPTER)
        for kind in range(3)
    ]


def map_rows(step: list[Row]) -> tuple[list[int], list[int], set[int]]:
    adapter_RP, start_RP = [], []
    for row in step:
        starts = {stretch.kind: stretch.start for stretch in stretches(row.prompt)}
        adapter_RP.append(by_kind(row))
        start_RP.append(
            [starts.get(kind, 0) for kind in range(3)]
        )  # an empty stretch starts where the next does
    columns = (
        adapter_RP,
        start_RP,
        [row.computed for row in step],
        [row.scheduled for row in step],
        [row.sampled for row in step],
    )
    found = map_step(*(np.array(column, dtype=np.int64) for column in columns))
    return found.token_K.tolist(), found.sampled_S.tolist(), set(found.active)


@given(st.lists(rows(), min_size=1, max_size=6))
@settings(deadline=None)
def test_every_token_gets_what_its_position_says(step: list[Row]) -> None:
    tokens, sampled = [], []
    for row in step:
        ids = [adapter_at(row, t) for t in range(row.computed, row.computed + row.scheduled)]
        tokens += ids
        sampled += ids[-row.sampled :]
    assert map_rows(step) == (tokens, sampled, set(tokens) - {NO_ADAPTER})


@given(rows(), st.integers(1, 11))
@settings(deadline=None)
def test_two_chunks_are_one(row: Row, cut: int) -> None:
    whole, _, _ = map_rows([row._replace(sampled=1)])
    cut = min(cut, row.scheduled)
    first = row._replace(scheduled=cut, sampled=1)
    second = row._replace(computed=row.computed + cut, scheduled=row.scheduled - cut, sampled=1)
    parts = map_rows([first])[0] + (map_rows([second])[0] if second.scheduled else [])
    assert parts == whole


@given(st.lists(rows(), min_size=2, max_size=5))
@settings(deadline=None)
def test_the_order_of_the_batch_does_not_matter(step: list[Row]) -> None:
    def by_request(batch: list[Row]) -> list[tuple[int, ...]]:
        tokens, ends = map_rows(batch)[0], np.cumsum([row.scheduled for row in batch])
        return [
            tuple(tokens[end - row.scheduled : end]) for row, end in zip(batch, ends.tolist(), strict=True)
        ]

    assert by_request(step[::-1]) == by_request(step)[::-1]


def test_prefill_and_decode_are_complements_at_the_boundary() -> None:
    """The last prompt token is prefill (it yields generated token 0), the first generated one is decode."""
    found = {phase: map_rows([one(phase, prompt=5, computed=4, scheduled=2)])[0] for phase in Phase}
    assert found[Phase.PREFILL] == [3, 0]
    assert found[Phase.DECODE] == [0, 3]
    assert found[Phase.DECODE_BOUNDARY] == found[Phase.ALL] == [3, 3]


def test_a_recomputed_request_keeps_its_generated_tokens_plain() -> None:
    """After preemption prompt and generated tokens come back in one chunk: the boundary stays the request's own."""
    assert map_rows([one(Phase.PREFILL, prompt=3, computed=0, scheduled=6)])[0] == [3] * 3 + [0] * 3


def test_the_kinds_of_token_cover_every_position_once() -> None:
    for prompt in (1, 2, 9):
        found = stretches(prompt)
        assert found[0].start == 0
        assert [stretch.start for stretch in found] == sorted({stretch.start for stretch in found})
