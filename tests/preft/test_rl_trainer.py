"""The GRPO loop: it learns, continues where it stopped, and refuses to learn from samples of another model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preft_cases import CONFIGS

from preft.adapters import Adapter, AdapterConfig, AdapterError
from preft.cli import main
from preft.rl import GRPOConfig, GRPOTrainer, HFSampler, Row
from shared.generation import Completion, Request, Sampling
from shared.models import Model

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
