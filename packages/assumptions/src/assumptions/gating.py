"""Gated steering: the probe reads a message first, and the edits act only where its score passes a threshold.

An edit that is always on corrects also where nothing is wrong; gated by what the probe reads, it leaves the other
messages bit for bit as they are. The gate is decided once a request, from the prompt, so that an engine serves it by
naming an adapter or none.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from assumptions.chats import Chat
from assumptions.conditions import Condition
from assumptions.features import Features
from assumptions.probes import Probe
from assumptions.splits import row_hash
from shared.errors import UserError


def gated(
    condition: Condition,
    probe: Probe,
    features: Features,
    chats: Sequence[Chat],
    threshold: float,
    side: Literal["above", "below"] = "above",
) -> Condition:
    """The condition with its edits on the chats whose score, read by the probe, lies on one side of the threshold.

    `features` are those of the chats, in order; UserError where they were read from others.
    """
    if features.row_hashes != tuple(row_hash(chat) for chat in chats):
        raise UserError("the gate's features were read from other chats; capture them from these")
    scores_B = probe.score(features)
    passing = scores_B > threshold if side == "above" else scores_B < threshold
    only = frozenset(chat.id for chat, passes in zip(chats, passing.tolist(), strict=True) if passes)
    return replace(condition, name=f"{condition.name}.gated", only=only)
