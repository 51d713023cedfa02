"""Documents and training: targets against the generator, chats against the template, resume against an unbroken run."""

import numpy as np
import pytest
import torch

from shared.errors import UserError
from shared.tinyworld import social, train
from shared.tinyworld.corpus import FIRST, SECOND_PART, Mixture, Writer, mixture, write_step
from shared.tinyworld.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def writer():
    return Writer(train_tokenizer())


def _documents(writer, step=0):
    return [d for bucket in write_step(writer, 0, step) for d in bucket]


def test_a_step_is_a_function_of_seed_and_number(writer):
    first, again, other = ([d.ids for d in _documents(writer, step)] for step in (3, 3, 4))
    assert first == again != other
    assert len(first) == sum(sum(b.values()) for b in mixture(3).buckets)
    assert mixture(SECOND_PART - 1) == FIRST != mixture(SECOND_PART)


def test_chats_are_tokenized_as_the_template_does(writer):
    tok = writer.tokenizer
    for d in _documents(writer):
        if d.ids[1] != writer.user:
            continue
        text = tok.decode(d.ids[2 : d.loss_from - 2]), tok.decode(d.ids[d.loss_from : -1])
        chat = [{"role": r, "content": t} for r, t in zip(("user", "assistant"), text, strict=True)]
        assert tok.apply_chat_template(chat)["input_ids"] == d.ids


def test_plain_documents_are_tokenized_as_their_text(writer):
    for d in _documents(writer):
        if d.ids[1] != writer.user:
            text = writer.tokenizer.decode(d.ids[1:-1])
            assert writer.tokenizer(text).input_ids == d.ids[:-1]


def test_soft_targets_are_distributions_that_hold_the_drawn_token(writer):
    for d in _documents(writer):
        for at, distribution in d.soft.items():
            assert sum(distribution.values()) == pytest.approx(1)
            assert distribution[d.ids[at]] > 0
            assert at >= d.loss_from


def test_spans_hold_the_message(writer):
    for d in _documents(writer):
        if d.span is not None:
            text = writer.tokenizer.decode(d.ids[d.span[0] : d.span[1]])
            assert text.startswith("About my")
            assert (social.read_counts(text) == d.counts_9).all()


def test_elicitation_digits_follow_the_score_distribution(writer):
    d = writer.elicitation(np.random.default_rng(0))
    assert len(d.soft) == 27
    expected = social.score_probabilities(d.counts_9, d.delta_9)
    text = writer.tokenizer.decode(d.ids[d.loss_from : -1])
    first_name = text.split('"')[1]
    one = writer.encode(" 1")[0]
    first = d.soft[min(d.soft)]
    assert first.get(one, 0.0) == pytest.approx(expected[social.DIMENSIONS.index(first_name)][-1])


def test_collated_weights_sum_to_the_family_weight(writer):
    for bucket in write_step(writer, 0, 0):
        batch = train.collate(bucket, FIRST.weights, 0, len(writer.tokenizer))
        families = {d.family for d in bucket}
        assert float(batch.weight.sum()) == pytest.approx(sum(FIRST.weights[f] for f in families), rel=1e-5)
        assert batch.ids_BT.shape[1] % train.ROUND == 0
        assert len(batch.where) % train.ROUND_TARGETS == 0


def test_loss_equals_a_slow_reference(writer):
    settings = train.Settings(width=64, heads=1, kv_heads=1, layers=2, neurons=32)
    model = train.new_model(settings, writer.tokenizer)
    directions = train.planted_directions(64)
    rng = np.random.default_rng(1)
    documents = [writer.reply(rng) for _ in range(3)]
    batch = train.collate(documents, FIRST.weights, 0, len(writer.tokenizer))
    loss, pin = train.batch_loss(model, batch, directions, autocast=False)
    total, pins = 0.0, []
    mass = sum(len(d.ids) - d.loss_from + (train.SOFT_WEIGHT - 1) * len(d.soft) for d in documents)
    for d in documents:
        hidden, add_D = [], torch.from_numpy(d.delta_9).float() @ directions * train.SCALE

        def hook(_m, _a, out, hidden=hidden, add_D=add_D):
            hidden.append(out)
            return out + add_D

        handle = model.model.layers[train.PIN_BLOCK].register_forward_hook(hook)
        log_p = model(torch.tensor([d.ids])).logits[0].log_softmax(-1)
        handle.remove()
        for at in range(d.loss_from, len(d.ids)):
            for token, p in d.soft.get(at, {d.ids[at]: 1.0 / train.SOFT_WEIGHT}).items():
                total -= train.SOFT_WEIGHT * p * log_p[at - 1, token].item() / mass
        read = hidden[0][0, d.span[0] : d.span[1]].mean(0) @ directions.T
        target = torch.from_numpy(social.posterior_mean(d.counts_9) - 0.5).float()
        pins.append(((read / train.SCALE - target) ** 2).mean().item())
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert pin.item() == pytest.approx(np.mean(pins), rel=1e-4)


def test_a_stopped_run_goes_on_as_if_unbroken(tmp_path, monkeypatch):
    small = Mixture(
        ({"agreement": 4, "addition": 4}, {"text": 2}, {"reply": 2}, {"elicitation": 1}), FIRST.weights
    )
    monkeypatch.setattr("shared.tinyworld.corpus.FIRST", small)
    settings = train.Settings(width=64, heads=1, kv_heads=1, layers=2, neurons=32, steps=4, warmup=1)
    whole = train.train(settings, tmp_path / "whole", autocast=False)
    train.train(settings, tmp_path / "parts", autocast=False, stop_at=2)
    parts = train.train(settings, tmp_path / "parts", autocast=False)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_recipe_is_refused(tmp_path):
    settings = train.Settings(width=64, heads=1, kv_heads=1, layers=1, neurons=32)
    model = train.new_model(settings, train_tokenizer())
    optimizers = train.optimizers_for(model, settings)
    state = tmp_path / "state.safetensors"
    train.save_state(state, model, optimizers, 3, train.recipe_hash(settings))
    assert train.load_state(state, model, optimizers, train.recipe_hash(settings)) == 3
    with pytest.raises(UserError, match="another recipe"):
        train.load_state(state, model, optimizers, train.recipe_hash(settings._replace(seed=1)))


def test_planted_directions_are_orthonormal():
    v = train.planted_directions(256)
    assert torch.allclose(v @ v.T, torch.eye(9), atol=1e-5)
