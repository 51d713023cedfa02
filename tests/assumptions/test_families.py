"""Families of probes against plain scikit-learn, calibration against closed forms, several blocks side by side."""

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import PLSRegression
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from assumptions.calibration import Calibration, calibrate, calibration_error
from assumptions.chats import Chat
from assumptions.dimensions import NAMES
from assumptions.families import FAMILIES, deviance_explained, family
from assumptions.features import Features
from assumptions.organism import plant
from assumptions.probe_files import load_probes, save_probes
from assumptions.probes import fit_probes
from assumptions.rows import InMemory
from assumptions.splits import group_split, row_hash
from assumptions.steering import probe_direction
from shared.errors import UserError


def features_of(*blocks):
    rows = [Chat(str(i), f"row {i}") for i in range(len(blocks[0]))]
    sites = tuple(f"blocks.{b}.output" for b in range(len(blocks)))
    return rows, Features(sites, torch.stack(blocks), "user", tuple(row_hash(row) for row in rows), "r", "f")


class TestFamilies:
    def test_every_number_of_components_comes_from_one_fit_as_sklearn_fits_it_alone(self):
        planted = plant(120, 20, seed=1)
        rows, resid = range(120), (planted.resid_BD * torch.linspace(0.1, 9, 20)).numpy()
        targets = planted.latents_BK[:, :3]
        for count, read in FAMILIES["pls"].path(
            InMemory(torch.from_numpy(resid)), rows, targets, (1.0, 2.0, 5.0, 12.0)
        ):
            for k in range(3):
                alone = make_pipeline(StandardScaler(), PLSRegression(n_components=int(count), scale=False))
                expected = alone.fit(resid, targets[:, k].numpy()).predict(resid).ravel()
                found = read.predict(torch.from_numpy(resid))[:, k].numpy()
                np.testing.assert_allclose(found, expected, atol=1e-8)

    def test_components_beyond_the_rank_are_left_out(self):
        planted = plant(40, 12, seed=2)
        path = FAMILIES["pls"].path(
            InMemory(planted.resid_BD), range(6), planted.latents_BK[:6], (1.0, 5.0, 6.0, 12.0)
        )
        assert [count for count, _ in path] == [1, 5]

    def test_logistic_on_labels_of_zero_and_one_is_sklearns(self):
        planted = plant(200, 16, seed=3)
        labels = (planted.latents_BK[:, :2] > 0.5).double()
        resid = planted.resid_BD.numpy()
        for strength, read in FAMILIES["logistic"].path(
            InMemory(planted.resid_BD), range(200), labels, (1.0, 100.0)
        ):
            for k in range(2):
                plain = make_pipeline(
                    StandardScaler(), LogisticRegression(C=1 / strength, tol=1e-8, max_iter=5000)
                )
                expected = plain.fit(resid, labels[:, k].numpy()).decision_function(resid)
                np.testing.assert_allclose(read.predict(planted.resid_BD)[:, k].numpy(), expected, atol=0.02)

    def test_logistic_on_scores_finds_the_log_odds_they_came_from(self):
        """Scores are outcomes by weight: without noise the fit is the planted function itself."""
        draw = torch.Generator().manual_seed(0)
        resid = torch.randn(400, 5, generator=draw, dtype=torch.float64)
        log_odds = resid @ torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0], dtype=torch.float64) + 0.3
        labels = torch.sigmoid(log_odds)[:, None]
        [(_, read)] = FAMILIES["logistic"].path(InMemory(resid), range(400), labels, (1e-4,))
        torch.testing.assert_close(read.predict(resid)[:, 0], log_odds, atol=0.02, rtol=0.02)
        assert float(deviance_explained(log_odds[:, None], labels)[0]) == pytest.approx(1.0)
        level = torch.full_like(labels, float(labels.mean().logit()))
        assert float(deviance_explained(level, labels)[0]) == pytest.approx(0.0)
        assert torch.isnan(deviance_explained(level, torch.full_like(labels, 0.5))).all()

    @pytest.mark.parametrize("name", list(FAMILIES))
    def test_every_family_finds_the_planted_block_is_saved_and_steers_along_it(self, name, tmp_path):
        planted = plant(900, 24, noise=0.15, seed=4)
        noise = torch.randn(900, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        rows, features = features_of(noise, planted.resid_BD)
        split = group_split(rows)
        probes, _ = fit_probes(features, planted.latents_BK, NAMES, split, "latents", kind=name)
        save_probes(tmp_path, probes)
        loaded = load_probes(tmp_path)
        for k, one in enumerate(loaded.probes.values()):
            assert (one.family, one.block) == (name, 1)
            assert float(probe_direction(one).unit_D @ planted.directions_KD[k]) > 0.9
            predicted, truth = one.predict(features, split.test), planted.latents_BK[split.test, k]
            assert 1 - float((predicted - truth).square().mean() / truth.var()) > 0.6
            assert one.score(features).equal(probes.probes[one.dimension].score(features))
            assert calibration_error(one.score(features, split.test), truth) < 0.06

    def test_an_unknown_family_is_named(self):
        with pytest.raises(UserError, match="ridge, pls, logistic"):
            family("lasso")


class TestSeveralBlocks:
    def test_what_two_blocks_hold_together_is_read_from_both(self, tmp_path):
        """The score is the sum of what either block knows: only side by side can it be read."""
        draw = torch.Generator().manual_seed(0)
        first, second = (torch.randn(600, 8, generator=draw, dtype=torch.float64) for _ in range(2))
        labels = torch.sigmoid(first[:, :1] + second[:, :1])
        rows, features = features_of(first, second)
        split = group_split(rows)
        alone = [(site,) for site in features.sites]
        [probe] = fit_probes(features, labels, ["sum"], split, "made")[0].probes.values()
        assert probe.r2_validation < 0.7
        together, chosen = fit_probes(
            features, labels, ["sum"], split, "made", candidates=[*alone, features.sites]
        )
        probe = together.probes["sum"]
        assert probe.sites == features.sites
        assert probe.blocks == (0, 1)
        assert probe.r2_validation == chosen[0].curve[2] > 0.9
        with pytest.raises(UserError, match="no single direction"):
            probe_direction(probe)
        save_probes(tmp_path, together)
        assert load_probes(tmp_path).probes["sum"].score(features).equal(probe.score(features))

    def test_where_one_block_knows_it_all_that_block_is_taken(self):
        planted = plant(400, 12, noise=0.1, seed=5)
        rows, features = features_of(planted.resid_BD, torch.randn(400, 12).double())
        candidates = [("blocks.0.output",), ("blocks.1.output",), features.sites]
        probes, _ = fit_probes(
            features, planted.latents_BK, NAMES, group_split(rows), "latents", candidates=candidates
        )
        assert {probe.sites for probe in probes.probes.values()} == {("blocks.0.output",)}


class TestCalibration:
    values = torch.linspace(-3, 4, 500, dtype=torch.float64)

    def test_platt_recovers_the_curve_that_made_the_scores(self):
        fitted = calibrate("platt", self.values, torch.sigmoid(1.7 * self.values - 0.4))
        assert (fitted.slope, fitted.offset) == (pytest.approx(1.7, rel=1e-2), pytest.approx(-0.4, abs=1e-2))

    @pytest.mark.parametrize("method", ["linear", "platt", "isotonic"])
    def test_scores_lie_in_the_unit_interval_and_rise_with_the_value(self, method):
        noisy = (torch.sigmoid(self.values) + 0.2 * torch.randn(500, dtype=torch.float64)).clamp(0, 1)
        fitted = calibrate(method, self.values, noisy)
        scores = fitted(torch.linspace(-50, 50, 1001, dtype=torch.float64))
        assert ((scores >= 0) & (scores <= 1)).all()
        assert (scores.diff() >= 0).all()

    @pytest.mark.parametrize("method", ["linear", "platt", "isotonic"])
    def test_a_distorted_read_out_is_put_right(self, method):
        """Shrunk and shifted read-outs, as a strong ridge gives them, come back to the scores' own scale."""
        draw = torch.Generator().manual_seed(0)
        truth = torch.rand(2000, generator=draw, dtype=torch.float64)
        values = 5 + 0.1 * truth + 0.005 * torch.randn(2000, generator=draw, dtype=torch.float64)
        fitted = calibrate(method, values[:1000], truth[:1000])
        assert calibration_error(fitted(values[1000:]), truth[1000:]) < 0.03
        assert calibration_error(values.clamp(0, 1)[1000:], truth[1000:]) > 0.4

    def test_a_read_out_against_the_scores_is_made_flat_never_turned(self):
        falling = torch.sigmoid(-self.values)
        for method in ("linear", "platt"):
            fitted = calibrate(method, self.values, falling)
            assert fitted.slope == 0.0
            assert float(fitted(self.values)[0]) == pytest.approx(float(falling.mean()))
            with pytest.raises(UserError, match="calibration is flat"):
                fitted.inverse(0.5)

    def test_linear_is_the_regression_of_the_scores_on_the_values(self):
        truth = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        values = 3 * truth + torch.sin(50 * truth)
        line = LinearRegression().fit(values.numpy()[:, None], truth.numpy())
        fitted = calibrate("linear", values, truth)
        assert (fitted.slope, fitted.offset) == (pytest.approx(line.coef_[0]), pytest.approx(line.intercept_))

    def test_the_inverse_is_the_value_that_has_the_score(self):
        noisy = (torch.sigmoid(self.values) + 0.1 * torch.randn(500, dtype=torch.float64)).clamp(0, 1)
        for method in ("linear", "platt", "isotonic"):
            fitted = calibrate(method, self.values, noisy)
            for score in (0.3, 0.5, 0.8):
                value = torch.tensor([fitted.inverse(score)], dtype=torch.float64)
                assert float(fitted(value)[0]) == pytest.approx(score, abs=1e-6)
        with pytest.raises(UserError, match="between 0 and 1"):
            Calibration("platt").inverse(1.0)
        assert Calibration("isotonic", knots=((0.0, 0.2), (1.0, 0.2), (2.0, 0.9))).inverse(0.2) == 0.5

    def test_labels_outside_the_unit_interval_are_refused(self):
        rows, features = features_of(torch.randn(60, 4))
        labels = torch.rand(60, 1) * 5
        with pytest.raises(UserError, match=r"scores in \[0, 1\]"):
            fit_probes(features, labels, ["x"], group_split(rows), "made")
