"""Training: gradients reach a prefill-only adapter, the loss falls, the model is untouched, seeds repeat."""

import pytest
import torch
from preft_cases import chats

from preft.adapters import Adapter, AdapterConfig, AdapterError
from preft.evaluate import heldout_loss
from preft.forward import masked_loss
from preft.train import TrainConfig, train_adapter, training_rows
from preft.train.rows import Layout, Parts, schedule
from shared.history import History
from shared.models import Model
from shared.tokens import Phase, collate

CONFIGS = [AdapterConfig(rank=4), AdapterConfig("direft", rank=4), AdapterConfig("loreft", rank=4)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_the_loss_falls_and_the_model_stays(model: Model, config: AdapterConfig) -> None:
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in model.hf.parameters()]
    base = heldout_loss(model.hf, model.tokenizer, None, chats(8))
    train = TrainConfig(steps=12, batch_size=8, learning_rate=0.02)
    adapter, losses = train_adapter(model.hf, model.tokenizer, chats(8), config, train)
    assert len(losses) == 12
    assert heldout_loss(model.hf, model.tokenizer, adapter, chats(8)) < base - 0.5
    assert all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())
    assert [parameter.requires_grad for parameter in model.hf.parameters()] == wanted
    if config.method != "lora":
        for _, delta in adapter.parts():
            torch.testing.assert_close(delta.R_RD @ delta.R_RD.T, torch.eye(4), atol=1e-5, rtol=0)


def test_the_same_seed_trains_the_same_adapter(model: Model) -> None:
    runs = [
        train_adapter(
            model.hf, model.tokenizer, chats(6), CONFIGS[0], TrainConfig(steps=3, batch_size=4, seed=seed)
        )
        for seed in (1, 1, 2)
    ]
    assert runs[0].losses == runs[1].losses != runs[2].losses


@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.ALL])
def test_gradients_are_those_of_finite_differences(model: Model, phase: Phase) -> None:
    """In float64: what reaches the adapter through the prompt's keys and values and the boundary token."""
    hf = type(model.hf)(model.hf.config).eval().double()
    hf.load_state_dict(model.hf.state_dict())
    adapter = Adapter.create(hf, AdapterConfig("direft", rank=2, phase=phase, layers=(0, 1)))
    batch = collate(training_rows(model.tokenizer, chats(2)), 0)
    loss = masked_loss(hf, adapter, batch).total
    gradients = torch.autograd.grad(loss, [delta.b_R for _, delta in adapter.parts()])
    for (_, delta), gradient in zip(adapter.parts(), gradients, strict=True):
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                delta.b_R[0] += step
                losses.append(float(masked_loss(hf, adapter, batch).total))
                delta.b_R[0] -= step
        assert float(gradient[0]) == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=2e-2, abs=1e-3)


def test_recompute_gives_a_row_for_every_turn(model: Model) -> None:
    [chat] = chats(1, turns=3)
    rows = training_rows(model.tokenizer, [chat])
    assert len(rows) == 3
    for row in rows:
        assert all(label == -100 for label in row.labels[: row.prompt_length])
        assert row.labels[row.prompt_length :].count(-100) <= 1  # the template's newline after the turn
        assert not any(row.generated)
    [sticky] = training_rows(model.tokenizer, [chat], History.STICKY)
    learnt = sum(label != -100 for label in sticky.labels)
    assert learnt == sum(label != -100 for row in rows for label in row.labels)
    assert any(sticky.generated)


def test_every_row_comes_once_an_epoch_whatever_the_parts(model: Model) -> None:
    rows = training_rows(model.tokenizer, chats(8))
    steps = schedule(rows, 3, steps=6, seed=0)
    for epoch in (steps[:3], steps[3:]):
        assert sorted(i for step in epoch for i in step) == list(range(8))
    assert steps[:3] != steps[3:]
    for parts in (1, 2, 4):
        items = Parts(rows, steps, Layout(0), parts)
        assert len(items) == 6 * parts
        for step, numbers in enumerate(steps):
            labels = [items[step * parts + i]["labels"] for i in range(parts)]
            learnt = sum(int((label != -100).sum()) for label in labels)
            assert learnt == sum(label != -100 for i in numbers for label in rows[i].labels)


def test_nothing_to_learn_is_refused(model: Model) -> None:
    with pytest.raises(AdapterError, match="no assistant message to learn from"):
        train_adapter(model.hf, model.tokenizer, [], CONFIGS[0])
    with pytest.raises(AdapterError, match="steps and batch_size"):
        TrainConfig(steps=0)
