"""Base and adapter as one module: its loss, gradients under checkpointing, and a base model that is left as it was."""

from dataclasses import replace

import pytest
import torch
from preft_cases import prompt, stir

from preft.adapters import Adapter, AdapterConfig
from preft.forward import masked_logits, masked_loss, targets
from preft.train.module import AdaptedModel, inputs_of
from shared.models import Model
from shared.random_models import random_model
from shared.tokens import Phase, TokenBatch, TrainingRow, collate, pack

METHODS = [AdapterConfig(rank=4), AdapterConfig("direft", rank=4), AdapterConfig("loreft", rank=4)]


def rows(lengths: list[tuple[int, int]]) -> list[TrainingRow]:
    """Rows of (prompt, total) tokens; all but the prompt is learnt."""
    found = []
    for i, (n, total) in enumerate(lengths):
        ids = list(prompt(total, i))
        found.append(TrainingRow(ids, [-100] * n + ids[n:], n, [False] * total))
    return found


def batch() -> TokenBatch:
    return collate(rows([(5, 9), (3, 12)]), 0)


def gradients(adapted: AdaptedModel, batches: list[TokenBatch], checkpointing: bool) -> list[torch.Tensor]:
    """Gradients of the sum of the batches' losses, all forward passes before the backward pass."""
    parameters = list(adapted.adapter.requires_grad_(True).parameters())
    with adapted.held(checkpointing):
        loss = sum(adapted(**inputs_of(b))["loss"] for b in batches)
        return list(torch.autograd.grad(loss, parameters))


def test_the_loss_is_the_masked_loss(model: Model) -> None:
    adapter = stir(Adapter.create(model.hf, METHODS[0]), seed=1)
    expected = masked_loss(model.hf, adapter, batch())
    adapted = AdaptedModel(model.hf, adapter)
    assert torch.equal(adapted(**inputs_of(batch()))["loss"], expected.total / expected.tokens)
    assert torch.equal(adapted(**inputs_of(batch()), num_items_in_batch=7)["loss"], expected.total / 7)
    assert int((inputs_of(batch())["labels"] != -100).sum()) == expected.tokens


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt_neox", "gpt2"])
def test_the_loss_needs_the_labelled_columns_only(family: str) -> None:
    """The same as from all logits; nothing, with a gradient of zero, where no token is labelled."""
    hf, _ = random_model(family)
    adapter = stir(Adapter.create(hf.eval(), METHODS[0]), seed=9).requires_grad_(True)
    made = batch()
    logits_BTV, labels_BT = masked_logits(hf, adapter, made)[:, :-1], targets(made)[:, 1:]
    expected = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="sum"
    )
    torch.testing.assert_close(masked_loss(hf, adapter, made).total, expected, atol=1e-3, rtol=1e-5)
    silent = masked_loss(hf, adapter, replace(made, labels_BT=torch.full_like(made.input_ids_BT, -100)))
    assert (float(silent.total.detach()), silent.tokens) == (0.0, 0)
    assert not any(bool(g.any()) for g in torch.autograd.grad(silent.total, list(adapter.parameters())))


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
def test_checkpointing_changes_no_gradient(model: Model, config: AdapterConfig, phase: Phase) -> None:
    """Also with a second forward pass, of another mask, between a forward pass and its recomputation."""
    adapter = stir(Adapter.create(model.hf, replace(config, phase=phase)), seed=2)
    adapted = AdaptedModel(model.hf, adapter)
    batches = [batch(), collate(rows([(2, 6), (9, 12)]), 0), pack(rows([(2, 6), (3, 7)]), 0, 16)]
    plain = gradients(adapted, batches, checkpointing=False)
    again = gradients(adapted, batches, checkpointing=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(bool(gradient.any()) for gradient in plain)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3"])
def test_checkpointing_in_other_families_runs_no_dropout(family: str) -> None:
    hf, _ = random_model(family)
    adapter = stir(Adapter.create(hf.eval(), AdapterConfig(rank=2)), seed=3)
    adapted = AdaptedModel(hf, adapter).train()
    plain = gradients(adapted, [batch()], checkpointing=False)
    again = gradients(adapted, [batch()], checkpointing=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_checkpointing_saves_activations(model: Model) -> None:
    """Fewer bytes are kept for the backward pass: the blocks' insides are computed anew."""

    def kept(checkpointing: bool) -> int:
        sizes: dict[int, int] = {}

        def pack_tensor(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        adapted = AdaptedModel(model.hf, Adapter.create(model.hf, AdapterConfig(rank=4)))
        with adapted.held(checkpointing), torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda t: t):
            adapted(**inputs_of(batch()))
        return sum(sizes.values())

    assert kept(True) < 0.5 * kept(False)


def test_the_model_is_left_as_it_was(model: Model) -> None:
    wanted = [parameter.requires_grad for parameter in model.hf.parameters()]
    modes = [module.training for module in model.hf.modules()]
    adapted = AdaptedModel(model.hf, Adapter.create(model.hf, METHODS[0]))
    with pytest.raises(KeyError), adapted.held(gradient_checkpointing=True):
        assert not any(parameter.requires_grad for parameter in model.hf.parameters())
        raise KeyError
    assert [parameter.requires_grad for parameter in model.hf.parameters()] == wanted
    assert [module.training for module in model.hf.modules()] == modes
    assert not model.hf.is_gradient_checkpointing
    assert not any(module._forward_hooks for module in model.hf.modules())


def test_a_documents_first_token_is_no_target(model: Model) -> None:
    """Nothing of its own document is in front of it; packed, the token in front is another document's."""
    found = rows([(0, 6), (0, 7)])
    padded = inputs_of(collate(found, 0))["labels"]
    packed = inputs_of(pack(found, 0, 16))["labels"]
    assert int((padded != -100).sum()) == int((packed != -100).sum()) == 5 + 6
