"""From neurons to concepts: profiles against totals, planted clusters and classes found again."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from circuits.clusters import ClusterError, cluster, cohesion, coverage, spectral
from circuits.describe import (
    Context,
    contexts_of,
    describe_weights,
    firing_contexts,
    vocabulary_effects,
    write_logits,
)
from circuits.edges import Neurons
from circuits.explain import explain, score
from circuits.hypotheses import (
    Finding,
    Thresholds,
    chosen_features,
    permutation_auroc,
    permuted_labels,
    score_hypotheses,
    signed_features,
    strongest_features,
    tag_groups,
)
from circuits.pathways import neuron_activations
from circuits.profiles import Profile, Signed, frequent, profile
from circuits.relp import relp
from circuits.similarity import context_similarity, mean_similarity
from circuits.steering import Node, answer, scale_nodes
from circuits.supernodes import Supernode, Supernodes, from_clusters, read_supernodes, write_supernodes
from circuits.sweeps import saying, strength_matched, sweep, write_strength
from circuits.tasks import Example, collate
from shared.errors import UserError
from shared.generation import Completion
from shared.stats import auroc
from shared.tinyworld.tasks import Pair

# --- profiles ---


@pytest.fixture
def any_of(random_models):
    from shared.models import ModelConfig, load

    def model(family):
        if family not in random_models:
            random_models[family] = load(ModelConfig(f"random:{family}", dtype="float64"))
        return random_models[family]

    return model


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_profile_sums_nodes_of_one_neuron_and_sign(llama, problem_of, side):
    problem = problem_of(llama, padding_side=side)
    row, keep_S = 1, problem.network.real_BT[1]  # the shorter row: it has padding
    acts_LSN = problem.activations_BLTN[row][:, keep_S]
    mask_LTN = torch.zeros_like(problem.activations_BLTN[row], dtype=torch.bool)
    mask_LTN[1, :, 7] = mask_LTN[2, :, 3] = True
    one = profile(problem, row, mask_LTN)
    metric = problem.metric.row(row, keep_S.nonzero()[:, 0])
    totals_KLSN = relp(problem.network.row(row), metric).sensitivity_BKLTN[0] * acts_LSN
    for neuron, contribution_K in zip(one.neurons, one.contribution_nK, strict=True):
        same_S = (acts_LSN[neuron.layer, :, neuron.neuron] < 0) == (neuron.sign < 0)
        expected_K = totals_KLSN[:, neuron.layer, same_S, neuron.neuron].sum(-1)
        torch.testing.assert_close(contribution_K, expected_K)
    assert len(one.token_ids) == one.attribution_nT.shape[1] == int(keep_S.sum())
    total = sum(
        acts_LSN[neuron.layer, :, neuron.neuron].sum() for neuron in {n._replace(sign=1) for n in one.neurons}
    )
    torch.testing.assert_close(one.attribution_nT.sum(), total)


# --- similarity and clusters ---


def a_profile(neurons, attribution, contribution):
    tensors = (torch.tensor(rows, dtype=torch.float64) for rows in (attribution, contribution))
    return Profile(tuple(neurons), *tensors, tuple(range(len(attribution[0]))))


def planted(seed, groups=3, size=6, noise=0.3):
    """A context in which neurons of one group share both profiles up to noise."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(np.eye(groups), 2, axis=1)
    rows = np.repeat(np.arange(groups), size)
    attribution, contribution = (
        centres[rows] + noise * rng.normal(size=(len(rows), 2 * groups)) for _ in range(2)
    )
    return a_profile(
        [Signed(n % 4, n, 1) for n in range(len(rows))], attribution.tolist(), contribution.tolist()
    )


def test_similarity_is_the_harmonic_mean_of_both_views():
    a, b, c, d = (Signed(0, n, 1) for n in range(4))
    one = a_profile([a, b, c, d], [[1, 0], [1, 1], [-1, 0], [0, 0]], [[1, 0], [2, 0], [1, 0], [1, 0]])
    similarity = context_similarity(one)
    cosine = 1 / 2**0.5
    assert float(similarity[0, 1]) == pytest.approx(2 * cosine / (1 + cosine))
    assert float(similarity[0, 0]) == pytest.approx(1)
    assert float(similarity[0, 2]) == 0  # opposite attribution is no likeness
    assert float(similarity[0, 3]) == 0  # a neuron that no token reaches is like none
    torch.testing.assert_close(similarity, similarity.T)


def test_a_pair_alike_in_one_view_at_a_time_is_never_alike():
    """Each view's average over contexts would be 1/2; the harmonic mean comes first and is 0 in every context."""
    a, b = Signed(0, 0, 1), Signed(1, 1, -1)
    hear = a_profile([a, b], [[1, 0], [1, 0]], [[1, 0], [0, 1]])
    say = a_profile([a, b], [[1, 0], [0, 1]], [[1, 0], [1, 0]])
    assert float(mean_similarity([hear, say], [a, b]).mean_nn[0, 1]) == 0


def test_only_contexts_with_both_count():
    a, b, c = Signed(0, 0, 1), Signed(0, 1, 1), Signed(0, 2, 1)
    both = a_profile([a, b], [[1.0], [1.0]], [[1.0], [1.0]])
    alone = a_profile([a, c], [[1.0], [1.0]], [[1.0], [-1.0]])
    found = mean_similarity([both, alone], [a, b, c])
    assert float(found.mean_nn[0, 1]) == 1
    assert found.support_nn.tolist() == [[2, 1, 1], [1, 1, 0], [1, 0, 1]]
    assert float(found.mean_nn[1, 2]) == 0
    assert float(mean_similarity([both, alone], [a, b, c], min_support=2).mean_nn[0, 1]) == 0


def test_planted_clusters_and_their_number_are_found():
    profiles = [planted(seed) for seed in range(8)]
    found = cluster(profiles, profiles[0].neurons, [2, 3, 5], halvings=3)
    assert found.number == 3
    groups = [{neuron.neuron // 6 for neuron in members} for members in found.members()]
    assert sorted(map(sorted, groups)) == [[0], [1], [2]]
    best = next(one for one in found.stability if one.number == 3)
    assert best.ari == pytest.approx(1)
    assert abs(best.ari_shuffled) < 0.3
    assert best.ari_layers < 0.3
    assert best.cohesion > 0.5 > abs(best.cohesion_shuffled) + 0.2
    assert found.support() == [8.0, 8.0, 8.0]


def test_clusters_need_contexts_and_neurons():
    profiles = [planted(seed) for seed in range(3)]
    with pytest.raises(ClusterError, match="4 contexts"):
        cluster(profiles, profiles[0].neurons, [3])
    with pytest.raises(ClusterError, match="too few for 3"):
        spectral(torch.eye(4), 3)
    assert cohesion(torch.eye(3), np.zeros(3)) == 0  # one cluster: nothing between


def test_unknown_neurons_stay_unknown():
    a, b = Signed(0, 0, 1), Signed(0, 0, -1)
    one = a_profile([b, a], [[1.0], [1.0]], [[1.0, -2.0], [1.0, 0.0]])
    assert coverage([one], [a]) == pytest.approx(1 / 4)
    assert coverage([one], [a, b]) == 1
    assert frequent([one, one], 2, 1) == (b,)
    assert frequent([one, one], 3, 9) == ()


# --- hypotheses ---


def classes(n, seed, signal):
    """Features of four neurons: one fires in class x, one everywhere but there, two never tell anything."""
    rng = np.random.default_rng(seed)
    labels = ["vwxyz"[row % 5] for row in range(n)]
    inside = np.array([label == "x" for label in labels])
    features = rng.normal(size=(n, 4))
    features[:, 0] += signal * inside
    features[:, 1] -= signal * inside
    return features, {"letter": labels}


NEURONS = [Signed(0, n, 1) for n in range(4)]


def test_planted_classes_hold_and_noise_does_not():
    train, test = classes(60, 1, 4.0), classes(45, 2, 4.0)
    findings = score_hypotheses(NEURONS, *train, *test, Thresholds(permutations=500))
    held = {(one.neuron.neuron, one.value): one for one in findings if one.holds}
    assert set(held) == {(0, "x"), (1, "x")}
    assert held[0, "x"].test_auroc > 0.95
    assert held[1, "x"].test_auroc < 0.05
    assert held[0, "x"].p == pytest.approx(1 / 501)
    assert tag_groups(findings) == {("letter=x",): [NEURONS[0]], ("not letter=x",): [NEURONS[1]]}


def test_what_fits_training_prompts_by_chance_does_not_hold():
    """Five hundred noise neurons, twelve prompts: many pass .8 in training, none survives q on test prompts."""
    rng = np.random.default_rng(0)
    labels = {"letter": ["x", "y"] * 6}
    neurons = [Signed(0, n, 1) for n in range(500)]
    findings = score_hypotheses(
        neurons, rng.normal(size=(12, 500)), labels, rng.normal(size=(12, 500)), labels
    )
    assert len(findings) > 20
    assert not [one for one in findings if one.holds]
    assert all(one.q >= one.p for one in findings)


def test_permutation_p_of_clustered_prompts_keeps_its_level():
    """Features that follow a noun and say nothing of the class: shuffling prompts finds what is not there."""
    rng = np.random.default_rng(0)
    noun = np.repeat(np.arange(24), np.resize([3, 8], 24))
    inside = (np.arange(24) < 12)[noun]
    features = rng.normal(size=(24, 400))[noun] + 0.3 * rng.normal(size=(len(noun), 400))
    rates = [
        float((permutation_auroc(features, inside, 400, rng, clusters)[1] <= 0.05).mean())
        for clusters in (noun.astype(str).tolist(), None)
    ]
    assert rates[0] <= 0.08  # of 400, two standard errors are 0.022
    assert rates[1] >= 0.25


def test_labels_are_shuffled_over_whole_clusters_and_within_mixed_ones():
    inside = np.array([True, True, False, False, True, False, True, False])
    clusters = ["a", "a", "b", "b", "c", "c", "d", "e"]
    draws = permuted_labels(inside, 200, np.random.default_rng(0), clusters)
    assert (draws[:, 0] == draws[:, 1]).all()
    assert (draws[:, 2] == draws[:, 3]).all()
    assert (draws[:, 4:6].sum(1) == 1).all()  # the mixed one keeps its count
    assert (draws[:, [0, 2, 6, 7]].sum(1) == 2).all()
    assert 0.3 < draws[:, 0].mean() < 0.7
    assert 0.3 < draws[:, 4].mean() < 0.7


def test_permutation_p_counts_draws_as_far_from_a_half():
    rng = np.random.default_rng(3)
    features, inside = rng.normal(size=(20, 3)), np.arange(20) < 6
    features[:, 2] = 1.0  # ties: a half, and no draw is nearer
    observed, p = permutation_auroc(features, inside, 400, np.random.default_rng(1))
    np.testing.assert_allclose(observed, auroc(features.T, np.broadcast_to(inside, (3, 20))))
    assert p[2] == 1.0
    draws = np.random.default_rng(1).permuted(np.broadcast_to(inside, (400, 20)), axis=1)
    far = [abs(auroc(features[:, 0], draw) - 0.5) >= abs(observed[0] - 0.5) - 1e-12 for draw in draws]
    assert p[0] == pytest.approx((1 + sum(far)) / 401)


def test_classes_too_small_to_judge_are_left_out():
    train, test = classes(25, 1, 9.0), classes(10, 2, 9.0)  # two prompts a class in the test half
    assert score_hypotheses(NEURONS, *train, *test) == []
    with pytest.raises(UserError, match="labellings"):
        score_hypotheses(NEURONS, *train, test[0], {"other": test[1]["letter"]})
    with pytest.raises(ValueError, match="either side"):
        Thresholds(high=0.4)


def test_features_keep_signs_apart_and_sum_positions():
    scores = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 1, 3, 1)
    acts = torch.tensor([-1.0, 1.0, -2.0]).reshape(1, 1, 3, 1)
    features = signed_features(scores, acts)
    assert features[:, 0, 0, 0].tolist() == [5.0, 2.0]
    names, mask = strongest_features(features, 1)
    assert names == [Signed(0, 0, -1)]
    assert chosen_features(features, mask).tolist() == [[5.0]]


# --- descriptions ---


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
def test_words_from_the_weights_agree_with_those_at_a_prompt(family, any_of, problem_of):
    """With the norms frozen, a neuron's effect on the logits is the weights' direction times a positive number."""
    model = any_of(family)
    network = problem_of(model).network.row(0)
    mask_LTN = torch.zeros_like(torch.stack(network.neurons, dim=1)[0], dtype=torch.bool)
    mask_LTN[:, 3, :4] = True
    neurons = Neurons.from_mask(mask_LTN)
    acts_n = neurons.gather(torch.stack(network.neurons, dim=1)[0])
    signed = [
        Signed(layer, index, 1 if act > 0 else -1)
        for layer, index, act in zip(
            neurons.layer_n.tolist(), neurons.index_n.tolist(), acts_n.tolist(), strict=True
        )
    ]
    cosine_n = torch.cosine_similarity(
        write_logits(network, neurons), vocabulary_effects(model, signed).double()
    )
    torch.testing.assert_close(cosine_n, torch.ones_like(cosine_n), rtol=0, atol=1e-6)
    assert describe_weights(model, []) == []
    assert all(line.startswith("raises ") for line in describe_weights(model, signed))


def test_contexts_are_the_strongest_places(llama):
    texts = ["abcab", "xyz", "hello there", "aa"]
    neurons = [Signed(1, 5, 1), Signed(1, 5, -1)]
    every = contexts_of(llama, texts, neurons, batch_size=3)
    acts = [neuron_activations(llama, llama.encode([text]))[0, 1, :, 5] for text in texts]
    for neuron in neurons:
        for context, act_T in zip(every[neuron], acts, strict=True):
            torch.testing.assert_close(
                torch.tensor(context.activations),
                (neuron.sign * act_T).clamp_min(0).float(),
                check_dtype=False,
            )
        peaks = [context.peak for context in firing_contexts(llama, texts, neurons, 2)[neuron]]
        assert peaks == pytest.approx(sorted((context.peak for context in every[neuron]), reverse=True)[:2])
    assert Context((" a", " b", " c"), (0.1, 2.0, 1.0)).marked() == " a<< b>><< c>>"
    assert Context(("a",), (0.0,)).marked() == "a"


class Letters:
    """A generator that explains by the first marked letter and judges by whether a text has the phrase's letter."""

    def generate(self, requests, sampling):
        return [
            [Completion(self.answer(request.prompt[0]["content"]), [], [], "stop")] for request in requests
        ]

    def answer(self, text):
        if "<<" in text and "what does it fire at" in text:
            return f"the letter {text.split('- ')[1].split('<<')[1][0]}\nand so on"
        letter = text.split('"')[1][-1]
        return "Yes." if letter in text.split("text?\n\n")[1].split("\n\n")[0] else "no"

    def close(self):
        pass


def test_a_language_models_description_is_scored_on_other_contexts():
    def context(text):
        return Context(tuple(text), tuple(float(letter == "z") for letter in text))

    train, held_out = (
        [context("abz"), context("zz")],
        [context("xyz"), context("abc"), context("bz"), context("d")],
    )
    (phrase,) = explain(Letters(), [train], ["raises 'q'"])
    assert phrase == "the letter z"
    assert score(Letters(), phrase, held_out) == 1.0
    assert score(Letters(), "the letter b", held_out) == 0.5
    with pytest.raises(UserError, match="some in which"):
        score(Letters(), phrase, [context("zz")])
    with pytest.raises(UserError, match="1 lines of words for 2"):
        explain(Letters(), [train, train], ["raises 'q'"])


# --- steering ---


@pytest.fixture
def letter_pairs(llama):
    rows = [("abcd", "abce"), ("xyzw", "xyzv"), ("hijk", "hijl")]
    return collate(llama, [Example(Pair(a, b, "x", "y", ""), (a,), {}) for a, b in rows])


def test_a_factor_of_one_changes_nothing_and_controls_stand_beside(llama, letter_pairs):
    nodes = [Node(1, 2, 3), Node(1, 2, 4), Node(2, None, 5)]
    neutral = llama.encode(["some other text"])
    points = sweep(llama, letter_pairs, nodes, [1.0, 0.0], neutral, controls=2)
    assert [(p.nodes, p.factor) for p in points] == [
        (name, factor) for factor in (1.0, 0.0) for name in ("chosen", "random", "strength-matched")
    ]
    before = answer(llama, letter_pairs)
    for point in points[:3]:
        assert point.kl == pytest.approx(0, abs=1e-9)
        assert point.probability.estimate == pytest.approx(float(before.answer_probability_B.mean()))
    after = answer(llama, letter_pairs, scale_nodes(nodes, 0.0))
    assert points[3].probability.estimate == pytest.approx(float(after.answer_probability_B.mean()))
    assert points[3].kl > 0


def test_strength_matched_controls_are_neighbours_in_strength(llama, letter_pairs):
    strength_LTN = write_strength(llama, letter_pairs.clean)
    acts_LTN = neuron_activations(llama, letter_pairs.clean).abs().mean(0)
    column_D = llama.architecture.block(1).W_down[:, 7].detach()
    assert float(strength_LTN[1, 2, 7]) == pytest.approx(float(acts_LTN[1, 2, 7] * column_D.norm()))
    nodes = [Node(1, 2, 7), Node(1, 2, 8)]
    ranks = strength_LTN[1, 2].argsort().argsort()
    for seed in range(5):
        drawn = strength_matched(nodes, strength_LTN, seed, among=4)
        assert len({*drawn, *nodes}) == 4
        for node, control in zip(nodes, drawn, strict=True):
            assert control[:2] == node[:2]
            assert abs(int(ranks[control.neuron] - ranks[node.neuron])) <= 8


def test_generation_goes_on_under_the_edit(llama):
    prompts = ["abc", "xyz"]
    _, plain = saying(llama, prompts, ["", ""], [], max_tokens=5)
    rate, same = saying(
        llama, prompts, [plain[0], "nothing like it"], scale_nodes([Node(1, None, 3)], 1.0), 5
    )
    assert same == plain
    assert rate == 0.5
    everything = [Node(layer, None, neuron) for layer in range(3) for neuron in range(96)]
    _, other = saying(llama, prompts, ["", ""], scale_nodes(everything, -2.0), max_tokens=5)
    assert other != plain


# --- files ---


def test_supernodes_are_written_and_read_again(tmp_path, llama):
    profiles = [planted(seed) for seed in range(4)]
    model = SimpleNamespace(tokenizer=llama.tokenizer, architecture=llama.architecture)
    neurons = [Signed(n % 3, n, 1) for n in range(18)]
    profiles = [Profile(tuple(neurons), p.attribution_nT, p.contribution_nK, p.token_ids) for p in profiles]
    found = from_clusters(model, cluster(profiles, neurons, [3], halvings=2), profiles, 0.5)
    assert sum(len(one.nodes) for one in found.supernodes) == 18
    assert all(" -> " in one.label for one in found.supernodes)
    assert read_supernodes(write_supernodes(tmp_path / "supernodes.json", found)) == found
    by_hand = Supernodes([Supernode("mine", [(0, None, 3, -1), (1, 2, 4, 0)])])
    assert read_supernodes(write_supernodes(tmp_path / "mine.json", by_hand)) == by_hand


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"supernodes": [{"label": "x"}]}', '{"supernodes": [], "extra": 1}']
)
def test_a_file_that_holds_no_supernodes_is_refused(tmp_path, text):
    path = tmp_path / "supernodes.json"
    path.write_text(text)
    with pytest.raises(UserError, match="supernodes"):
        read_supernodes(path)


def test_findings_are_plain_rows():
    row = Finding(Signed(0, 1, -1), "letter", "x", 0.9, 0.9, 0.01, 0.02, holds=True)
    assert str(row.neuron) == "L0/N1-"
