"""Does a prefill-only adapter learn as much from rewards as an all-token one? The same budget for every arm and seed.

Arms differ in nothing but the adapter: rows, samples a step, steps and settings are equal, and so are the seeds of a
pair. The figure is held-out reward; its spread is over seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from preft.adapters import Adapter, AdapterConfig
from preft.rl.config import GRPOConfig
from preft.rl.rewards import Reward, Row
from preft.rl.sampler import Sampler
from preft.rl.trainer import GRPOTrainer, evaluate
from shared.generation import Sampling
from shared.models import Model
from shared.tokens import Phase

ARMS = {"lora_p": AdapterConfig(), "lora": AdapterConfig(phase=Phase.ALL)}


class Outcome(NamedTuple):
    """One training: mean reward on the held-out rows before and after, and of the last five steps' samples."""

    arm: str
    seed: int
    before: float
    after: float
    train_reward: float


def compare_arms(
    model: Model,
    sampler: Sampler,
    train: Sequence[Row],
    heldout: Sequence[Row],
    reward: Reward,
    config: GRPOConfig,
    arms: Mapping[str, AdapterConfig] = ARMS,
    seeds: Sequence[int] = (0, 1, 2),
    heldout_samples: int = 4,
) -> list[Outcome]:
    """Train every arm from every seed under one budget; one outcome each, arms of a seed side by side.

    `sampler` must be able to serve the highest rank among the arms.
    """
    sampling = Sampling(config.max_completion_length, config.temperature, n=heldout_samples)
    outcomes = []
    for seed in seeds:
        for arm, adapter_config in arms.items():
            seeded = replace(config, seed=config.seed + seed)
            adapter = Adapter.create(model.hf, adapter_config, seeded.seed)
            before = evaluate(sampler, adapter, heldout, reward, sampling, seed).reward
            rewards: list[float] = []
            GRPOTrainer(
                model,
                adapter,
                sampler,
                train,
                reward,
                seeded,
                log=lambda step, rewards=rewards, **figures: rewards.append(figures["reward"]),
            ).train()
            after = evaluate(sampler, adapter, heldout, reward, sampling, seed).reward
            last = rewards[-5:]
            outcomes.append(Outcome(arm, seed, before, after, sum(last) / len(last)))
    return outcomes
