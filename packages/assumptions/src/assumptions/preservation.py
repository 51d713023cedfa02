"""What steering costs on the embedded world: moral pairs and claims, answered under each direction's outermost doses.

The verdicts of both sides of every conflict fall into the five cells of `assumptions.moral`, the claims into agreement
with what is true and with what is not (`assumptions.stances`); beside them stand the unedited answers to the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from assumptions.conditions import SteeredEngine, answer, dosed
from assumptions.moral import cells, shares, side_rates, world_pairs, world_verdict_chats
from assumptions.stances import stance_rates, world_stances
from assumptions.steering import Direction, Scope, Unit
from shared.generation import Sampling
from shared.serialize import plain

GREEDY = Sampling(max_tokens=4, logprobs=None)


def preservation(
    engine: SteeredEngine,
    directions: Mapping[str, Direction],
    doses: Sequence[float],
    count: int,
    *,
    unit: Unit = "proj_sd",
    scope: Scope = "all",
    seed: int = 0,
) -> dict[str, Any]:
    """Moral cells and agreement by condition (name@dose), `count` pairs and claims each."""
    conditions = dosed(list(directions.values()), [min(doses), max(doses)], unit, scope)
    pairs, stances = world_pairs(count, seed), world_stances(count, seed)
    verdicts, claims = world_verdict_chats(pairs), [one.chat for one in stances]
    replies = answer(engine, [*verdicts, *claims], conditions, GREEDY, seed=seed)
    found = {}
    for condition in conditions:
        mine = [r for r in replies if (r.direction, r.dose) == (condition.name, condition.dose)]
        found[condition.key] = {
            "moral": plain(shares(cells(pairs, mine), seed)),
            "sides": side_rates(pairs, mine),
            "stances": plain(stance_rates(stances, mine, seed=seed)),
        }
    return found
