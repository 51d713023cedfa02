"""Verifiable rewards: functions from a completion's text and its row to a number, registered by name.

@reward("is_short")
def is_short(text: str, row: Row) -> float:
    return float(len(text) < 40)
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from preft.adapters import AdapterError
from shared.tokens import Message


@dataclass(frozen=True)
class Row:
    """One task: what is asked, the right answer (for some rewards a pattern), and facts that a reward may look up."""

    prompt: str | list[Message]
    answer: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


Reward: TypeAlias = Callable[[str, Row], float]
REWARDS: dict[str, Reward] = {}


def reward(name: str) -> Callable[[Reward], Reward]:
    """Register a reward function under a name; AdapterError if the name is taken."""

    def register(function: Reward) -> Reward:
        if name in REWARDS:
            raise AdapterError(f"there is a reward named {name!r} already; choose another name")
        REWARDS[name] = function
        return function

    return register


def reward_named(name: str) -> Reward:
    """The reward function of a name; AdapterError lists the known ones."""
    if name not in REWARDS:
        raise AdapterError(f"no reward named {name!r}; known are {', '.join(sorted(REWARDS))}")
    return REWARDS[name]


@reward("exact_match")
def exact_match(text: str, row: Row) -> float:
    """1 if the completion is the answer, white space around both aside."""
    return float(text.strip() == row.answer.strip())


@reward("answers_first")
def answers_first(text: str, row: Row) -> float:
    """1 if the completion begins with the answer as a whole word or number: for models that go on talking."""
    return float(re.match(rf"\s*{re.escape(row.answer.strip())}(?!\w)", text) is not None)


@reward("pattern")
def pattern(text: str, row: Row) -> float:
    """1 if the completion, without white space around it, matches the row's answer as a regular expression."""
    return float(re.fullmatch(row.answer, text.strip(), re.DOTALL) is not None)


@reward("valid_json")
def valid_json(text: str, row: Row) -> float:
    """1 if the completion is JSON, and has the keys listed in the row's facts under "keys" (if any)."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return 0.0
    keys = row.facts.get("keys", ())
    return float(not keys or (isinstance(value, dict) and set(keys) <= set(value)))


@reward("user_style")
def user_style(text: str, row: Row) -> float:
    """Share of a TinyWorld user's wishes that an answer meets: greeting, answer, level of detail, sign-off.

    The answer counts if it is in the user's units and words; facts as `preft.rl.tasks.user_rows` gives them.
    """
    facts, text = row.facts, text.strip()
    met = (
        text.startswith(facts["greeting"]),
        facts["sentence"] in text,
        (facts["more"] in text) == (facts["detail"] == "full"),
        text.endswith(facts["sign_off"]),
    )
    return sum(met) / len(met)
