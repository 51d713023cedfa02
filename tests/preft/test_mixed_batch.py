"""When an answer counts as the reference's: every token in float32, up to a near tie in half precision."""

import pytest
import torch

from preft.mixed_batch import MixedRequest, Outcome, gap_at_difference, match_rate
from preft.reference import Reference, greedy_reference
from preft.vllm.precision import near_tie

EXPECTED = Reference([5, 6, 7], [4.0, 0.1, 3.0])


def outcome(served: list[int]) -> Outcome:
    request = MixedRequest("u", "base", None, [{"role": "user", "content": "x"}], "y")
    return Outcome(request, 1, "", served, EXPECTED.tokens, 0.1, gap_at_difference(served, EXPECTED))


@pytest.mark.parametrize(
    ("served", "gap"),
    [
        ([5, 6, 7], None),
        ([9, 6, 7], 4.0),
        ([5, 9, 9], 0.1),  # the first difference counts: what follows is another text
        ([5, 6, 9], 3.0),
        ([5, 9], 0.1),
        ([5, 6], float("inf")),  # no token differs, one is missing: no rounding does that
        ([5, 6, 7, 8], float("inf")),
    ],
)
def test_the_gap_is_the_references_at_the_first_other_token(served: list[int], gap: float | None) -> None:
    assert gap_at_difference(served, EXPECTED) == gap


def test_only_a_near_tie_is_forgiven_and_only_where_there_is_a_tolerance() -> None:
    outcomes = [outcome(served) for served in ([5, 6, 7], [5, 9, 7], [5, 6, 9], [5, 6])]
    assert match_rate(outcomes) == 0.25
    assert match_rate(outcomes, near_tie(torch.float32)) == 0.25
    assert match_rate(outcomes, near_tie(torch.bfloat16)) == 0.5
    assert [one.near_tie(near_tie(torch.bfloat16)) for one in outcomes] == [False, True, False, False]


def test_tolerances_are_rounding_steps_of_the_type() -> None:
    assert near_tie(torch.float32) == 0.0
    assert near_tie(torch.bfloat16) == 8 * near_tie(torch.float16) == 0.5


def test_the_reference_states_the_gap_at_every_token(model) -> None:
    found = greedy_reference(model.hf, None, [10, 20, 30], 5)
    ids = torch.tensor([[10, 20, 30, *found.tokens[:-1]]])
    with torch.no_grad():
        best = model.hf(ids).logits[0, 2:].topk(2)
    assert best.indices[:, 0].tolist() == found.tokens
    torch.testing.assert_close(
        best.values[:, 0] - best.values[:, 1], torch.tensor(found.gaps), atol=1e-4, rtol=0
    )
    assert found.smallest_gap == min(found.gaps)
