"""The token map of a step against a reference that walks token by token with shared's own definition of the phases."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preft.vllm.mapping import NO_ADAPTER, map_step, phase_interval
from shared.tokens import Phase, phase_mask


class Row(NamedTuple):
    """One request of a step."""

    adapter: int
    phase: Phase
    prompt: int
    computed: int
    scheduled: int
    sampled: int


@st.composite
def rows(draw: st.DrawFn) -> Row:
    scheduled = draw(st.integers(1, 12))
    return Row(
        adapter=draw(st.sampled_from([NO_ADAPTER, 1, 2, 7])),
        phase=draw(st.sampled_from(list(Phase))),
        prompt=draw(st.integers(1, 20)),
        computed=draw(st.integers(0, 24)),
        scheduled=scheduled,
        sampled=draw(st.integers(1, scheduled)),
    )


def adapted(row: Row, position: int) -> bool:
    """Whether the request's adapter acts at a position, by the definition in shared.tokens."""
    position_11, one_11 = torch.tensor([[position]]), torch.ones(1, 1, dtype=torch.long)
    acts = phase_mask(row.phase, position_11, torch.tensor([row.prompt]), one_11)
    return bool(acts.item()) and row.adapter != NO_ADAPTER


def map_rows(step: list[Row]) -> tuple[list[int], list[int], list[bool]]:
    interval = [phase_interval(row.phase, row.prompt) for row in step]
    columns = (
        [row.adapter for row in step],
        [i.low for i in interval],
        [i.high for i in interval],
        [row.computed for row in step],
        [row.scheduled for row in step],
        [row.sampled for row in step],
    )
    found = map_step(*(np.array(column, dtype=np.int64) for column in columns))
    return found.token_K.tolist(), found.sampled_S.tolist(), found.active_R.tolist()


@given(st.lists(rows(), min_size=1, max_size=6))
@settings(deadline=None)
def test_every_token_gets_what_its_position_says(step: list[Row]) -> None:
    tokens, sampled, active = [], [], []
    for row in step:
        positions = range(row.computed, row.computed + row.scheduled)
        ids = [row.adapter if adapted(row, t) else NO_ADAPTER for t in positions]
        tokens += ids
        sampled += ids[-row.sampled :]
        active.append(any(ids))
    assert map_rows(step) == (tokens, sampled, active)


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
    around = Row(3, Phase.PREFILL, prompt=5, computed=4, scheduled=2, sampled=1)
    assert map_rows([around])[0] == [3, 0]
    assert map_rows([around._replace(phase=Phase.DECODE)])[0] == [0, 3]
    assert map_rows([around._replace(phase=Phase.DECODE_BOUNDARY)])[0] == [3, 3]
    assert map_rows([around._replace(phase=Phase.ALL)])[0] == [3, 3]


def test_a_recomputed_request_keeps_its_generated_tokens_plain() -> None:
    """After preemption prompt and generated tokens come back in one chunk: the boundary stays the request's own."""
    assert (
        map_rows([Row(3, Phase.PREFILL, prompt=3, computed=0, scheduled=6, sampled=1)])[0]
        == [3] * 3 + [0] * 3
    )
