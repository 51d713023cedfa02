"""What stands beside a probe: text baselines, partial R2, stability of directions, intervals, transfer to a source."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression

from assumptions.baselines import BASELINES, baseline_scores, length_format, sentence_embeddings
from assumptions.chats import Chat
from assumptions.dimensions import NAMES
from assumptions.evaluation import evaluate_probes, leave_one_source_out_scores
from assumptions.features import Features
from assumptions.metrics import figures, intervals
from assumptions.organism import filter_cosine, pattern_cosine, plant, signal_share
from assumptions.probes import fit_probes
from assumptions.residual import orthonormal, partial_r2
from assumptions.rows import InMemory
from assumptions.splits import Split, component_ids, group_split, row_hash
from assumptions.stability import split_half
from shared.errors import UserError

THIRDS = Split(list(range(600)), list(range(600, 900)), list(range(900, 1200)))


def texts(count, seed=0):
    draw = np.random.default_rng(seed)
    words = ("rent", "job", "praise", "critique", "team")
    return [
        Chat(str(i), " ".join(draw.choice(words, size=draw.integers(2, 40))), source="ab"[i % 2])
        for i in range(count)
    ]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestBaselines:
    def test_each_reads_what_it_is_for(self):
        """Length, words, pairs of words and source: each label is known to one reader and hidden from another."""
        draw = np.random.default_rng(0)
        rows = [
            replace(chat, turn=chat.turn + (" not good" if n == g else " good not"), source="ab"[s])
            for chat, n, g, s in zip(texts(1200), *(draw.integers(0, 2, 1200) for _ in range(3)))
        ]
        labels = torch.tensor(
            [
                [len(c.turn) / 400, c.turn.count("praise") / 20, "not good" in c.turn, c.source == "a"]
                for c in rows
            ]
        ).double()
        found = baseline_scores(rows, labels, THIRDS)
        length, praise, order, source = range(4)
        assert found.r2["length_format"][length] > 0.99
        assert found.r2["bag_of_words"][praise] > 0.99
        assert found.r2["tfidf"][order] > 0.8
        assert found.r2["source"][source] > 0.99
        assert found.r2["bag_of_words"][order] < 0.1  # the same words in either order
        assert max(found.r2["source"][:3]) < 0.1
        assert found.skipped == {"sentence_embedding": "no encoder was named"}

    def test_the_source_baseline_is_the_source_means(self):
        rows = texts(300)
        labels = torch.tensor([[0.8 if chat.source == "a" else 0.3] for chat in rows]) + 0.05 * noise(300, 1)
        split = Split(list(range(180)), list(range(180, 240)), list(range(240, 300)))
        means = {name: labels[[i for i in split.train if rows[i].source == name]].mean() for name in "ab"}
        guess = torch.stack([means[rows[i].source] for i in split.test])
        truth = labels[split.test, 0]
        expected = 1 - float((truth - guess).square().sum() / (truth - truth.mean()).square().sum())
        assert baseline_scores(rows, labels, split, strengths=(1e-6,)).r2["source"][0] == pytest.approx(
            expected, abs=1e-4
        )

    def test_vocabularies_come_from_training_rows_alone(self):
        rows = [Chat("0", "rent job"), Chat("1", "job rent"), Chat("2", "unseen words"), Chat("3", "unseen")]
        split = Split([0, 1], [2], [3])
        for name in ("bag_of_words", "tfidf"):
            assert not BASELINES[name](rows, split)[2:].any()

    def test_length_and_format_know_no_word(self):
        """Every letter replaced by another of its case and kind: the features are the same."""
        rows = texts(5)
        other = [
            replace(chat, turn=chat.turn.translate(str.maketrans("abcdeijo", "bcdafkli"))) for chat in rows
        ]
        assert length_format(rows).equal(length_format(other))
        assert not length_format(rows).equal(length_format([replace(c, turn=c.turn + "?") for c in rows]))

    def test_sentence_embeddings_do_not_depend_on_the_batch(self, tmp_path):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

        vocabulary = {
            name: i for i, name in enumerate(("[PAD]", "[UNK]", "rent", "job", "praise", "critique", "team"))
        }
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
        ).save_pretrained(tmp_path)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
        BertModel(config).save_pretrained(tmp_path)
        rows = [chat.turn for chat in texts(9)]
        together, alone = (sentence_embeddings(str(tmp_path), rows, size) for size in (9, 1))
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.norm(dim=1), torch.ones(9, dtype=torch.float64))
        with pytest.raises(UserError, match="no sentence encoder could be loaded"):
            sentence_embeddings(str(tmp_path / "nothing"), rows)


class TestPartialR2:
    def test_a_label_of_length_alone_has_none_although_its_probe_reads_it(self):
        rows = texts(1200)
        nuisance = length_format(rows)
        length = (nuisance[:, :1] - nuisance[:, 0].mean()) / nuisance[:, 0].std()
        planted = plant(1200, 12, noise=0.1, seed=1)
        place = InMemory(torch.cat([planted.resid_BD, length + 0.01 * noise(1200, 1)], dim=1))
        of_length = torch.sigmoid(length[:, 0]) + 0.05 * noise(1200, seed=2)
        labels = torch.stack([of_length, planted.latents_BK[:, 0]], dim=1)
        by_length, free = partial_r2(place, nuisance, labels, THIRDS)
        assert abs(by_length) < 0.05
        assert free == pytest.approx(signal_share(1.0, 0.1), abs=0.03)

    def test_it_is_that_of_the_joint_least_squares_regression(self):
        """Frisch, Waugh and Lovell, by brute force: with both against nuisances alone, on the test rows."""
        nuisance, resid = noise(1200, 4, seed=3), noise(1200, 6, seed=4)
        resid = resid + nuisance @ noise(4, 6, seed=5)
        labels = nuisance @ noise(4, 2, seed=6) + resid @ noise(6, 2, seed=7) + noise(1200, 2, seed=8)
        found = partial_r2(InMemory(resid), nuisance, labels, THIRDS, strengths=(1e-8,))
        train, test = THIRDS.train, THIRDS.test
        both = torch.cat([nuisance, resid], dim=1).numpy()
        for k in range(2):
            errors = []
            for columns in (nuisance.numpy(), both):
                fitted = LinearRegression().fit(columns[train], labels[train, k].numpy())
                errors.append(np.square(labels[test, k].numpy() - fitted.predict(columns[test])).sum())
            assert found[k] == pytest.approx(1 - errors[1] / errors[0], abs=1e-6)

    def test_nothing_is_left_of_a_label_that_is_a_nuisance(self):
        rows = texts(1200)
        nuisance = length_format(rows)
        assert partial_r2(InMemory(noise(1200, 5)), nuisance, nuisance[:, :2] / 500, THIRDS) == [0.0, 0.0]

    def test_constant_and_redundant_nuisances_are_dropped(self):
        one = noise(1200, 1)
        columns = orthonormal(torch.cat([one, 2 * one, torch.ones(1200, 1), one + 3], dim=1), THIRDS.train)
        assert columns.shape == (1200, 1)
        assert float(columns[THIRDS.train].square().sum()) == pytest.approx(1.0)


class TestStability:
    @pytest.mark.parametrize(("rows", "width"), [(4000, 96), (2000, 256)])
    def test_halves_agree_as_far_as_the_formulas_say(self, rows, width):
        """Each half has the formula's cosine with the planted direction; with each other, its square (rung A)."""
        spread = math.sqrt(1 / 12 * (1 / 0.703 - 1))
        planted = plant(rows, width, noise=spread, seed=rows)
        found = split_half(
            InMemory(planted.resid_BD), range(rows), range(rows), planted.latents_BK, [1e-6] * 9, halvings=2
        )
        rho = signal_share(1.0, spread)
        assert np.mean([one.filter for one in found]) == pytest.approx(
            filter_cosine(rho, rows // 2, width) ** 2, abs=0.02
        )
        assert np.mean([one.pattern for one in found]) == pytest.approx(
            pattern_cosine(rho, rows // 2, width) ** 2, abs=0.02
        )

    def test_labels_without_information_give_unrelated_halves(self):
        found = split_half(InMemory(noise(400, 60)), range(400), range(400), noise(400, 3), [1.0] * 3)
        assert abs(np.mean([one.filter for one in found])) < 0.15

    def test_groups_stay_in_one_half(self):
        """Were the copies dealt out to both halves, noise would agree with itself."""
        copies, labels = noise(60, 40).repeat(10, 1), noise(60, 1, seed=1).repeat(10, 1)
        groups = list(range(60)) * 10
        whole, torn = (
            split_half(InMemory(copies), range(600), keys, labels, [1.0], halvings=6)[0].pattern
            for keys in (groups, range(600))
        )
        assert abs(whole) < 0.4 < 0.8 < torn


class TestIntervals:
    def test_intervals_hold_the_figures_and_widen_with_copies(self):
        """Ten copies of a row are one observation: drawn by group, they narrow nothing."""
        truth = torch.rand(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        predicted = (truth + 0.2 * noise(80)).clamp(0, 1)
        once = intervals(predicted, truth, range(80))
        point = figures(predicted, truth, ["a"] * 80)
        for name in ("r2", "spearman"):
            interval = getattr(once, name)
            assert interval.estimate == pytest.approx(getattr(point, name))
            assert interval.low < interval.estimate < interval.high
        assert once.auroc.estimate == pytest.approx(point.auroc.auroc)
        copied = [values.repeat(10) for values in (predicted, truth)]
        grouped, naive = intervals(*copied, list(range(80)) * 10), intervals(*copied, range(800))
        width = {
            name: one.r2.high - one.r2.low
            for name, one in (("once", once), ("grouped", grouped), ("naive", naive))
        }
        assert width["grouped"] == pytest.approx(width["once"], rel=0.25)
        assert width["naive"] < 0.5 * width["once"]

    def test_without_two_classes_there_is_no_interval(self):
        middle = torch.full((20,), 0.5, dtype=torch.float64)
        none = intervals(noise(20), middle, range(20))
        assert none == (None, None, None)

    def test_components_number_groups_and_copies(self):
        rows = [Chat("0", "a", group="x"), Chat("1", "b", group="x"), Chat("2", "B"), Chat("3", "c")]
        ids = component_ids(rows)
        assert ids[0] == ids[1] == ids[2] != ids[3]


class TestOtherSources:
    def study(self, shared_direction):
        """Two sources whose scores lie along the same direction of the residual stream, or along different ones."""
        first, second = (plant(500, 12, noise=0.1, seed=s) for s in (1, 1 if shared_direction else 2))
        other = plant(500, 12, noise=0.1, seed=9)
        moved = other.latents_BK @ second.directions_KD + 0.1 * noise(500, 12)
        resid = torch.cat([first.resid_BD, moved - 0.5 * second.directions_KD.sum(0)])
        labels = torch.cat([first.latents_BK, other.latents_BK])
        rows = [Chat(str(i), f"row {i}", source="ab"[i >= 500]) for i in range(1000)]
        hashes = tuple(row_hash(row) for row in rows)
        return rows, Features(("blocks.0.output",), resid[None], "user", hashes, "r", "f"), labels

    def test_a_probe_transfers_where_the_direction_does(self):
        for shared_direction in (True, False):
            rows, features, labels = self.study(shared_direction)
            scores = leave_one_source_out_scores(features, labels, NAMES, rows, "latents")
            assert set(scores) == {"a", "b"}
            found = [one.spearman for by_name in scores.values() for one in by_name.values()]
            assert (min(found) > 0.8) if shared_direction else (np.mean(found) < 0.5)


def test_a_study_reports_all_of_it():
    """Rung A: ceiling, controls, partial R2, stability, calibration and intervals of one evaluation."""
    planted = plant(4000, 24, noise=0.2, seed=7)
    rows = texts(4000)
    hashes = tuple(row_hash(row) for row in rows)
    features = Features(("blocks.0.output",), planted.resid_BD[None], "user", hashes, "r", "f")
    split = group_split(rows)
    probes, chosen = fit_probes(features, planted.latents_BK, NAMES, split, "latents")
    scores = list(
        evaluate_probes(features, planted.latents_BK, probes, chosen, split, rows, shuffles=2).values()
    )
    ceiling = signal_share(1.0, 0.2)
    assert np.mean([one.r2 for one in scores]) == pytest.approx(ceiling, abs=0.02)
    assert np.mean([one.partial_r2 for one in scores]) == pytest.approx(ceiling, abs=0.03)
    for one in scores:
        assert one.intervals.r2.low < one.r2 < one.intervals.r2.high
        assert max(one.baselines.values()) < 0.1
        assert one.r2_bag_of_words == one.baselines["bag_of_words"]
        assert one.stability.filter > 0.8
        assert one.calibration_error < 0.06
