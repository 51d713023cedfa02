"""Training on the transformers Trainer: accumulation, packing, precision, evaluation, checkpoints and resuming."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preft_cases import chats

from preft.adapters import Adapter, AdapterConfig, AdapterError
from preft.evaluate import heldout_loss
from preft.formats import load_adapter
from preft.forward import masked_logits
from preft.train import TrainConfig, Trained, train_adapter
from preft.train.rows import training_rows
from shared.history import History
from shared.models import Model
from shared.serialize import read_json
from shared.tokens import Phase, collate

CONFIGS = [AdapterConfig(rank=4), AdapterConfig("direft", rank=4), AdapterConfig("loreft", rank=4)]
TRAIN = TrainConfig(steps=4, batch_size=5, learning_rate=0.02, warmup_steps=1)


def same(a: Adapter, b: Adapter) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def train(model: Model, config: AdapterConfig, settings: TrainConfig, **kwargs: Any) -> Trained:
    return train_adapter(model.hf, model.tokenizer, chats(8, turns=2), config, settings, **kwargs)


def test_one_step_is_adamw_on_the_mean_over_response_tokens(model: Model) -> None:
    """The Trainer adds nothing to the step: a plain loop gives the same adapter."""
    config, settings = CONFIGS[1], replace(TRAIN, steps=2, batch_size=32, max_grad_norm=0.1)
    trained = train(model, config, settings)
    adapter = Adapter.create(model.hf, config, settings.seed)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    batch = collate(training_rows(model.tokenizer, chats(8, turns=2)), 0)
    assert batch.labels_BT is not None
    losses = []
    for step in range(2):
        logits_NV = masked_logits(model.hf, adapter, batch)[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits_NV, batch.labels_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * settings.rate(step)
        optimizer.step()
        adapter.retract_()
        losses.append(float(loss.detach()))
    model.hf.zero_grad(set_to_none=True)
    assert trained.losses == pytest.approx(losses, rel=1e-5)
    for found, expected in zip(trained.adapter.parameters(), adapter.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_accumulation": 3},
        {"gradient_accumulation": 8},  # more parts than some steps have rows
        {"packing": 96},
        {"packing": 96, "gradient_accumulation": 2, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_parts_and_layout_change_nothing(model: Model, change: dict[str, Any]) -> None:
    plain, other = (train(model, CONFIGS[2], settings) for settings in (TRAIN, replace(TRAIN, **change)))
    assert other.losses == pytest.approx(plain.losses, rel=2e-5)


@pytest.mark.parametrize("config", [*CONFIGS, AdapterConfig(rank=2, history=History.STICKY)], ids=str)
def test_resumed_training_equals_an_unbroken_run_bit_for_bit(
    model: Model, config: AdapterConfig, tmp_path: Path
) -> None:
    settings = replace(TRAIN, save_every=1)
    unbroken = train(model, config, settings, folder=tmp_path / "unbroken")

    class Killed(Exception):
        pass

    def kill(step: int, figures: dict[str, float]) -> None:
        if step == 3:  # after the step, before its checkpoint
            raise Killed

    folder = tmp_path / "resumed"
    with pytest.raises(Killed):
        train(model, config, settings, folder=folder, on_log=kill)
    assert not any(parameter.grad is not None for parameter in model.hf.parameters())
    seen: list[int] = []
    resumed = train(model, config, settings, folder=folder, on_log=lambda step, _: seen.append(step))
    assert seen == [3, 4]
    assert resumed.losses == unbroken.losses
    assert same(resumed.adapter, unbroken.adapter)
    served = load_adapter(folder / "checkpoint-4", model.hf)
    batch = collate(training_rows(model.tokenizer, chats(2)), 0)
    torch.testing.assert_close(
        masked_logits(model.hf, served, batch), masked_logits(model.hf, resumed.adapter, batch)
    )
    assert not (folder / "checkpoint-2").exists(), "old checkpoints are removed"
    assert not list(folder.rglob("model.safetensors")), "the base model is not saved"


def test_other_settings_or_rows_begin_anew(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(TRAIN, steps=2, save_every=1)

    def steps(config: TrainConfig, count: int) -> list[int]:
        seen: list[int] = []
        train_adapter(
            model.hf,
            model.tokenizer,
            chats(count),
            CONFIGS[0],
            config,
            lambda step, _: seen.append(step),
            folder=tmp_path,
        )
        return seen

    assert steps(settings, 4) == [1, 2]
    assert steps(settings, 4) == []
    (tmp_path / "checkpoint-2/complete").unlink()  # as if killed while it was written
    assert steps(settings, 4) == [2]
    assert capsys.readouterr().err == ""
    assert steps(replace(settings, learning_rate=0.01), 4) == [1, 2]
    assert "begins anew (other train); removed: checkpoint-1, checkpoint-2" in capsys.readouterr().err
    assert steps(replace(settings, learning_rate=0.01), 5) == [1, 2]
    assert "(other rows)" in capsys.readouterr().err
    identity = read_json(tmp_path / "training.json")
    assert identity["train"]["learning_rate"] == 0.01
    assert identity["model"] == model.fingerprint
    assert identity["computation"] == {"dtype": "float32", "attention": "sdpa"}
    (tmp_path / "training.json").unlink()
    with pytest.raises(AdapterError, match=r"holds checkpoint-1, but no training\.json"):
        steps(settings, 4)
    assert (tmp_path / "checkpoint-2").exists()


def test_evaluation_is_the_heldout_loss(model: Model) -> None:
    log: list[tuple[int, dict[str, float]]] = []
    held = chats(7, turns=2)
    adapter, _ = train(
        model,
        CONFIGS[0],
        replace(TRAIN, eval_every=2, batch_size=3),
        heldout=held,
        on_log=lambda *entry: log.append(entry),
    )
    found = {step: figures["heldout_loss"] for step, figures in log if "heldout_loss" in figures}
    assert list(found) == [2, 4]
    assert found[4] == pytest.approx(heldout_loss(model.hf, model.tokenizer, adapter, held), rel=1e-5)
    assert [step for step, figures in log if "loss" in figures] == [1, 2, 3, 4]


def test_bf16_runs_the_base_under_autocast_and_keeps_the_adapter_in_float32(model: Model) -> None:
    seen: set[torch.dtype] = set()
    module = model.hf.get_submodule("model.layers.1.mlp.down_proj")
    handle = module.register_forward_hook(lambda _m, _a, output: seen.add(output.dtype))
    try:
        exact, rounded = (train(model, CONFIGS[0], replace(TRAIN, bf16=bf16)) for bf16 in (False, True))
    finally:
        handle.remove()
    assert seen == {torch.float32, torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in rounded.adapter.parameters())
    assert rounded.losses != exact.losses
    assert rounded.losses == pytest.approx(exact.losses, rel=0.02)
    again = train(model, CONFIGS[0], TRAIN)
    assert again.losses == exact.losses, "one run's precision must not stay for the next"


def test_training_leaves_the_random_generators_alone(model: Model) -> None:
    before = torch.get_rng_state()
    train(model, CONFIGS[0], replace(TRAIN, steps=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_settings_and_losses_are_refused(model: Model) -> None:
    with pytest.raises(AdapterError, match="save_every needs a folder"):
        train(model, CONFIGS[0], replace(TRAIN, save_every=1))
    with pytest.raises(AdapterError, match=r"but packing=8: raise it"):
        train(model, CONFIGS[0], replace(TRAIN, packing=8))
    with pytest.raises(AdapterError, match="chat 2: .*must end with an assistant message"):
        bad = [*chats(1), [*chats(1)[0], {"role": "user", "content": "and?"}]]
        train_adapter(model.hf, model.tokenizer, bad, AdapterConfig(history=History.STICKY), TRAIN)
    with pytest.raises(AdapterError, match=r"the loss of step \d is (nan|inf)"):
        train(model, CONFIGS[0], replace(TRAIN, learning_rate=1e30, max_grad_norm=0.0, warmup_steps=0))
    with pytest.raises(AdapterError, match="must be at least 1"):
        TrainConfig(packing=0)


def test_an_adapter_that_ends_without_being_numbers_is_refused(model: Model, tmp_path: Path) -> None:
    """The last step is what spoils it: its loss, of the adapter before, is a number. Nothing is saved."""
    settings = replace(TRAIN, steps=1, save_every=1, learning_rate=1e20, weight_decay=1e20)
    losses: list[float] = []
    with pytest.raises(AdapterError, match="after step 1 the adapter has values that are no numbers"):
        train(
            model,
            CONFIGS[0],
            settings,
            folder=tmp_path,
            on_log=lambda _, figures: losses.append(figures["loss"]),
        )
    assert [math.isfinite(loss) for loss in losses] == [True]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_processes_wait_around_what_all_of_them_write(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is moved into its place by the first process: the others must not write into it before."""
    import accelerate

    found: list[set[str]] = []

    def wait(_: object) -> None:
        found.append({path.name for path in tmp_path.glob("checkpoint-1/*")})

    monkeypatch.setattr(accelerate.Accelerator, "wait_for_everyone", wait)
    train(model, CONFIGS[0], replace(TRAIN, steps=1, save_every=1), folder=tmp_path)
    states, weights = {"rng_state.pth"}, {"adapter_model.safetensors", "adapter_state.safetensors"}
    assert any(weights <= names and not names & states for names in found), "before the states"
    assert any(weights | states <= names and "complete" not in names for names in found), "before the mark"


def test_decode_adapters_train_too(model: Model) -> None:
    for phase in (Phase.DECODE, Phase.DECODE_BOUNDARY):
        losses = train(model, AdapterConfig(rank=4, phase=phase), replace(TRAIN, steps=8)).losses
        assert losses[-1] < losses[0]
