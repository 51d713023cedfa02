"""Mediation where the truth is known: how much of a push goes through one latent follows from the world's own rule.

A push along two planted directions moves two latents. What it does to the replies through the first alone is known:
shift the first alone (`social.WEIGHTS`). The stated score of the first is the mediator.

On the embedded model the shares come out lower than the truth where all goes through the mediator: its replies do not
repeat, message by message, how far its scores move. A share is a lower bound there, and none where nothing is mediated.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from assumptions.chats import Chat
from assumptions.dimensions import NAMES
from assumptions.forced import forced_scores
from assumptions.instruments import instrument
from assumptions.mediation import mediate
from assumptions.truth import planted_in
from shared.interventions import Add
from shared.models import load
from shared.tinyworld import social
from shared.tinyworld.examiner import Examiner

DELTAS = (-0.6, -0.3, 0.0, 0.3, 0.6)


class Case(NamedTuple):
    """Signs of the push by dimension, the first of which is the mediator, and the outcome looked at."""

    push: dict[str, int]
    outcome: str


CASES = (
    Case({"validation_seeking": 1}, "validation"),
    Case({"objectivity_seeking": 1}, "indirectness"),
    Case({"objectivity_seeking": -1, "user_rightness": 1}, "framing"),
    Case({"emotional_support": 1, "validation_seeking": 1}, "validation"),
    Case({"social_companionship": 1, "user_rightness": 1}, "framing"),  # no weight: nothing goes through it
)


def shift(case, delta, of_first_alone=False):
    """The shift of the nine latents."""
    shifts = np.zeros(9)
    for number, (name, sign) in enumerate(case.push.items()):
        if number == 0 or not of_first_alone:
            shifts[social.DIMENSIONS.index(name)] = sign * delta
    return shifts


def slope(values):
    return np.polyfit(DELTAS, values, 1)[0]


def by_the_rule(case, counts):
    """The world's own expectations: stated score of the mediator and reply's outcome, each by dose and message."""
    mediator = social.DIMENSIONS.index(next(iter(case.push)))
    stated = [(social.score_probabilities(counts, shift(case, d)) @ social.GRID)[:, mediator] for d in DELTAS]
    outcome = social.OUTCOMES.index(case.outcome)
    replies = [social.expected_reply_probabilities(counts, shift(case, d))[:, outcome] for d in DELTAS]
    return np.array(stated), np.array(replies)


def true_share(case, counts):
    """Effect of shifting the mediator's latent alone over that of the whole push."""
    outcome = social.OUTCOMES.index(case.outcome)
    alone, whole = (
        [social.expected_reply_probabilities(counts, shift(case, d, only))[:, outcome].mean() for d in DELTAS]
        for only in (True, False)
    )
    return slope(alone) / slope(whole)


def estimated(stated_MB, replies_MB):
    n_messages = stated_MB.shape[1]
    names = [str(i) for _ in DELTAS for i in range(n_messages)]
    dose = np.repeat(DELTAS, n_messages)
    return mediate(names, dose, stated_MB.ravel(), replies_MB.ravel(), resamples=100)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "+".join(case.push))
def test_the_share_is_that_of_the_rule(case):
    """Over 400 messages within 0.12 of the truth, which a linear effect of the dose misses by up to 0.25."""
    counts = np.stack([turn.counts_9 for turn in social.sample_turns(400, seed=0)])
    found = estimated(*by_the_rule(case, counts))
    assert found.share.estimate == pytest.approx(true_share(case, counts), abs=0.12)
    assert found.total.estimate == pytest.approx(found.direct.estimate + found.indirect.estimate)


def test_on_the_embedded_model_a_share_is_found_where_the_rule_has_one_and_none_where_it_has_none():
    """Pushed along planted directions: total effects are the rule's; a whole share is seen, half and none are found."""
    model, planted = load("tinyworld"), planted_in("tinyworld")
    turns = social.sample_turns(24, seed=1)
    chats = [Chat(str(i), turn.text) for i, turn in enumerate(turns)]
    counts = np.stack([turn.counts_9 for turn in turns])
    examiner = Examiner(
        model.hf, model.tokenizer, planted.directions_KD.float(), planted.block, planted.scale
    )
    found = []
    for case in (CASES[0], CASES[2], CASES[4]):
        signs_K = torch.tensor([float(case.push.get(name, 0)) for name in NAMES], dtype=torch.float64)
        unit_D = (signs_K @ planted.directions_KD).float()
        stated, replies = [], []
        for delta in DELTAS:
            push_D = planted.scale * delta * unit_D
            edit = Add(f"blocks.{planted.block}.output", push_D, 1.0)
            scores_BK = forced_scores(model, instrument("tinyworld_nine"), chats, [edit])
            stated.append(scores_BK[:, NAMES.index(next(iter(case.push)))])
            outcome = social.OUTCOMES.index(case.outcome)
            replies.append(examiner.reply_expectations(turns, push_D)[:, outcome])
        one = estimated(np.array(stated), np.array(replies))
        ideal = estimated(*by_the_rule(case, counts))
        assert one.total.estimate == pytest.approx(ideal.total.estimate, rel=0.15)
        found.append(one.share)
    whole, half, nothing = found
    assert 0.4 < whole.low < whole.estimate < 1.1
    assert half.low <= true_share(CASES[2], counts) <= half.high
    assert nothing.low <= 0 <= nothing.high
    assert abs(nothing.estimate) < 0.2
