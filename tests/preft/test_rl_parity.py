"""RL parity: arms under one budget, compared row by row, and a stopped comparison that goes on."""

from pathlib import Path
from typing import Any

import pytest

from preft.adapters import AdapterError
from preft.rl import parity
from preft.rl.config import GRPOConfig
from preft.rl.parity import Outcome, ParityConfig, compare, run_pipeline
from preft.rl.pipeline import AdapterRLConfig
from shared.models import ModelConfig
from shared.runs import start_run


def test_differences_are_paired_by_seed_and_row() -> None:
    rows = [0.1, 0.9, 0.5]
    outcomes = [Outcome("b", seed, rows, [r + seed for r in rows], 0.0) for seed in (1, 0)]
    outcomes += [Outcome("a", seed, rows, [r + seed + 0.25 for r in rows], 0.0) for seed in (0, 1)]
    found = compare(outcomes, ["a", "b"])
    assert found["difference"]["a-b"] == pytest.approx((0.25, 0.25, 0.25))
    assert found["reward"]["b"].estimate == pytest.approx(1.0)
    assert found["reward"]["b"].low < 1.0 < found["reward"]["b"].high
    assert found["trainings"] == 4


def test_one_arm_is_no_comparison() -> None:
    with pytest.raises(AdapterError, match="two arms or more"):
        ParityConfig(arms={"lora": parity.ARMS["lora"]})


def test_every_arm_has_one_budget_and_no_training_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grpo = GRPOConfig(steps=2, prompts_per_step=2, num_generations=2, max_completion_length=8)
    rl = AdapterRLConfig(sampler="hf", train_prompts=4, heldout_prompts=2, heldout_samples=2, grpo=grpo)
    config, trained = ParityConfig(rl, seeds=(3,)), list[tuple[str, int]]()
    original = parity.train_arm

    def watched(model: Any, sampler: Any, rows: Any, settings: Any, arm: str, seed: int) -> Outcome:
        if arm == "lora" and len(trained) == 1:
            trained.append(("stopped", seed))
            raise KeyboardInterrupt
        trained.append((arm, seed))
        return original(model, sampler, rows, settings, arm, seed)

    monkeypatch.setattr(parity, "train_arm", watched)
    with pytest.raises(KeyboardInterrupt), start_run(tmp_path / "run", config, seed=5) as run:
        run_pipeline(config, ModelConfig("tinyworld"), run)
    with start_run(tmp_path / "run", config, seed=5) as run:
        result = run_pipeline(config, ModelConfig("tinyworld"), run)
    assert trained == [("lora_p", 8), ("stopped", 8), ("lora", 8)]
    assert result["reward_before"]["lora"] == result["reward_before"]["lora_p"], "a fresh adapter is the base"
