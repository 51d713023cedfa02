"""The shortcut for steps without adapted tokens against the map of the step."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preft.vllm import runner
from preft.vllm.identity import AdapterIdentity, AdapterRegistry
from preft.vllm.metrics import WorkerCounts
from shared.tokens import Phase

PHASES = list(Phase)
# One request of a step: adapter (index of its phase, None for the base model), prompt length, computed, scheduled.
requests = st.tuples(
    st.none() | st.integers(0, len(PHASES) - 1), st.integers(1, 6), st.integers(0, 9), st.integers(1, 4)
)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapter i + 1 acts in phase i."""
    known = AdapterRegistry()
    known._known = {
        (i, f"/{i}"): AdapterIdentity(phase, "lora", "d", ()) for i, phase in enumerate(PHASES, 1)
    }
    monkeypatch.setattr(runner, "worker_adapters", known)


class Lora(SimpleNamespace):
    """A LoRARequest, which is hashable."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def lora(number: int) -> Lora:
    return Lora(lora_int_id=number, lora_path=f"/{number}", lora_name=str(number))


@given(st.lists(requests, min_size=1, max_size=6))
@settings(deadline=None, max_examples=300)
def test_a_step_maps_alike_with_and_without_the_shortcut(
    rows: list[tuple[int | None, int, int, int]],
) -> None:
    adapter_R = np.array([0 if phase is None else phase + 1 for phase, *_ in rows])
    prompt_R, computed_R, scheduled_R = np.array([row[1:] for row in rows]).T
    loras = {number: lora(number) for number in set(adapter_R.tolist()) - {0}}
    batch = SimpleNamespace(
        num_reqs=len(rows),
        request_lora_mapping=adapter_R,
        lora_id_to_lora_request=loras,
        num_prompt_tokens=prompt_R,
        num_computed_tokens_cpu=computed_R,
        req_ids=[str(row) for row in range(len(rows))],
        cached_requests={str(row): SimpleNamespace(lora_request=None) for row in range(len(rows))},
    )
    sampled_R = np.ones_like(scheduled_R)
    names = [str(row) for row in range(len(rows))]
    batch_v2 = SimpleNamespace(
        lora_requests={name: loras[number] for name, number in zip(names, adapter_R.tolist()) if number},
        lora_ids=adapter_R,
        request_states=SimpleNamespace(
            prompt_len=SimpleNamespace(np=prompt_R), num_computed_tokens_np=computed_R
        ),
    )
    v1 = runner.make_lora_inputs_v1(lambda *_: ((), (), []))
    v2 = runner.make_lora_inputs_v2(lambda *_: ((), (), []))
    everything = np.arange(len(rows))
    step, counts = counted(
        lambda: runner.step_of(adapter_R, loras.values(), {}, prompt_R, computed_R, scheduled_R, sampled_R)
    )
    expected = (tuple(step.map.sampled_S.tolist()), tuple(step.map.token_K.tolist()))
    for inputs in (
        lambda: v1(batch, scheduled_R, sampled_R),
        lambda: v2(batch_v2, names, everything, scheduled_R),
    ):
        (sampled, tokens, active), found = counted(inputs)
        assert (sampled, tokens) == expected
        assert {lora.lora_int_id for lora in active} == {lora.lora_int_id for lora in step.active}
        assert found == counts
    assert batch.num_active_adapters == runner.dispatch_count(len(step.active), step.map)


def counted(work: Callable[[], Any]) -> tuple[Any, WorkerCounts]:
    """What `work` returns, and the tokens that it counted."""
    with mock.patch.object(runner, "worker_counts", WorkerCounts()) as counts:
        return work(), counts


def test_a_batch_of_decoding_prefill_adapters_is_plain() -> None:
    prefill, everywhere = (lora(PHASES.index(phase) + 1) for phase in (Phase.PREFILL, Phase.ALL))
    prompt_R = np.array([4, 4])
    assert runner.is_plain([prefill], prompt_R, np.array([4, 9]))
    assert not runner.is_plain([prefill], prompt_R, np.array([3, 9]))  # the boundary token
    assert not runner.is_plain([prefill, everywhere], prompt_R, np.array([4, 9]))
    assert runner.is_plain([], prompt_R, np.array([0, 0]))
