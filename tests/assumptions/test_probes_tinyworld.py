"""Rung C, reading: at the planted block the probes reach the ceiling that the world's own generator sets."""

import numpy as np
import pytest
import torch

from assumptions.baselines import BASELINES
from assumptions.chats import Chat
from assumptions.dimensions import NAMES
from assumptions.features import capture_features
from assumptions.ridge import r2
from assumptions.rows import InMemory
from assumptions.selection import choose, held_out_r2, shuffled_searches
from assumptions.splits import Split
from shared.models import load
from shared.tinyworld import social

BLOCK = 1  # where the nine directions were planted
SPLIT = Split(list(range(500)), list(range(500, 560)), list(range(560, 800)))


@pytest.fixture(scope="module")
def world():
    """Messages, their posterior means and latents (B 9), and what the model holds before and at the planted block."""
    turns = social.sample_turns(800, seed=5)
    order = [social.DIMENSIONS.index(name) for name in NAMES]
    posterior, latents = (
        torch.from_numpy(np.array([getattr(turn, name)[order] for turn in turns], dtype=float))
        for name in ("posterior_9", "latents_9")
    )
    chats = [Chat(str(i), turn.text) for i, turn in enumerate(turns)]
    features = capture_features(
        load("tinyworld"), chats, sites=["embed", f"blocks.{BLOCK}.output"], batch_size=64
    )
    return chats, posterior, latents, features


def test_the_read_out_is_within_two_hundredths_of_the_ceiling(world):
    """The posterior mean is the best that any reader of the message can know: R2 1 of itself, 3/5 of the latents."""
    _, posterior, latents, features = world
    place = [features.at([f"blocks.{BLOCK}.output"])]
    chosen = choose(place, posterior, SPLIT)
    assert min(held_out_r2(chosen, place, posterior, SPLIT)) > 0.98
    read = torch.tensor(held_out_r2(chosen, place, latents, SPLIT), dtype=torch.float64)
    ceiling = r2(posterior[SPLIT.test], latents[SPLIT.test])
    assert float((ceiling - read).abs().max()) < 0.02
    cues = social.CUES
    assert float(ceiling.mean()) == pytest.approx(cues / (cues + 2), abs=0.04)


def test_words_embeddings_and_shuffled_labels_stay_far_below(world):
    chats, posterior, _, features = world
    words = [InMemory(BASELINES["bag_of_words"](chats, SPLIT))]
    pairs = [InMemory(BASELINES["tfidf"](chats, SPLIT))]
    place, embedded = [features.at([f"blocks.{BLOCK}.output"])], [features.at(["embed"])]
    for reader, limit in ((words, 0.4), (pairs, 0.9), (embedded, 0.4)):
        assert max(held_out_r2(choose(reader, posterior, SPLIT), reader, posterior, SPLIT)) < limit
    [shuffled] = shuffled_searches(place, posterior, SPLIT, repeats=1)
    assert np.mean(held_out_r2(shuffled.chosen, place, shuffled.targets_BK, SPLIT)) < 0.02
