"""GRPO on an adapter: sample, judge, check, learn (digest, section 1.3).

One step:

1. The sampler gets the adapter as it is now (vLLM: the next version, pushed in memory) and draws G samples for each of
   N prompts, with their log-probabilities.
2. The reward function judges every sample's text; advantages compare it with its group.
3. The trainer computes the same tokens' log-probabilities itself, with the same phase mask. They must be those of the
   sampler (`max_logprob_gap`), or the ratio of the objective would compare two models; the run stops before it learns
   from a step where they are not.
4. `num_iterations` optimiser steps on the clipped objective (`preft.rl.loss`), in forward passes of a few groups each.

Prompts and sampling seeds are functions of (seed, step), so a run that continues from a checkpoint takes the steps it
would have taken. trl's GRPOTrainer is not the base of this: it knows adapters as peft's modules only, takes its base
model's log-probabilities from a second copy of the model, and shuffles the samples of a prompt apart, which a shared
prompt cannot be. Its objective is the reference in the tests.
"""

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from preft.adapters import Adapter, AdapterError
from preft.rl.checkpoint import load_checkpoint, save_checkpoint
from preft.rl.config import GRPOConfig
from preft.rl.logprobs import Group, TokenLogprobs, completion_logprobs, pad_completions
from preft.rl.loss import PolicyLoss, advantages, policy_loss, sample_weights
from preft.rl.rewards import Reward, Row
from preft.rl.sampler import Sampler
from preft.train.module import frozen
from shared.generation import Completion, Request, Sampling
from shared.generation.prompts import prompt_ids
from shared.models import Model


@dataclass(frozen=True)
class Rollout:
    """The samples of one step, group by group, and their rewards."""

    groups: list[Group]
    completions: list[list[Completion]]
    rewards_NG: Tensor


class GRPOTrainer:
    """Trains `adapter` in place; `log(step, **figures)` is called after every step.

    With `checkpoint`, a file, the state is written there every `checkpoint_every` steps and after the last, and a
    trainer made anew with the same arguments continues from it.
    """

    def __init__(
        self,
        model: Model,
        adapter: Adapter,
        sampler: Sampler,
        rows: Sequence[Row],
        reward: Reward,
        config: GRPOConfig,
        checkpoint: Path | None = None,
        log: Callable[..., None] | None = None,
    ) -> None:
        if not rows:
            raise AdapterError("there are no rows to train on")
        self.model, self.adapter, self.sampler, self.reward = model, adapter, sampler, reward
        self.rows, self.config, self.checkpoint, self.log = rows, config, checkpoint, log
        self.prompts = [prompt_ids(model.tokenizer, row.prompt) for row in rows]
        self.pad_id: int = model.tokenizer.pad_token_id or 0
        adapter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.learning_rate, weight_decay=0.0)
        self.done = 0
        if checkpoint is not None and checkpoint.exists():
            self.done = load_checkpoint(checkpoint, adapter, self.optimizer)

    def train(self) -> Adapter:
        """Take the steps that are left; returns the adapter, frozen."""
        with frozen(self.model.hf):
            for step in range(self.done, self.config.steps):
                figures = self.step(step)
                self.done = step + 1
                if self.log is not None:
                    self.log(step, **figures)
                last = self.done == self.config.steps
                if self.checkpoint is not None and (last or self.done % self.config.checkpoint_every == 0):
                    save_checkpoint(self.checkpoint, self.adapter, self.optimizer, self.done)
        return self.adapter.requires_grad_(False)

    def step(self, step: int) -> dict[str, float]:
        """One step; returns its figures. AdapterError where sampler and trainer disagree."""
        started = time.perf_counter()
        rollout = self.rollout(step)
        sampled = time.perf_counter()
        figures = self.learn(rollout, step)
        lengths = [len(c) for group in rollout.groups for c in group.completions]
        return {
            "reward": float(rollout.rewards_NG.mean()),
            "reward_std": float(rollout.rewards_NG.std(1).mean()),
            "groups_alike": float((rollout.rewards_NG.std(1) == 0).float().mean()),
            "completion_length": float(mean(lengths)),
            **figures,
            "rollout_seconds": sampled - started,
            "learn_seconds": time.perf_counter() - sampled,
        }

    def rollout(self, step: int) -> Rollout:
        """Sample the step's prompts under the adapter as it is, and judge the samples."""
        config = self.config
        self.sampler.update(self.adapter)
        chosen = [self._row(step * config.prompts_per_step + i) for i in range(config.prompts_per_step)]
        requests = [
            Request(self.prompts[row], seed=stable_seed(config.seed, step, place))
            for place, row in enumerate(chosen)
        ]
        sampling = Sampling(config.max_completion_length, config.temperature, n=config.num_generations)
        completions = self.sampler.generate(requests, sampling)
        rewards_NG = torch.tensor(
            [[self.reward(c.text, self.rows[row]) for c in group] for row, group in zip(chosen, completions)],
            dtype=torch.float32,
        )
        groups = [
            Group(self.prompts[row], [c.token_ids for c in group]) for row, group in zip(chosen, completions)
        ]
        return Rollout(groups, completions, rewards_NG)

    def _row(self, draw: int) -> int:
        """The row of the draw-th prompt of the run: every row once an epoch, in a new seeded order each."""
        epoch, place = divmod(draw, len(self.rows))
        return random.Random(f"{self.config.seed}/{epoch}").sample(range(len(self.rows)), len(self.rows))[
            place
        ]

    def learn(self, rollout: Rollout, step: int) -> dict[str, float]:
        """The optimiser steps on one rollout; returns loss, KL, clipping, gradient norm and agreement."""
        parts = self._parts(rollout)
        tokens = sum(int(part.mask_SC.sum()) for part in parts)
        figures: dict[str, float] = {}
        for _ in range(self.config.num_iterations):
            self.optimizer.zero_grad(set_to_none=True)
            losses = [self._backward(part) for part in parts]
            if not figures:
                figures = self._agreement(parts, step)
            figures |= {
                "loss": sum(float(one.loss.detach()) for one in losses),
                "clip_ratio": sum(float(one.clipped) for one in losses) / tokens,
                "grad_norm": self._update(step),
            }
            if self.config.beta:
                figures["kl"] = sum(float(one.kl) for one in losses) / tokens
        return figures

    def _parts(self, rollout: Rollout) -> list["Part"]:
        """The rollout cut into forward passes; advantages and weights are those of the whole step."""
        config, device = self.config, self.model.device
        advantages_NG = advantages(rollout.rewards_NG, config.scale_rewards)
        lengths_S = torch.tensor([len(c) for group in rollout.groups for c in group.completions])
        weights_NG = sample_weights(lengths_S, config).view_as(advantages_NG)
        parts = []
        for start in range(0, len(rollout.groups), config.groups_per_forward):
            span = slice(start, start + config.groups_per_forward)
            samples = [sample for group in rollout.completions[span] for sample in group]
            mask_SC = pad_completions([s.token_ids for s in samples], self.pad_id, device).mask_SC
            sampled_SC = torch.zeros(mask_SC.shape, device=device)
            sampled_SC[mask_SC] = torch.tensor([p for s in samples for p in s.logprobs], device=device)
            rows = (advantages_NG[span].flatten().to(device), weights_NG[span].flatten().to(device))
            parts.append(Part(rollout.groups[span], mask_SC, sampled_SC, *rows))
        return parts

    def _backward(self, part: "Part") -> PolicyLoss:
        """Add the part's gradient; the first time, keep the log-probabilities before any update."""
        found = self._logprobs(part, self.adapter)
        if part.old_SC is None:
            part.old_SC = found.tempered_SC.detach()
            part.gaps_K = (found.raw_SC - part.sampled_SC)[part.mask_SC].abs()
            if self.config.beta:
                with torch.no_grad():
                    part.base_SC = self._logprobs(part, None).tempered_SC
        result = policy_loss(
            found.tempered_SC,
            part.old_SC,
            part.base_SC,
            part.advantages_S,
            part.weights_S,
            part.mask_SC,
            self.config,
        )
        result.loss.backward()
        return result

    def _logprobs(self, part: "Part", adapter: Adapter | None) -> TokenLogprobs:
        config = self.config
        return completion_logprobs(
            self.model.hf, adapter, part.groups, self.pad_id, config.temperature, config.share_prompt
        )

    def _agreement(self, parts: list["Part"], step: int) -> dict[str, float]:
        """Largest and mean difference to the sampler's log-probabilities; AdapterError above the limit."""
        gaps_K = torch.cat([part.gaps_K for part in parts])
        largest, limit = float(gaps_K.max()), self.config.max_logprob_gap
        if limit is not None and not largest <= limit:
            raise AdapterError(
                f"step {step}: trainer and sampler differ by {largest:.2e} nats on a generated token, more than "
                f"max_logprob_gap={limit:.0e}. In float32 that is a defect of one of them; in half precision set "
                "max_logprob_gap to what rounding costs there, or to null"
            )
        return {"logprob_gap_max": largest, "logprob_gap_mean": float(gaps_K.mean())}

    def _update(self, step: int) -> float:
        """One optimiser step with linear warm-up; returns the gradient's norm before clipping."""
        config = self.config
        rate = config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        limit = config.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.adapter.parameters(), limit)
        self.optimizer.step()
        self.adapter.retract_()
        return float(norm)


@dataclass
class Part:
    """The groups of one forward pass, row by row of their samples; the last three are filled by the first pass."""

    groups: list[Group]
    mask_SC: Tensor
    sampled_SC: Tensor
    advantages_S: Tensor
    weights_S: Tensor
    old_SC: Tensor | None = None
    base_SC: Tensor | None = None
    gaps_K: Tensor = field(default_factory=lambda: torch.zeros(0))


def stable_seed(*parts: int) -> int:
    """A sampling seed in [0, 2**31) that depends on the numbers alone."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


class Evaluation(NamedTuple):
    """The rewards of every row's samples, and the text of its first one."""

    rewards: list[list[float]]
    texts: list[str]

    @property
    def reward(self) -> float:
        """Mean over all samples."""
        return mean(reward for row in self.rewards for reward in row)


def evaluate(
    sampler: Sampler, adapter: Adapter, rows: Sequence[Row], reward: Reward, sampling: Sampling, seed: int = 0
) -> Evaluation:
    """Judge an adapter's samples on these rows."""
    sampler.update(adapter)
    requests = [Request(row.prompt, seed=stable_seed(seed, place)) for place, row in enumerate(rows)]
    answers = sampler.generate(requests, sampling)
    rewards = [[reward(sample.text, row) for sample in samples] for row, samples in zip(rows, answers)]
    return Evaluation(rewards, [samples[0].text for samples in answers])
