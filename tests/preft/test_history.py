"""History policies by brute force: what training sees equals a server that reads and generates token by token."""

from dataclasses import replace

import pytest
import torch
from preft_cases import chats, stir

from preft.adapters import Adapter, AdapterConfig
from preft.forward import masked_loss
from preft.train.rows import training_rows
from shared.history import History
from shared.models import Model
from shared.tokens import Phase, collate, encode_chat, pack

METHODS = [AdapterConfig(rank=4, target_modules=("k_proj", "down_proj")), AdapterConfig("loreft", rank=4)]


@torch.no_grad()
def served_nll(model: Model, adapter: Adapter, chat: list[dict[str, str]], history: History) -> float:
    """Summed NLL of all responses, one token a forward pass; the adapter is on or off for each token by itself.

    RECOMPUTE: every turn is a request of its own, all before the response is its prompt. STICKY: one session, whose
    next turn reads the new part of the prompt and leaves the tokens it generated as they were computed.
    """
    from transformers import DynamicCache

    phase, total = adapter.config.phase, 0.0
    cache, ids = DynamicCache(config=model.hf.config), []
    logits_V = torch.zeros(0)

    def read(token: int, prompt: bool, last: bool) -> torch.Tensor:
        acts = {
            Phase.PREFILL: prompt,
            Phase.DECODE: not prompt,
            Phase.DECODE_BOUNDARY: not prompt or last,
            Phase.ALL: True,
        }[phase]
        with adapter.applied(model.hf, torch.tensor([[acts]])):
            output = model.hf(
                input_ids=torch.tensor([[token]]),
                position_ids=torch.tensor([[len(ids)]]),
                past_key_values=cache,
                use_cache=True,
            )
        ids.append(token)
        return output.logits[0, -1]

    for turn in [i for i, message in enumerate(chat) if message["role"] == "assistant"]:
        if history == History.RECOMPUTE:
            cache, ids = DynamicCache(config=model.hf.config), []
        prompt = encode_chat(model.tokenizer, chat[:turn], add_generation_prompt=True).ids
        assert prompt[: len(ids)] == ids, "a session goes on from what it has read and generated"
        new = prompt[len(ids) :]
        for i, token in enumerate(new):
            logits_V = read(token, prompt=True, last=i == len(new) - 1)
        answered = encode_chat(model.tokenizer, chat[: turn + 1])
        for token in answered.ids[len(prompt) : answered.spans[-1].generated_end]:
            total -= float(logits_V.log_softmax(-1)[token])
            logits_V = read(token, prompt=False, last=False)
    return total


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("history", list(History))
@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
def test_training_sees_what_a_server_computes(
    model: Model, config: AdapterConfig, history: History, phase: Phase
) -> None:
    adapter = stir(Adapter.create(model.hf, replace(config, phase=phase, history=history)), seed=5)
    [chat] = chats(1, turns=3)
    expected = served_nll(model, adapter, chat, history)
    rows = training_rows(model.tokenizer, [chat], history)
    for batch in (collate(rows, 0, "left"), collate(rows, 0, "right"), pack(rows, 0, 256)):
        assert float(masked_loss(model.hf, adapter, batch).total.detach()) == pytest.approx(
            expected, rel=2e-5
        )


@torch.no_grad()
def test_the_policies_differ(model: Model) -> None:
    """Else the test above would not tell them apart."""
    adapter = stir(Adapter.create(model.hf, METHODS[0]), seed=5)
    [chat] = chats(1, turns=3)
    rows = [training_rows(model.tokenizer, [chat], policy) for policy in History]
    found = [float(masked_loss(model.hf, adapter, collate(several, 0)).total) for several in rows]
    assert abs(found[0] - found[1]) > 0.05
