"""What is read in Hugging Face is what vLLM computes: block outputs, and scores over token probabilities."""

from functools import partial

import numpy as np
import pytest
import torch

from assumptions.chats import Chat
from assumptions.dimensions import NAMES
from assumptions.elicitation import ElicitationSettings
from assumptions.features import block_outputs
from assumptions.instruments import instrument
from assumptions.rendering import render
from assumptions.scoring import score_chats
from shared.generation import HFGenerator, Request, Sampling, VLLMGenerator
from shared.hooks import capture
from shared.models import load
from shared.tinyworld import social

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.slow]


def keep(seen, block, module, args, output):
    """A decoder layer of vLLM gives what its MLP adds and the stream before it; the block's output is their sum."""
    added, stream = output
    seen[block].append((added + stream).float().clone())


@pytest.fixture(scope="module")
def engine():
    """vLLM over the embedded model; every prompt is computed whole."""
    with VLLMGenerator("tinyworld", enable_prefix_caching=False) as generator:
        yield generator


def test_expected_scores_of_both_engines_are_equal(engine, tmp_path):
    """Of the same answers: the trees that vLLM's top tokens grow give Hugging Face's values to 1e-3."""
    model, asked = load("tinyworld"), instrument("tinyworld_nine")
    chats = [Chat(str(i), turn.text) for i, turn in enumerate(social.sample_turns(1, seed=4))]
    settings = ElicitationSettings(guided=False, max_tokens=96)

    def scored(generator, name):
        path = tmp_path / f"{name}.jsonl"
        found = score_chats(
            generator, model.tokenizer, asked, chats, path, settings, "expected", model=model.fingerprint
        )
        assert [record.token_ids for record in found.answers.records] == answers
        return found.scored

    greedy = HFGenerator(model).generate(
        [Request(asked.messages(chat.turn)) for chat in chats], Sampling(96, logprobs=None)
    )
    answers = [tuple(one.token_ids) for [one] in greedy]
    ours, theirs = scored(HFGenerator(model, batch_size=128), "hf"), scored(engine, "vllm")
    ids = [chat.id for chat in chats]
    assert np.isfinite(ours.scores(ids, NAMES)).all()
    np.testing.assert_allclose(theirs.scores(ids, NAMES), ours.scores(ids, NAMES), atol=1e-3)


def test_block_outputs_of_both_engines_point_the_same_way(engine):
    """Cosine at least 0.999 at every block and token of real messages; the mean over the user's message too."""
    model = load("tinyworld")
    chats = [Chat(str(i), turn.text) for i, turn in enumerate(social.sample_turns(4, seed=3))]
    seen = [[] for _ in block_outputs(model)]

    def watch(inside):
        return [
            layer.register_forward_hook(partial(keep, seen, block))
            for block, layer in enumerate(inside.model.layers)
        ]

    [handles] = engine.llm.apply_model(watch)
    try:
        for chat in chats:  # one at a time: a batch's tokens lie end to end, in the scheduler's order
            engine.generate([Request(chat.messages)], Sampling(max_tokens=1, logprobs=None))
    finally:
        for handle in handles:
            handle.remove()
    for number, chat in enumerate(chats):
        rendered = render(model.tokenizer, chat)
        with torch.no_grad(), capture(model, block_outputs(model)) as acts:
            model(model.encode([chat.messages]))
        for block, site in enumerate(block_outputs(model)):
            ours_TD, theirs_TD = acts[site][0].float(), seen[block][number]
            assert theirs_TD.shape == ours_TD.shape
            cosine_T = torch.cosine_similarity(ours_TD, theirs_TD, dim=-1)
            assert float(cosine_T.min()) >= 0.999
            user = slice(rendered.user.start, rendered.user.stop)
            pooled = torch.cosine_similarity(ours_TD[user].mean(0), theirs_TD[user].mean(0), dim=0)
            assert float(pooled) >= 0.9999
