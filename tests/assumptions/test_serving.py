"""Steering served by vLLM equals steering in Hugging Face: doses, scopes, clamps and gates, each request its own."""

import pytest
import torch

from assumptions.conditions import UNEDITED, Condition, answer, dosed
from assumptions.dimensions import NAMES
from assumptions.engines import HFEngine, served
from assumptions.features import capture_features
from assumptions.gating import gated
from assumptions.probes import fit_probes
from assumptions.sources import load_messages
from assumptions.splits import group_split
from assumptions.steering import clamp, probe_direction
from shared.generation import Sampling
from shared.models import load

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.slow]


def test_served_replies_are_those_of_hugging_face(tmp_path):
    model = load("tinyworld")
    messages = load_messages("tinyworld", 60, seed=11, columns={})
    features = capture_features(model, messages.chats)
    split, labels = group_split(messages.chats), torch.from_numpy(messages.posterior_BK)
    fitted, _ = fit_probes(features.only(["blocks.1.output"]), labels, NAMES, split, "posterior")
    probe = fitted.probes["validation_seeking"]
    direction = probe_direction(probe)
    asked = split.test[:6]
    chats = [messages.chats[i] for i in asked]
    conditions = [
        Condition(UNEDITED),
        *dosed([direction], [-2.0, 3.0])[1:],
        Condition("late", 3.0, tuple(direction.interventions(3.0, scope="generation"))),
        Condition("early", 3.0, tuple(direction.interventions(3.0, scope="prompt"))),
        Condition("clamp", 0.9, (clamp([probe], [0.9]),)),
    ]
    threshold = float(probe.score(features.rows(asked)).median())
    conditions.append(gated(conditions[1], probe, features.rows(asked), chats, threshold))
    greedy = Sampling(max_tokens=60, logprobs=None)
    expected = answer(HFEngine(model), chats, conditions, greedy)
    with served(model, conditions, tmp_path / "adapters") as engine:
        found = answer(engine, chats, conditions, greedy)
    assert found == expected
    texts = {
        c.key: [r.text for r in expected if (r.direction, r.dose) == (c.name, c.dose)] for c in conditions
    }
    assert texts["clamp@0.9"] != texts["none@0"]
    assert texts["early@3"] != texts["late@3"]
    steered, plain, some = texts[conditions[1].key], texts["none@0"], texts[conditions[-1].key]
    for chat, one, other, mixed in zip(chats, steered, plain, some):
        assert mixed == (one if chat.id in (conditions[-1].only or ()) else other)
