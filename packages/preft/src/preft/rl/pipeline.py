"""The adapter_rl pipeline: rows of a task -> GRPO with rollouts in vLLM or Hugging Face -> adapter, curves, report.

1. Held-out reward of the fresh adapter, which is the base model's.
2. GRPO (`preft.rl.trainer`), with a checkpoint in the run folder from which a stopped run continues.
3. Held-out reward of the trained adapter; the adapter itself as a folder that vLLM with this package's plugin serves.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

from preft.adapters import Adapter, AdapterConfig, AdapterError
from preft.formats import save_adapter
from preft.rl.config import GRPOConfig
from preft.rl.pages import write_pages
from preft.rl.rewards import Reward, Row, reward_named
from preft.rl.sampler import HFSampler, Sampler, VLLMSampler
from preft.rl.tasks import file_rows, task_named
from preft.rl.trainer import GRPOTrainer, evaluate
from shared.generation import Sampling
from shared.history import History
from shared.models import Model, ModelConfig, load
from shared.runs import Pipeline, Run
from shared.serialize import read_json, write_json

SAMPLERS = ("vllm", "hf")
SHOWN = 3  # held-out answers in the report


@dataclass(frozen=True)
class AdapterRLConfig:
    """Task, adapter and training.

    `task` is a name of `preft.rl.tasks`; with `data`, a JSONL or CSV file, the rows come from there, and `heldout_data`
    and `reward` must be given. `reward` None is the task's own. `sampler` "vllm" or "hf"; `engine` holds further
    arguments of vllm.LLM.
    """

    task: str = "user"
    data: str | None = None
    heldout_data: str | None = None
    reward: str | None = None
    train_prompts: int = 200
    heldout_prompts: int = 40
    heldout_samples: int = 4
    sampler: str = "vllm"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    engine: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise AdapterError(f"sampler {self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        if self.data is None:
            task_named(self.task)
        elif self.heldout_data is None or self.reward is None:
            raise AdapterError(
                "with a data file give heldout_data (another file) and reward (a name) as well"
            )
        reward_named(self.reward_name)
        if self.adapter.history is not History.RECOMPUTE:
            raise AdapterError("adapter.history: a rollout's prompt is one prompt; set it to recompute")
        if min(self.train_prompts, self.heldout_prompts, self.heldout_samples) < 1:
            raise AdapterError("train_prompts, heldout_prompts and heldout_samples must be at least 1")

    @property
    def reward_name(self) -> str:
        """The reward asked for, or the task's."""
        return self.reward or task_named(self.task).reward

    def rows(self, split: str, seed: int) -> list[Row]:
        """The rows of a split."""
        n = self.train_prompts if split == "train" else self.heldout_prompts
        if self.data is None:
            return task_named(self.task).rows(split, n, seed)
        return file_rows(self.data if split == "train" else self.heldout_data or "")[:n]


@contextmanager
def open_sampler(config: AdapterRLConfig, model: Model) -> Iterator[Sampler]:
    """The sampler of the settings; vLLM computes in the model's own type."""
    if config.sampler == "hf":
        yield HFSampler(model)
        return
    from shared.generation.vllm_arguments import lora_rank
    from shared.generation.vllm_engine import VLLMGenerator

    # Two slots and three places: a new version is loaded while requests may still hold the old one. Whole prompts: on a
    # CPU vLLM 0.32 fails at a seeded request whose prompt is cut in chunks (it winds back a generator that cannot be).
    engine: dict[str, Any] = {
        "enable_lora": True,
        "max_loras": 2,
        "max_cpu_loras": 3,
        "disable_log_stats": True,
    }
    engine |= {
        "enable_chunked_prefill": False,
        "max_lora_rank": lora_rank(config.adapter.rank),
    } | config.engine
    served = replace(model.config, dtype=str(model.dtype).removeprefix("torch."))
    with VLLMGenerator(served, **engine) as generator:
        yield VLLMSampler(generator)


def train_adapter_rl(model: Model, sampler: Sampler, config: AdapterRLConfig, run: Run) -> dict[str, Any]:
    """Train one adapter and save it; returns held-out rewards before and after and the figures of every step."""
    reward = reward_named(config.reward_name)
    train, heldout = config.rows("train", run.seed), config.rows("test", run.seed)
    adapter = Adapter.create(model.hf, config.adapter, config.grpo.seed)
    before = run.json_stage("heldout_before.json", lambda: judge(sampler, adapter, heldout, reward, config))
    trainer = GRPOTrainer(
        model,
        adapter,
        sampler,
        train,
        reward,
        config.grpo,
        checkpoint=run.path(f"checkpoint-{run.key}.safetensors"),
        log=run.log,
    )
    trainer.train()
    save_adapter(adapter, run.path("adapter"), model.config.name, model.fingerprint)
    after = judge(sampler, adapter, heldout, reward, config)
    lines = run.path("metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {"before": before, "after": after, "steps": [json.loads(line) for line in lines]}


def judge(
    sampler: Sampler, adapter: Adapter, rows: list[Row], reward: Reward, config: AdapterRLConfig
) -> dict[str, Any]:
    """Mean reward on held-out rows, sampled as in training and greedy, and the first greedy answers."""
    grpo = config.grpo
    sampling = Sampling(grpo.max_completion_length, grpo.temperature, n=config.heldout_samples)
    sampled = evaluate(sampler, adapter, rows, reward, sampling, grpo.seed)
    greedy = evaluate(sampler, adapter, rows, reward, Sampling(grpo.max_completion_length), grpo.seed)
    return {"sampled": sampled.reward, "greedy": greedy.reward, "answers": greedy.texts[:SHOWN]}


def run_pipeline(config: AdapterRLConfig, model_config: ModelConfig, run: Run) -> dict[str, Any]:
    """Run the pipeline in its folder; returns held-out rewards before and after, the curve's ends, and agreement."""
    config = replace(config, grpo=replace(config.grpo, seed=config.grpo.seed + run.seed))
    for split in ("train", "test"):
        config.rows(split, run.seed)  # a fault in a file is told before the model is loaded
    model = run.use_model(load(model_config))
    stage = run.stage("rl.json")
    if not stage.done:
        with open_sampler(config, model) as sampler, stage as path:
            write_json(path, train_adapter_rl(model, sampler, config, run))
    result = read_json(stage.path)
    write_pages(run.report, config, result, config.rows("test", run.seed)[:SHOWN])
    return summary(result)


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of a finished training: means over the first and the last five steps where not said otherwise."""
    steps = result["steps"]
    return {
        "reward_first": mean(step["reward"] for step in steps[:5]),
        "reward_last": mean(step["reward"] for step in steps[-5:]),
        "heldout_reward": {
            when: {how: result[when][how] for how in ("sampled", "greedy")} for when in ("before", "after")
        },
        "logprob_gap_max": max(step["logprob_gap_max"] for step in steps),
        "logprob_gap_mean": mean(step["logprob_gap_mean"] for step in steps),
        "steps": len(steps),
        "seconds_a_step": mean(step["rollout_seconds"] + step["learn_seconds"] for step in steps),
    }


PIPELINE = Pipeline("adapter_rl", AdapterRLConfig, run_pipeline)
