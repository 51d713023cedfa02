"""The adapter_parity pipeline: does a prefill-only adapter learn as much from rewards as an all-token one?

Arms differ in nothing but the adapter: rows, samples a step, steps and settings are equal, and so are the seeds of a
pair. The figure is the reward of held-out rows; differences are taken row by row between arms of one seed, and their
interval is over rows drawn whole with all their seeds. Each training is kept as it ends: a stopped run goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preft.adapters import Adapter, AdapterConfig, AdapterError
from preft.rl.pipeline import AdapterRLConfig, open_sampler
from preft.rl.rewards import Row, reward_named
from preft.rl.sampler import Sampler
from preft.rl.trainer import GRPOTrainer, evaluate
from shared.generation import Sampling
from shared.models import Model, ModelConfig, load
from shared.report import Report
from shared.runs import Pipeline, Run
from shared.stats import Interval, bootstrap_interval
from shared.tokens import Phase

ARMS = {"lora_p": AdapterConfig(), "lora": AdapterConfig(phase=Phase.ALL)}
LAST = 5  # steps whose samples make an arm's training reward


@dataclass(frozen=True)
class ParityConfig:
    """`rl` says what is trained and how, its own adapter aside; `arms` are the adapters, the first is compared with
    each of the others."""

    rl: AdapterRLConfig = field(default_factory=AdapterRLConfig)
    arms: dict[str, AdapterConfig] = field(default_factory=lambda: dict(ARMS))
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        if len(self.arms) < 2 or not self.seeds:
            raise AdapterError("parity compares two arms or more over one seed or more")


@dataclass(frozen=True)
class Outcome:
    """One training: reward of each held-out row before and after, and the mean of the last steps' samples."""

    arm: str
    seed: int
    before: list[float]
    after: list[float]
    train_reward: float


def train_arm(
    model: Model,
    sampler: Sampler,
    rows: tuple[Sequence[Row], Sequence[Row]],
    config: AdapterRLConfig,
    arm: str,
    seed: int,
) -> Outcome:
    """Train the adapter of `config` on the first rows and judge it on the second, before and after."""
    train, heldout = rows
    grpo = replace(config.grpo, seed=config.grpo.seed + seed)
    adapter, reward = Adapter.create(model.hf, config.adapter, grpo.seed), reward_named(config.reward_name)
    sampling = Sampling(grpo.max_completion_length, grpo.temperature, n=config.heldout_samples)

    def judged() -> list[float]:
        return [mean(row) for row in evaluate(sampler, adapter, heldout, reward, sampling, grpo.seed).rewards]

    before, seen = judged(), []
    trainer = GRPOTrainer(
        model,
        adapter,
        sampler,
        train,
        reward,
        grpo,
        log=lambda step, **figures: seen.append(figures["reward"]),
    )
    trainer.train()
    return Outcome(arm, seed, before, judged(), mean(seen[-LAST:]))


def run_pipeline(config: ParityConfig, model_config: ModelConfig, run: Run) -> dict[str, Any]:
    """Train every arm from every seed under one budget; returns rewards by arm and the differences."""
    model = run.use_model(load(model_config))
    rows = config.rl.rows("train", run.seed), config.rl.rows("test", run.seed)
    largest = max(config.arms.values(), key=lambda adapter: adapter.rank)
    outcomes = []
    with open_sampler(replace(config.rl, adapter=largest), model) as sampler:
        pairs = [(arm, seed) for seed in config.seeds for arm in config.arms]
        for arm, seed in run.progress(pairs, "trainings"):
            settings = replace(config.rl, adapter=config.arms[arm])
            found = run.json_stage(
                f"{arm}-{seed}.json",
                lambda: asdict(train_arm(model, sampler, rows, settings, arm, run.seed + seed)),  # noqa: B023
            )
            outcomes.append(Outcome(**found))
    result = compare(outcomes, list(config.arms))
    write_report(run.report, config, outcomes, result)
    return result


def compare(outcomes: Sequence[Outcome], arms: Sequence[str]) -> dict[str, Any]:
    """Mean held-out reward by arm, and the first arm's less every other's, with intervals over held-out rows."""
    after = {arm: _rewards(outcomes, arm, "after") for arm in arms}
    reference, *others = arms
    return {
        "reward": {arm: _interval(rewards) for arm, rewards in after.items()},
        "reward_before": {arm: _interval(_rewards(outcomes, arm, "before")) for arm in arms},
        "difference": {f"{reference}-{arm}": _interval(after[reference] - after[arm]) for arm in others},
        "trainings": len(outcomes),
    }


def _rewards(outcomes: Sequence[Outcome], arm: str, when: str) -> NDArray[np.float64]:
    """Rewards of one arm, seeds by rows."""
    found = sorted((outcome for outcome in outcomes if outcome.arm == arm), key=lambda outcome: outcome.seed)
    return np.array([getattr(outcome, when) for outcome in found])


def _interval(rewards_SR: NDArray[np.float64]) -> Interval:
    seeds, rows = rewards_SR.shape
    return bootstrap_interval(rewards_SR.ravel(), clusters=np.tile(np.arange(rows), seeds))


def write_report(
    report: Report, config: ParityConfig, outcomes: Sequence[Outcome], result: Mapping[str, Any]
) -> None:
    """Add the comparison to a report."""
    budget = config.rl.grpo
    report.text(
        f"Every arm and seed: {budget.steps} steps of {budget.prompts_per_step} prompts with "
        f"{budget.num_generations} samples, judged on {config.rl.heldout_prompts} held-out prompts. Intervals (95%) "
        "are over held-out prompts, not over seeds."
    )
    report.table(
        [{"arms": name, "difference": _shown(found)} for name, found in result["difference"].items()],
        "Held-out reward of the first arm less another's",
    )
    report.table(
        [
            {
                "arm": outcome.arm,
                "seed": outcome.seed,
                "before": mean(outcome.before),
                "after": mean(outcome.after),
                "samples of the last steps": outcome.train_reward,
            }
            for outcome in outcomes
        ],
        "Rewards of each training",
    )


def _shown(interval: Interval) -> str:
    return f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


PIPELINE = Pipeline("adapter_parity", ParityConfig, run_pipeline)
