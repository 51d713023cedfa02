"""Rung A: on planted activations the probes, directions and controls do what theory says, without any model."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from assumptions.metrics import extremes_auroc
from assumptions.organism import filter_cosine, filter_limit, pattern_cosine, plant, signal_share
from assumptions.ridge import Factors, r2
from assumptions.rows import InMemory, blocks_in_memory
from assumptions.selection import choose, held_out_r2, shuffled_searches
from assumptions.splits import Split

NOISE = math.sqrt(1 / 12 * (1 / 0.703 - 1))  # rho = 0.703 at strength 1


def ridge(resid_BD, targets_BK, strength):
    return Factors(InMemory(resid_BD), range(len(resid_BD)), targets_BK).solve(strength)


def cosine(first_D, second_D):
    return float(first_D @ second_D / first_D.norm() / second_D.norm())


def covariance_directions(planted):
    centred_BD = planted.resid_BD - planted.resid_BD.mean(0)
    return (planted.latents_BK - planted.latents_BK.mean(0)).T @ centred_BD


@pytest.mark.parametrize(("rows", "width"), [(4000, 96), (1000, 96), (2000, 512)])
def test_directions_follow_the_formulas(rows, width):
    planted = plant(rows, width, noise=NOISE, seed=rows + width)
    rho = signal_share(1.0, NOISE)
    weights_DK = ridge(planted.resid_BD, planted.latents_BK, 1e-6).weight_DK
    found = np.mean([cosine(w, v) for w, v in zip(weights_DK.T, planted.directions_KD)])
    pattern = np.mean([cosine(w, v) for w, v in zip(covariance_directions(planted), planted.directions_KD)])
    assert found == pytest.approx(filter_cosine(rho, rows, width), abs=0.02)
    assert pattern == pytest.approx(pattern_cosine(rho, rows, width), abs=0.02)


def test_the_best_r2_is_the_signal_share():
    planted = plant(6000, 32, noise=NOISE, seed=1)
    split = Split(list(range(4000)), list(range(4000, 5000)), list(range(5000, 6000)))
    pooled = blocks_in_memory(planted.resid_BD[None])
    scores = held_out_r2(choose(pooled, planted.latents_BK, split), pooled, planted.latents_BK, split)
    assert np.mean(scores) == pytest.approx(0.703, abs=0.02)


def test_under_uneven_noise_the_pattern_stays_and_the_filter_leaves():
    planted = plant(8000, 64, noise=0.2, spread=0.8, seed=2)
    weights_DK = ridge(planted.resid_BD, planted.latents_BK, 1e-6).weight_DK
    found = np.mean([cosine(w, v) for w, v in zip(weights_DK.T, planted.directions_KD)])
    limit = float(filter_limit(planted, 1.0).mean())
    pattern = np.mean([cosine(w, v) for w, v in zip(covariance_directions(planted), planted.directions_KD)])
    assert found == pytest.approx(limit, abs=0.02)
    assert limit < 0.75
    assert pattern > 0.95


@pytest.mark.parametrize(("rows", "width"), [(80, 20), (30, 50)])
@pytest.mark.parametrize("strength", [0.01, 1.0, 10.0])
def test_one_factorisation_equals_sklearn(rows, width, strength):
    planted = plant(rows, width, seed=3)
    found = ridge(planted.resid_BD + 5.0, planted.latents_BK, strength)
    expected = Ridge(alpha=strength).fit(planted.resid_BD.numpy() + 5.0, planted.latents_BK.numpy())
    np.testing.assert_allclose(found.weight_DK.T.numpy(), expected.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        found.predict(planted.resid_BD + 5.0).numpy(),
        expected.predict(planted.resid_BD.numpy() + 5.0),
        atol=1e-8,
    )


def test_r2_of_a_constant_target_is_nan():
    assert torch.isnan(r2(torch.zeros(4, 1), torch.ones(4, 1))).all()


def test_noise_gives_no_r2_although_block_and_strength_were_searched():
    """T5: on features without information the reported R2 is at most zero on average."""
    scores = []
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        pooled = blocks_in_memory(torch.randn(6, 120, 16, generator=draw))
        labels = torch.rand(120, 9, generator=draw)
        split = Split(list(range(72)), list(range(72, 96)), list(range(96, 120)))
        chosen = choose(pooled, labels, split)
        scores += held_out_r2(chosen, pooled, labels, split)
    assert np.mean(scores) <= 0.0


def test_the_informative_block_is_chosen_and_shuffled_labels_find_nothing():
    planted = plant(400, 24, noise=0.2, seed=4)
    noise = torch.randn(2, 400, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pooled = blocks_in_memory(torch.stack([noise[0], planted.resid_BD, noise[1]]))
    split = Split(list(range(240)), list(range(240, 320)), list(range(320, 400)))
    chosen = choose(pooled, planted.latents_BK, split)
    assert [one.candidate for one in chosen] == [1] * 9
    assert all(len(one.curve) == 3 and one.curve[1] == one.r2_validation for one in chosen)
    assert min(held_out_r2(chosen, pooled, planted.latents_BK, split)) > 0.5
    searches = shuffled_searches(pooled, planted.latents_BK, split, repeats=5)
    assert len(searches) == 5
    assert np.mean([held_out_r2(one.chosen, pooled, one.targets_BK, split) for one in searches]) <= 0.0


def test_of_blocks_that_read_alike_the_earliest_is_taken():
    planted = plant(300, 16, noise=0.2, seed=6)
    worse = planted.resid_BD + 0.5 * torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    pooled = blocks_in_memory(torch.stack([worse, planted.resid_BD, planted.resid_BD.flip(1), worse]))
    split = Split(list(range(180)), list(range(180, 240)), list(range(240, 300)))
    assert {one.candidate for one in choose(pooled, planted.latents_BK, split)} == {1}
    for one in choose(pooled, planted.latents_BK, split, tolerance=0.0):
        assert one.r2_validation == max(one.curve)


def test_the_test_rows_do_not_choose():
    """T5: changing the test rows changes neither block nor strength nor coefficients."""
    planted = plant(200, 12, seed=5)
    pooled = torch.stack([planted.resid_BD, planted.resid_BD.flip(1) + 0.1 * torch.randn(200, 12)])
    split = Split(list(range(120)), list(range(120, 160)), list(range(160, 200)))
    before = choose(blocks_in_memory(pooled), planted.latents_BK, split)
    pooled[:, split.test] = torch.randn(2, 40, 12, dtype=torch.float64)
    after = choose(blocks_in_memory(pooled), planted.latents_BK, split)
    for one, other in zip(before, after):
        assert (one.candidate, one.strength) == (other.candidate, other.strength)
        assert torch.equal(one.weight_D, other.weight_D)


class TestExtremes:
    """T22: ties swell quantile classes; touching thresholds are refused, never scored."""

    def test_perfect_order_scores_one(self):
        labels = np.linspace(0, 1, 50)
        for rule in ("absolute", "quantile"):
            extremes = extremes_auroc(labels, labels, rule)
            assert extremes.auroc == 1.0
            assert extremes.n_low == extremes.n_high == 15

    def test_plateaus_are_refused(self):
        extremes = extremes_auroc(np.linspace(0, 1, 20), np.full(20, 0.8), "quantile")
        assert extremes.auroc is None
        assert "both thresholds are 0.8" in extremes.refusal

    def test_an_empty_class_is_refused(self):
        extremes = extremes_auroc(np.linspace(0, 1, 20), np.linspace(0.4, 1, 20), "absolute")
        assert extremes.auroc is None
        assert (extremes.n_low, extremes.refusal) == (0, "0 low and 10 high rows")

    def test_quantiles_are_within_each_source(self):
        labels = np.concatenate([np.linspace(0, 0.4, 20), np.linspace(0.6, 1, 20)])
        sources = ["a"] * 20 + ["b"] * 20
        extremes = extremes_auroc(labels, labels, "quantile", sources)
        assert (extremes.n_low, extremes.n_high) == (12, 12)
        assert extremes.auroc < 1.0  # high rows of the low source stand below low rows of the high source
