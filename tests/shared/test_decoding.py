"""Generation: equal to Hugging Face's, and under edits equal to full recomputation without a cache."""

from dataclasses import replace

import pytest
import torch

from shared.decoding import choose, nucleus
from shared.errors import UserError
from shared.families import FAMILIES
from shared.hooks import capture, edit
from shared.interventions import Add, Interchange, LowRank, Scale
from shared.models import load
from shared.tokens import History, Phase, pad

TEXTS = ["A prompt", "and a second one, longer than the window of sixteen", "x"]
STEPS = 6


@pytest.fixture(scope="module", params=list(FAMILIES))
def any_model(request):
    return load(f"random:{request.param}")


@pytest.fixture(scope="module")
def model():
    return load("random:llama")


def recompute(model, rows, prompt_lengths, edits, steps, side="left"):
    """Greedy tokens and log-probabilities by a full forward pass a token, no cache, masks by the definition."""
    rows = [list(row) for row in rows]
    tokens, logprobs = [[] for _ in rows], [[] for _ in rows]
    for _ in range(steps):
        batch = pad(rows, prompt_lengths, 0, side)
        with torch.no_grad(), edit(model, edits):
            logits_BTV = model(batch)
        last = logits_BTV[torch.arange(len(rows)), batch.last_columns_B].log_softmax(-1)
        for i, row in enumerate(rows):
            token = int(last[i].argmax())
            row.append(token)
            tokens[i].append(token)
            logprobs[i].append(float(last[i, token]))
    return tokens, logprobs


def strong_edits(model, phase):
    generator = torch.Generator().manual_seed(3)
    width = model.architecture.width
    return [
        Add("blocks.0.output", torch.randn(width, generator=generator), phase=phase),
        LowRank.direft(
            "blocks.1.output",
            torch.randn(4, width, generator=generator) / width**0.5,
            torch.randn(4, width, generator=generator) / width**0.5,
            torch.randn(4, generator=generator),
            phase=phase,
        ),
        Scale("blocks.2.neurons", 3.0, indices=[0, 7, 40], phase=phase),
    ]


def test_greedy_equals_hugging_face(any_model):
    batch = any_model.encode(TEXTS)
    got = any_model.generate(batch, max_new_tokens=STEPS, stop_token_ids=[])
    expected = any_model.hf.generate(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT,
        do_sample=False,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert got.tokens == expected[:, -STEPS:].tolist()


@pytest.mark.parametrize("phase", list(Phase))
def test_edits_act_on_exactly_their_phase(any_model, phase):
    batch = any_model.encode(TEXTS)
    edits = strong_edits(any_model, phase)
    with edit(any_model, edits):
        got = any_model.generate(batch, max_new_tokens=STEPS, stop_token_ids=[])
    prompts = batch.rows()
    tokens, logprobs = recompute(any_model, prompts, [len(row) for row in prompts], edits, STEPS)
    assert got.tokens == tokens
    torch.testing.assert_close(torch.tensor(got.logprobs), torch.tensor(logprobs), atol=2e-4, rtol=1e-4)


def test_the_phases_differ_where_they_should(model):
    """The boundary pair: a decode edit leaves the first token to the base, a prefill edit does not."""
    batch = model.encode(TEXTS)
    base = model.generate(batch, max_new_tokens=3, stop_token_ids=[])
    first = {}
    for phase in Phase:
        with edit(model, strong_edits(model, phase)):
            first[phase] = model.generate(batch, max_new_tokens=3, stop_token_ids=[])
    assert [p[0] for p in first[Phase.DECODE].logprobs] == [p[0] for p in base.logprobs]
    assert first[Phase.DECODE].logprobs != base.logprobs
    for phase in (Phase.PREFILL, Phase.DECODE_BOUNDARY, Phase.ALL):
        assert all(a[0] != b[0] for a, b in zip(first[phase].logprobs, base.logprobs))
    assert first[Phase.PREFILL].logprobs != first[Phase.ALL].logprobs


def test_named_positions_reach_into_the_generated_text(model):
    batch = model.encode(["abc", "abcdefg"])
    n = batch.prompt_lengths_B
    vector = torch.full((model.architecture.width,), 0.3)
    edits = Add("blocks.1.output", vector, positions=[-2, 4, 9])
    with edit(model, edits), capture(model, ["blocks.1.output"]) as acts:
        got = model.generate(batch, max_new_tokens=STEPS, stop_token_ids=[])
        edited = acts["blocks.1.output"]
    rows = [row + new for row, new in zip(batch.rows(), got.tokens)]
    full = pad([row[:-1] for row in rows], n.tolist(), 0, "left")
    assert edited.shape[:2] == full.input_ids_BT.shape
    with torch.no_grad(), capture(model, ["blocks.1.output"]) as acts, edit(model, edits):
        model(full)
    real = full.attention_mask_BT.bool()
    torch.testing.assert_close(edited[real], acts["blocks.1.output"][real], atol=2e-5, rtol=1e-4)
    tokens, _ = recompute(model, batch.rows(), n.tolist(), edits, STEPS)
    assert got.tokens == tokens


def test_batch_equals_single_and_rows_sample_from_their_own_seed(model):
    batch = model.encode(TEXTS)
    for temperature, top_p in ((0.0, 1.0), (1.3, 1.0), (1.0, 0.7)):
        kwargs = {"max_new_tokens": STEPS, "temperature": temperature, "top_p": top_p}
        together = model.generate(batch, seed=5, **kwargs)
        for row, text in enumerate(TEXTS):
            alone = model.generate(model.encode([text]), seed=[5 + row], **kwargs)
            assert alone.tokens[0] == together.tokens[row]
        assert model.generate(batch, seed=5, **kwargs).tokens == together.tokens
    assert model.generate(batch, 6, 1.3, seed=99).tokens != model.generate(batch, 6, 1.3, seed=5).tokens


def test_a_stop_token_ends_its_row_only(model):
    batch = model.encode(TEXTS)
    free = model.generate(batch, max_new_tokens=STEPS, stop_token_ids=[])
    stop = free.tokens[1][2]
    stopped = model.generate(batch, max_new_tokens=STEPS, stop_token_ids=[stop])
    for row, tokens in enumerate(free.tokens):
        end = tokens.index(stop) + 1 if stop in tokens else STEPS
        assert stopped.tokens[row] == tokens[:end]
        assert len(stopped.logprobs[row]) == end


def test_sticky_history_leaves_earlier_answers_unedited(model):
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    edits = strong_edits(model, Phase.PREFILL)
    outputs = {}
    for history in History:
        batch = model.encode([chat, chat[:1]], history=history)
        with edit(model, edits):
            outputs[history] = model.generate(batch, max_new_tokens=4, stop_token_ids=[])
        full = replace(batch, attention_mask_BT=batch.attention_mask_BT)
        with torch.no_grad(), edit(model, edits):
            last = model(full)[:, -1].log_softmax(-1)
        got = [p[0] for p in outputs[history].logprobs]
        torch.testing.assert_close(torch.tensor(got), last.max(-1).values, atol=1e-4, rtol=1e-4)
    sticky, recomputed = outputs[History.STICKY], outputs[History.RECOMPUTE]
    assert sticky.logprobs[0] != recomputed.logprobs[0]
    torch.testing.assert_close(torch.tensor(sticky.logprobs[1]), torch.tensor(recomputed.logprobs[1]))


def test_a_prefill_source_is_not_asked_of_later_tokens(model):
    batch = model.encode(["abcd", "efgh"])
    with torch.no_grad(), capture(model, ["blocks.1.output"]) as acts:
        model(batch)
    source = acts["blocks.1.output"]
    base = model.generate(batch, max_new_tokens=3)
    with edit(model, Interchange("blocks.1.output", source, phase="prefill")):
        assert model.generate(batch, max_new_tokens=3).tokens == base.tokens


def test_nucleus_and_log_probabilities_by_hand():
    probs = torch.tensor([[0.5, 0.2, 0.2, 0.1]])
    torch.testing.assert_close(nucleus(probs, 0.5), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(nucleus(probs, 0.6)[0, 0], torch.tensor(5 / 7))
    torch.testing.assert_close(nucleus(probs, 0.95), probs)
    token, logprob = choose(probs.log() + 3.0, 0.0, 1.0, [])
    assert token.tolist() == [0]
    torch.testing.assert_close(logprob, torch.tensor([0.5]).log())


def test_bad_requests_are_refused(model):
    with pytest.raises(UserError, match="left padding"):
        model.generate(model.encode(TEXTS, padding_side="right"))
    batch = model.encode(TEXTS)
    with pytest.raises(UserError, match="max_new_tokens"):
        model.generate(batch, max_new_tokens=0)
    with pytest.raises(UserError, match="top_p"):
        model.generate(batch, top_p=0.0)
    with pytest.raises(UserError, match="2 seeds for 3 rows"):
        model.generate(batch, seed=[1, 2])
