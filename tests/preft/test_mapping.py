"""The token map of a step against a reference that walks token by token with shared's own definition of the phases."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preft.vllm.mapping import KINDS, NO_ADAPTER, layout, map_step, stretches
from shared.tokens import Phase, phase_mask


class Row(NamedTuple):
    """One request of a step: its adapters, each acting in its phase where no earlier one does."""

    adapters: tuple[tuple[int, Phase], ...]
    prompt: int
    computed: int
    scheduled: int
    sampled: int
    generated: tuple[tuple[int, int], ...] = ()  # earlier answers in the prompt


@st.composite
def rows(draw: st.DrawFn) -> Row:
    scheduled = draw(st.integers(1, 12))
    adapter = st.tuples(st.sampled_from([1, 2, 7]), st.sampled_from(list(Phase)))
    prompt = draw(st.integers(1, 20))
    ends = sorted(draw(st.sets(st.integers(0, prompt), max_size=4)))
    return Row(
        adapters=tuple(draw(st.lists(adapter, max_size=3))),
        generated=tuple(zip(ends[::2], ends[1::2])),
        prompt=prompt,
        computed=draw(st.integers(0, 24)),
        scheduled=scheduled,
        sampled=draw(st.integers(1, scheduled)),
    )


def one(phase: Phase, prompt: int, computed: int, scheduled: int) -> Row:
    """A request of adapter 3, one row of which is sampled."""
    return Row(((3, phase),), prompt, computed, scheduled, sampled=1)


def adapters_of(row: Row, length: int = 48) -> list[int]:
    """The adapter at every position, by the definition of the phases in shared.tokens."""
    position_1T, ones_1T = torch.arange(length)[None], torch.ones(1, length, dtype=torch.long)
    generated_1T = torch.zeros(1, length, dtype=torch.bool)
    for start, end in row.generated:
        generated_1T[:, start:end] = True
    found = [NO_ADAPTER] * length
    for number, phase in reversed(row.adapters):
        mask_1T = phase_mask(phase, position_1T, torch.tensor([row.prompt]), ones_1T, generated_1T)
        found = [number if acts else other for acts, other in zip(mask_1T[0].tolist(), found)]
    return found


def by_kind(row: Row) -> list[int]:
    """The row's adapter on every kind of token."""
    return [
        next((number for number, phase in row.adapters if KINDS[phase][kind]), NO_ADAPTER)
        for kind in range(3)
    ]


def map_rows(step: list[Row]) -> tuple[list[int], list[int], set[int]]:
    columns = ("computed", "scheduled", "sampled")
    batch = layout(
        np.array([by_kind(row) for row in step], dtype=np.int64),
        np.array([row.prompt for row in step], dtype=np.int32),
        {i: row.generated for i, row in enumerate(step) if row.generated},
    )
    found = map_step(
        batch, *(np.array([getattr(row, column) for row in step], dtype=np.int64) for column in columns)
    )
    return found.token_K.tolist(), found.sampled_S.tolist(), set(found.active)


@given(st.lists(rows(), min_size=1, max_size=6))
@settings(deadline=None)
def test_every_token_gets_what_its_position_says(step: list[Row]) -> None:
    tokens, sampled = [], []
    for row in step:
        ids = adapters_of(row)[row.computed : row.computed + row.scheduled]
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


def test_an_earlier_answer_is_a_stretch_of_its_own() -> None:
    """Sticky history: the answer at positions 3 and 4 of a prompt of 7 was generated, and stays so."""
    row = one(Phase.PREFILL, prompt=7, computed=0, scheduled=8)._replace(generated=((3, 5),))
    assert map_rows([row])[0] == [3, 3, 3, 0, 0, 3, 3, 0]
    boundary = row._replace(adapters=((3, Phase.DECODE_BOUNDARY),))
    assert map_rows([boundary])[0] == [0, 0, 3, 3, 3, 0, 3, 3]


def test_the_kinds_of_token_cover_every_position_once() -> None:
    for prompt in (1, 2, 9):
        found = stretches(prompt)
        assert found[0].start == 0
        assert [stretch.start for stretch in found] == sorted({stretch.start for stretch in found})
