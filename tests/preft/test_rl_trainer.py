"""The GRPO loop: it learns, continues where it stopped, and refuses to learn from samples of another model."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preft_cases import CONFIGS, stir

from preft.adapters import Adapter, AdapterConfig, AdapterError
from preft.cli import main
from preft.rl import GRPOConfig, GRPOTrainer, HFSampler, Row
from shared.generation import Completion, Request, Sampling
from shared.models import Model
from shared.tokens import Phase

ROWS = [Row(text) for text in ("abc", "hello there", "1 + 2 =", "x", "what is it", "seven")]
CONFIG = GRPOConfig(
    steps=4,
    prompts_per_step=3,
    num_generations=4,
    max_completion_length=6,
    learning_rate=3e-2,
    warmup_steps=1,
)


def begins_low(text: str, row: Row) -> float:
    """Whether the text begins below code point 96: about half of what a random model of bytes writes."""
    return float(bool(text) and ord(text[0]) < 96)


def trainer(model: Model, adapter: Adapter | AdapterConfig, config: GRPOConfig, **more: Any) -> GRPOTrainer:
    adapter = Adapter.create(model.hf, adapter) if isinstance(adapter, AdapterConfig) else adapter
    sampler = more.pop("sampler", None) or HFSampler(model)
    return GRPOTrainer(model, adapter, sampler, ROWS, more.pop("reward", begins_low), config, **more)


def values(adapter: Adapter) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in adapter.parameters()]


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(rank=4),
        AdapterConfig("loreft", rank=4, phase=Phase.ALL),
    ],
    ids=lambda a: f"{a.method}-{a.phase.value}",
)
def test_the_reward_rises_and_the_model_stays(model: Model, adapter: AdapterConfig) -> None:
    before = [(parameter.clone(), parameter.requires_grad) for parameter in model.hf.parameters()]
    figures: list[dict[str, float]] = []
    config = replace(
        CONFIG, steps=30, prompts_per_step=4, num_generations=12, max_completion_length=2, learning_rate=5e-2
    )
    trained = trainer(model, adapter, config, log=lambda step, **f: figures.append(f)).train()
    first, last = (sum(f["reward"] for f in part) / 5 for part in (figures[:5], figures[-5:]))
    assert last > first + 0.15
    assert max(figure["logprob_gap_max"] for figure in figures) <= config.max_logprob_gap
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    for parameter, (value, wanted) in zip(model.hf.parameters(), before):
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == wanted


@pytest.mark.parametrize("name", ["lora_p_0", "reft_p_1"])
def test_a_stopped_run_continues_bit_for_bit(model: Model, tmp_path: Path, name: str) -> None:
    config = replace(CONFIG, steps=5, checkpoint_every=2, beta=0.05, num_iterations=2)
    whole = trainer(model, CONFIGS[name], config).train()

    class Stopped(Exception):
        """The process dies in step 3, after the checkpoint of two steps."""

    def die(step: int, **_: float) -> None:
        if step == 2:
            raise Stopped

    with pytest.raises(Stopped):
        trainer(model, CONFIGS[name], config, checkpoint=tmp_path / "state", log=die).train()
    again = trainer(model, CONFIGS[name], config, checkpoint=tmp_path / "state")
    assert again.done == 2
    assert all(torch.equal(one, other) for one, other in zip(values(again.train()), values(whole)))
    finished = trainer(model, CONFIGS[name], config, checkpoint=tmp_path / "state")
    assert finished.done == 5
    assert all(torch.equal(one, other) for one, other in zip(values(finished.adapter), values(whole)))


def test_a_checkpoint_of_another_adapter_is_refused(model: Model, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=1)
    trainer(model, AdapterConfig(rank=2), config, checkpoint=tmp_path / "state").train()
    with pytest.raises(AdapterError, match="belongs to another adapter; remove it"):
        trainer(model, AdapterConfig(rank=3), config, checkpoint=tmp_path / "state")


class Shifted(HFSampler):
    """Reports log-probabilities that are not the trainer's."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        answers = super().generate(requests, sampling)
        return [
            [replace(sample, logprobs=[p - 1e-3 for p in sample.logprobs]) for sample in group]
            for group in answers
        ]


def test_samples_of_another_model_are_not_learned_from(model: Model) -> None:
    one = trainer(model, AdapterConfig(rank=2), CONFIG, sampler=Shifted(model))
    before = values(one.adapter)
    with pytest.raises(AdapterError, match=r"step 0: trainer and sampler differ by 1\.\d\de-03 nats"):
        one.train()
    assert all(torch.equal(now, then) for now, then in zip(values(one.adapter), before))
    free = replace(CONFIG, steps=1, max_logprob_gap=None)
    trainer(model, AdapterConfig(rank=2), free, sampler=Shifted(model)).train()


@pytest.mark.parametrize("other", [{"groups_per_forward": 1}, {"share_prompt": False}])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_step_does_not_depend_on_how_it_is_computed(
    model: Model, loss_type: str, other: dict[str, Any]
) -> None:
    """Gradients of one step, before the optimiser scales them."""
    gradients = []
    for settings in ({}, other):
        one = trainer(
            model, AdapterConfig(rank=4), replace(CONFIG, loss_type=loss_type, beta=0.1, **settings)
        )
        parts = one._parts(one.rollout(0))
        for part in parts:
            one._backward(part)
        gradients.append([p.grad for p in one.adapter.parameters()])
    for here, there in zip(*gradients):
        torch.testing.assert_close(here, there, atol=1e-6 + 1e-4 * float(there.abs().max()), rtol=0)


def test_every_row_once_an_epoch(model: Model) -> None:
    one = trainer(model, AdapterConfig(rank=2), CONFIG)
    epochs = [[one._row(epoch * len(ROWS) + i) for i in range(len(ROWS))] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(len(ROWS))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_kl_term_measures_the_distance_to_the_model_without_adapter(model: Model) -> None:
    for adapter, near in (
        (Adapter.create(model.hf, AdapterConfig(rank=4)), True),
        (stir(Adapter.create(model.hf, AdapterConfig(rank=4)), seed=2, size=0.5), False),
    ):
        one = trainer(model, adapter, replace(CONFIG, steps=1, beta=1.0), reward=lambda text, row: 1.0)
        figures = one.step(0)
        assert (figures["kl"] == 0) if near else (figures["kl"] > 0.1)
        assert figures["loss"] == pytest.approx(
            figures["kl"], rel=1e-4
        )  # rewards all alike: nothing else is left


def test_the_command_trains_reports_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = "--sampler hf --steps 2 --prompts-per-step 2 --num-generations 2 --max-completion-length 4"
    command = [
        "rl",
        "--out",
        str(tmp_path),
        *settings.split(),
        "--train-prompts",
        "4",
        "--heldout-prompts",
        "2",
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "held-out reward before:" in printed
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert metrics["logprob_gap_max"] <= 1e-5
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert "Held-out reward" in (tmp_path / "report.html").read_text()
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    written = weights.stat().st_mtime_ns
    assert main(command) == 0
    assert weights.stat().st_mtime_ns == written, "the finished training was done again"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--task chess", "no task named 'chess'"),
        ("--reward best", "no reward named 'best'"),
        ("--data rows.jsonl", "give heldout_data"),
        ("--num-generations 1", "at least 2"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert main(["rl", "--out", str(tmp_path / "run"), *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
