"""Packed equals padded: loss and gradients, for every method, phase, history and attention implementation."""

from dataclasses import replace

import pytest
import torch
from preft_cases import chats, stir

from preft.adapters import Adapter, AdapterConfig
from preft.forward import masked_loss
from preft.train.module import AdaptedModel
from preft.train.rows import training_rows
from shared.history import History
from shared.models import Model, ModelConfig, load
from shared.tokens import Phase, TokenBatch, collate, pack

METHODS = [AdapterConfig(rank=4), AdapterConfig("direft", rank=4), AdapterConfig("loreft", rank=4)]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def attending(request: pytest.FixtureRequest) -> Model:
    return load(ModelConfig("random:llama", attn_implementation=request.param))


def loss_and_gradients(model: Model, adapter: Adapter, batch: TokenBatch) -> list[torch.Tensor]:
    with AdaptedModel(model.hf, adapter).held():
        loss = masked_loss(model.hf, adapter, batch)
        gradients = torch.autograd.grad(loss.total, list(adapter.parameters()))
    return [loss.total.detach() / loss.tokens, *(gradient / loss.tokens for gradient in gradients)]


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("history", list(History))
@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
def test_packed_equals_padded(
    attending: Model, config: AdapterConfig, history: History, phase: Phase
) -> None:
    rows = training_rows(attending.tokenizer, chats(5, turns=2), history)
    created = Adapter.create(attending.hf, replace(config, phase=phase, history=history))
    adapter = stir(created, seed=6).requires_grad_(True)
    packed = pack(rows, 0, max_length=240)
    assert len(packed) < len(rows), "nothing is packed"
    results = [loss_and_gradients(attending, adapter, batch) for batch in (collate(rows, 0), packed)]
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert bool(expected.any())


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_packed_equals_padded_in_other_families(family: str) -> None:
    """Sliding windows and soft caps; learnt positions."""
    model = load(ModelConfig(f"random:{family}"))
    rows = training_rows(model.tokenizer, chats(5))
    adapter = stir(Adapter.create(model.hf, METHODS[0]), seed=7).requires_grad_(True)
    results = [loss_and_gradients(model, adapter, batch) for batch in (collate(rows, 0), pack(rows, 0, 96))]
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
