"""Statistics against scipy, scikit-learn and brute force."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

from shared.stats import auroc, bootstrap_interval, logit_difference, mean, seed_everything, spearman

small_integers = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12)


def auroc_by_pairs(scores, labels):
    """The definition: over all (positive, negative) pairs, 1 for a win and 1/2 for a tie."""
    positive = [s for s, label in zip(scores, labels) if label]
    negative = [s for s, label in zip(scores, labels) if not label]
    return np.mean([(p > n) + 0.5 * (p == n) for p, n in itertools.product(positive, negative)])


@given(small_integers)
def test_auroc_is_the_share_of_won_pairs(rows):
    scores, labels = (list(column) for column in zip(*rows))
    if len(set(labels)) < 2:
        assert np.isnan(auroc(scores, labels))
    else:
        assert auroc(scores, labels) == pytest.approx(auroc_by_pairs(scores, labels))
        assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))


def test_auroc_refuses_labels_that_are_no_classes():
    with pytest.raises(ValueError, match="0 or 1"):
        auroc([1.0, 2.0], [0.5, 1.0])


def test_spearman_equals_scipy_with_and_without_ties():
    rng = np.random.default_rng(0)
    for x, y in (rng.normal(size=(2, 50)), rng.integers(0, 5, size=(2, 50))):
        assert spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_statistics_keep_leading_axes():
    x, y = np.random.default_rng(1).normal(size=(2, 3, 4, 20))
    rho = spearman(x, y)
    area = auroc(x, y > 0)
    assert rho.shape == area.shape == (3, 4)
    assert rho[2, 1] == pytest.approx(spearman(x[2, 1], y[2, 1]))
    assert area[2, 1] == pytest.approx(auroc(x[2, 1], y[2, 1] > 0))


def test_bootstrap_interval_equals_scipy_up_to_resampling_noise():
    x = np.random.default_rng(2).exponential(size=200)
    ours = bootstrap_interval(x, resamples=20_000)
    theirs = scipy_stats.bootstrap((x,), np.mean, n_resamples=20_000, method="percentile", rng=0)
    assert ours.estimate == pytest.approx(x.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)


def test_bootstrap_interval_covers_as_often_as_it_says():
    samples = np.random.default_rng(3).normal(size=(400, 40))
    intervals = [bootstrap_interval(row, resamples=400, seed=i) for i, row in enumerate(samples)]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    assert 0.90 <= covered <= 0.98


def test_bootstrap_resamples_pairs_together():
    x = np.random.default_rng(4).normal(size=60)
    interval = bootstrap_interval(x, x**3, statistic=spearman)
    assert interval == pytest.approx(
        (1.0, 1.0, 1.0)
    )  # monotone in every resample, as long as pairs stay pairs


def test_bootstrap_is_seeded():
    x = np.arange(30.0)
    assert bootstrap_interval(x, seed=5) == bootstrap_interval(x, seed=5) != bootstrap_interval(x, seed=6)


def test_cluster_bootstrap_sees_that_copies_are_not_new_evidence():
    x = np.random.default_rng(7).normal(size=30)
    copies, clusters = np.repeat(x, 20), np.repeat(np.arange(30), 20)
    single = bootstrap_interval(x, resamples=4000)
    clustered = bootstrap_interval(copies, clusters=clusters, resamples=4000)
    naive = bootstrap_interval(copies, resamples=4000)
    assert clustered.high - clustered.low == pytest.approx(single.high - single.low, rel=0.1)
    assert naive.high - naive.low < 0.4 * (single.high - single.low)


def test_cluster_bootstrap_draws_whole_clusters_of_unequal_size():
    values, clusters = np.array([1.0, 1.0, 1.0, 9.0]), np.array(["a", "a", "a", "b"])
    sizes = []
    bootstrap_interval(
        values, clusters=clusters, resamples=50, statistic=lambda v: sizes.append(len(v)) or mean(v)
    )
    assert set(sizes[:-1]) <= {2, 4, 6}  # bb, ab, aa


def test_undefined_resamples_are_left_out():
    labels = np.array([1.0] + [0.0] * 9)  # a resample often holds no positive
    interval = bootstrap_interval(np.arange(10.0), labels, statistic=auroc, resamples=300)
    assert np.isfinite(interval).all()


@pytest.mark.parametrize("samples", [((),), ((1.0, 2.0), (1.0,))])
def test_bootstrap_refuses_unequal_or_empty_samples(samples):
    with pytest.raises(ValueError, match="equal, positive length"):
        bootstrap_interval(*samples)


def test_logit_difference_and_its_gradient():
    logits = torch.tensor([[1.0, 5.0, 2.0], [4.0, 0.0, 1.0]], requires_grad=True)
    difference = logit_difference(logits, torch.tensor([1, 0]), torch.tensor([2, 2]))
    assert difference.tolist() == [3.0, 3.0]
    difference.sum().backward()
    assert logits.grad.tolist() == [[0, 1, -1], [1, 0, -1]]


def test_seed_everything_covers_all_three_generators():
    import random

    def draw():
        seed_everything(11)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert draw() == draw()
