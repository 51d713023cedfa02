"""Streams against the batched generator: the same text, tokens and ending, also in turn and in another thread."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from shared.errors import UserError
from shared.generation import HFGenerator, Request, Sampling, stream
from shared.interventions import Add
from shared.models import load
from shared.tokens import Phase

CHAT = [{"role": "user", "content": "hi there, how are you?"}]
SAMPLED = Sampling(max_tokens=12, temperature=1.0, logprobs=None)


@pytest.fixture(scope="module")
def model():
    return load("random:llama")


@pytest.fixture(scope="module")
def push(model):
    return [Add("blocks.0.output", torch.ones(model.architecture.width), 4.0, phase=Phase.ALL)]


def whole(model, request, sampling, edits=()):
    [[answer]] = HFGenerator(model, edits).generate([request], sampling)
    return answer.text, answer.token_ids, answer.finish_reason


def joined(pieces):
    pieces = list(pieces)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    return "".join(piece.text for piece in pieces), [p.token_id for p in pieces], pieces[-1].finish_reason


@pytest.mark.parametrize("prompt", ["The dogs", CHAT, [7, 9, 30]])
@pytest.mark.parametrize("sampling", [Sampling(max_tokens=6), SAMPLED])
def test_a_stream_adds_up_to_the_generators_answer(model, push, prompt, sampling):
    for seed in range(3):
        request = Request(prompt, seed=seed)
        for edits in ([], push):
            assert joined(stream(model, request, sampling, edits)) == whole(model, request, sampling, edits)


def test_it_ends_at_an_end_token_and_at_the_end_of_the_context(model, monkeypatch):
    request = Request(CHAT, seed=0)
    _, ids, _ = whole(model, request, SAMPLED)
    monkeypatch.setattr(model.hf.generation_config, "eos_token_id", [ids[4]])
    assert joined(stream(model, request, SAMPLED)) == whole(model, request, SAMPLED)
    assert joined(stream(model, request, SAMPLED))[2] == "stop"
    limit = model.hf.config.max_position_embeddings
    monkeypatch.setattr(model.hf.generation_config, "eos_token_id", [])
    nearly_full = Request([7] * (limit - 2), seed=0)
    assert joined(stream(model, nearly_full, Sampling(max_tokens=50))) == whole(
        model, nearly_full, Sampling(max_tokens=50)
    )
    with pytest.raises(UserError, match="shorten"):
        next(stream(model, Request([7] * limit), Sampling()))


def test_streams_under_different_edits_may_be_read_in_turn(model, push):
    request = Request(CHAT, seed=3)
    plain, pushed = stream(model, request, SAMPLED), stream(model, request, SAMPLED, push)
    pairs = list(zip(plain, pushed, strict=True))
    for pieces, edits in zip(zip(*pairs), ([], push)):
        assert joined(pieces) == whole(model, request, SAMPLED, edits)
    assert not model.active.edits


def test_a_stream_may_be_read_in_another_thread_and_left_early(model, push):
    request = Request(CHAT, seed=1)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(lambda: joined(stream(model, request, SAMPLED, push))).result()
    assert there == whole(model, request, SAMPLED, push)
    begun = stream(model, request, SAMPLED, push)
    next(begun)
    begun.close()
    assert not model.active.edits
    assert whole(model, request, SAMPLED) == joined(stream(model, request, SAMPLED))


def test_what_a_stream_lacks_is_said(model):
    for request, sampling in (
        (Request("a", adapter="x"), Sampling()),
        (Request("a", json_schema={}), Sampling()),
        (Request("a"), Sampling(stop=("x",))),
        (Request("a"), Sampling(n=2, temperature=1.0)),
    ):
        with pytest.raises(UserError, match="a stream has no"):
            next(stream(model, request, sampling))
