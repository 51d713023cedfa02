"""What the serving benchmark measures: engines, arms (who is served on which engine), scenes and ratios.

A ratio is taken between two arms of one scene, round by round: in a round every arm replays the same prompts, one arm
after the other, in an order drawn anew every round (so that no arm always follows the same one). Its estimate is the
median of the rounds' ratios, its interval a bootstrap over rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from shared.stats import Interval, bootstrap_interval
from shared.tokens import Phase

Value = Literal["tokens_per_s", "decode_step_ms"]


class Engine(NamedTuple):
    """Engine by its LoRA slots; `rank` and `adapters` None: those of the run."""

    slots: int | None = None
    plugin: bool = True
    lora: bool = True
    rank: int | None = None


class Arm(NamedTuple):
    """Requests on an engine: with adapters of a kind and phase, or (kind None) without."""

    engine: str
    kind: Literal["lora", "reft"] | None = None
    phase: Phase = Phase.PREFILL
    rank: int | None = None
    adapters: int | None = None


@dataclass(frozen=True)
class Scene:
    """Arms compared on one trace; `every[arm] = k` measures a slow arm only in every k-th round."""

    name: str
    prompt_tokens: int
    new_tokens: int
    arms: tuple[str, ...]
    minutes: float
    every: tuple[tuple[str, int], ...] = ()

    def arms_of(self, turn: int) -> list[str]:
        """The arms of a round, in its order."""
        skipped = {arm for arm, k in self.every if turn % k}
        arms = [arm for arm in self.arms if arm not in skipped]
        return [arms[i] for i in np.random.default_rng(turn).permutation(len(arms))]


class Ratio(NamedTuple):
    """over / under of a scene, and the figure the project asks for (`floor` for speeds, a ceiling for times)."""

    key: str
    scene: str
    over: str
    under: str
    target: float | None = None
    value: Value = "tokens_per_s"


MANY, FEW = 512, 8
ENGINES = {
    "stock": Engine(plugin=False, lora=False),
    "stock_lora": Engine(plugin=False),
    "plugin": Engine(),
    "rank256": Engine(rank=256),
    "slots8": Engine(slots=FEW),
    "slots512": Engine(slots=MANY),
}
ARMS = {
    "stock": Arm("stock"),
    "base": Arm("plugin"),
    "lora_p": Arm("plugin", "lora"),
    "reft_p": Arm("plugin", "reft"),
    "lora_own": Arm("plugin", "lora", Phase.ALL),
    "reft_own": Arm("plugin", "reft", Phase.ALL),
    "lora_stock": Arm("stock_lora", "lora", Phase.ALL),
    "lora_p_rank256": Arm("rank256", "lora", rank=256),
    "lora_p_8slots": Arm("slots8", "lora", adapters=MANY),
    "lora_p_512slots": Arm("slots512", "lora", adapters=MANY),
}
_RIVALS = (("lora_own", 3), ("reft_own", 3), ("lora_stock", 3))  # their ratios have room, and they are slow
SCENES = (
    Scene(
        "short", 64, 256,
        ("stock", "base", "lora_p", "reft_p", "lora_own", "reft_own", "lora_stock"), 9.0, _RIVALS,
    ),
    Scene("long_prompt", 256, 128, ("base", "lora_p"), 1.5),
    Scene("rank256", 64, 256, ("lora_p", "lora_p_rank256"), 1.5),
    Scene("slots", 64, 256, ("lora_p_8slots", "lora_p_512slots"), 1.5),
)  # fmt: skip
RATIOS = (
    Ratio("lora_p_over_base", "short", "lora_p", "base", 0.97),
    Ratio("reft_p_over_base", "short", "reft_p", "base", 0.98),
    Ratio("lora_p_over_lora", "short", "lora_p", "lora_stock", 2.2),
    Ratio("lora_p_over_base_long_prompt", "long_prompt", "lora_p", "base", 0.90),
    Ratio("base_with_plugin_over_stock", "short", "base", "stock", 0.99),
    Ratio("rank256_over_rank8", "rank256", "lora_p_rank256", "lora_p", 0.95),
    Ratio("slots8_over_resident", "slots", "lora_p_8slots", "lora_p_512slots", 0.95),
    Ratio("decode_step_ratio", "short", "lora_p", "base", 1.02, "decode_step_ms"),
    Ratio("lora_p_over_stock", "short", "lora_p", "stock"),
    Ratio("reft_p_over_stock", "short", "reft_p", "stock"),
    Ratio("lora_p_over_lora_own", "short", "lora_p", "lora_own"),
    Ratio("reft_p_over_reft", "short", "reft_p", "reft_own"),
)
CURVE_ARMS = ("base", "lora_p", "reft_p", "lora_own", "reft_own", "lora_stock")


def curve_scenes(contexts: Sequence[int], new_tokens: int, minutes: float) -> tuple[Scene, ...]:
    """One scene a prompt length, for curves over context length."""
    share = minutes / max(1, len(contexts))
    return tuple(Scene(f"context{n}", n, new_tokens, CURVE_ARMS, share) for n in contexts)


def curve_ratios(contexts: Sequence[int]) -> tuple[Ratio, ...]:
    """The ratios that are drawn over context length."""
    pairs = (
        ("lora_p", "base"),
        ("reft_p", "base"),
        ("lora_p", "lora_stock"),
        ("lora_p", "lora_own"),
        ("reft_p", "reft_own"),
    )
    return tuple(
        Ratio(f"{over}_over_{under}@{n}", f"context{n}", over, under)
        for n in contexts
        for over, under in pairs
    )


def estimate(ratio: Ratio, records: Sequence[dict[str, Any]]) -> tuple[Interval, int] | None:
    """Median of the rounds' ratios with its interval, and the number of rounds; None before the first."""
    values: dict[str, dict[int, float]] = {ratio.over: {}, ratio.under: {}}
    for record in records:
        if record["scene"] == ratio.scene and record["arm"] in values:
            values[record["arm"]][record["round"]] = record[ratio.value]
    both = sorted(set(values[ratio.over]) & set(values[ratio.under]))
    quotients = [values[ratio.over][turn] / values[ratio.under][turn] for turn in both]
    if not quotients:
        return None
    return bootstrap_interval(quotients, statistic=lambda x: np.median(x, axis=-1)), len(quotients)


def reached(ratio: Ratio, value: float) -> bool | None:
    """Whether an estimate meets its target; None where there is none."""
    if ratio.target is None:
        return None
    return value >= ratio.target if ratio.value == "tokens_per_s" else value <= ratio.target
