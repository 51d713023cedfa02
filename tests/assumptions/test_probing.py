"""Probes and directions on tiny random models: one site to read and write, padding, groups, files, exact doses."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from assumptions.baselines import baseline_scores
from assumptions.chats import Chat, read_chats
from assumptions.dimensions import NAMES
from assumptions.directions import fitted_direction
from assumptions.evaluation import evaluate_probes
from assumptions.features import Features, block_outputs, capture_features, pool
from assumptions.form_shift import form_shifts
from assumptions.metrics import extremes_auroc
from assumptions.organism import plant
from assumptions.probe_files import load_probes, save_probes
from assumptions.probes import fit_probes
from assumptions.rendering import render, rendering_hash
from assumptions.rows import blocks_in_memory
from assumptions.selection import shuffled_searches
from assumptions.splits import Split, group_split, leave_one_source_out, row_hash
from assumptions.steering import cosines, pattern_direction, probe_direction, random_directions
from shared.errors import UserError
from shared.hooks import capture, edit
from shared.interventions import load_interventions, save_interventions
from shared.models import load
from shared.stats import spearman

WORDS = ("rent", "job", "praise", "critique", "team", "advice", "tears", "money")


@pytest.fixture(scope="module")
def model():
    return load("random:llama")


def chats(count, seed=0):
    draw = np.random.default_rng(seed)
    texts = [" ".join(draw.choice(WORDS, size=draw.integers(2, 12))) + f" {i}" for i in range(count)]
    return [Chat(f"c{i}", text, group=f"g{i}", source="made") for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def study(model):
    """Chats, their features, nine labels that depend on block 1, and the probes fitted on them."""
    rows = chats(90)
    features = capture_features(model, rows)
    draw = torch.Generator().manual_seed(0)
    target_D9 = torch.randn(features.pooled_LBD.shape[-1], 9, generator=draw)
    raw_B9 = features.pooled_LBD[1] @ target_D9
    labels = torch.sigmoid((raw_B9 - raw_B9.mean(0)) / raw_B9.std(0)).double()
    split = group_split(rows, seed=0)
    probes, chosen = fit_probes(features, labels, NAMES, split, labeller="made-v1")
    return rows, features, labels, split, probes, chosen


class TestCapture:
    def test_block_outputs_are_the_hidden_states_after_each_block(self, model):
        """T1: block b is hidden_states[b + 1] for every block but the last."""
        rows = chats(3)
        batch = model.encode([chat.messages for chat in rows])
        with torch.no_grad():
            hidden = model.hf(
                input_ids=batch.input_ids_BT,
                attention_mask=batch.attention_mask_BT,
                position_ids=batch.position_ids_BT,
                output_hidden_states=True,
            ).hidden_states
        features = capture_features(model, rows, span="last")
        for block in range(model.architecture.n_layers - 1):
            torch.testing.assert_close(features.pooled_LBD[block], hidden[block + 1][:, -1])

    def test_a_direction_is_added_where_the_probe_reads(self, model, study):
        """T1, T8: the read-out at the probe's own site moves by exactly alpha, at every position, for all nine."""
        rows, probes = study[0][:3], study[4]
        batch = model.encode([chat.messages for chat in rows])
        real_BT = batch.attention_mask_BT.bool()
        with torch.no_grad(), capture(model, block_outputs(model)) as before:
            model(batch)
        for probe in probes.probes.values():
            for make, dose, unit in (
                (probe_direction, -2.0, "proj_sd"),
                (pattern_direction, 0.1, "resid_norm"),
            ):
                direction = make(probe)
                with torch.no_grad(), capture(model, [probe.site]) as after:
                    with edit(model, direction.interventions(dose, unit)):
                        model(batch)
                moved_BT = (after[probe.site] - before[probe.site]) @ direction.unit_D.float()
                expected_BT = torch.full_like(moved_BT, direction.alpha(dose, unit))
                assert np.sign(direction.alpha(dose, unit)) == np.sign(dose)
                torch.testing.assert_close(moved_BT[real_BT], expected_BT[real_BT], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("span", ["user", "last", "prompt"])
    def test_batch_single_left_and_right_padding_are_equal(self, model, span):
        """T2, T3."""
        rows = chats(7, seed=1)
        batched = capture_features(model, rows, span, batch_size=7).pooled_LBD
        right = capture_features(model, rows, span, batch_size=4, padding_side="right").pooled_LBD
        single = capture_features(model, rows, span, batch_size=1).pooled_LBD
        torch.testing.assert_close(batched, single, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(right, single, atol=1e-5, rtol=1e-4)

    def test_all_blocks_come_from_one_pass(self, model):
        """T15."""
        passes = []
        handle = model.hf.register_forward_pre_hook(lambda *_: passes.append(1))
        try:
            capture_features(model, chats(6), batch_size=3)
        finally:
            handle.remove()
        assert len(passes) == 2

    def test_the_user_span_is_the_message_and_nothing_else(self, model):
        """T14: template tokens and BOS stay outside; the mean is over the message's own tokens."""
        from shared.tokens import encode_chat

        chat = chats(1)[0]
        encoded = encode_chat(model.tokenizer, chat.messages, add_generation_prompt=True)
        span = encoded.spans[-1]
        text = model.tokenizer.decode(encoded.ids[span.content_start : span.content_end])
        assert text.strip() == chat.turn
        with torch.no_grad(), capture(model, ["blocks.0.output"]) as acts:
            model(model.encode([chat.messages]))
        mean = acts["blocks.0.output"][0, span.content_start : span.content_end].mean(0)
        torch.testing.assert_close(capture_features(model, [chat]).pooled_LBD[0, 0], mean)

    def test_raw_text_is_another_form_with_one_bos(self, model):
        """T11, T13: the text alone, BOS once and outside the span; probes of one form refuse the other."""
        from shared.chat import encode_text

        for chat in [*chats(2), replace(chats(1)[0], history=({"role": "user", "content": "before"},))]:
            raw, templated = (render(model.tokenizer, chat, form) for form in ("raw", "chat"))
            assert raw.ids == encode_text(model.tokenizer, chat.turn)
            bos = model.tokenizer.bos_token_id
            for rendered in (raw, templated):
                assert rendered.ids.count(bos) == int(rendered.ids[0] == bos)
            ours = [rendered.ids[rendered.user.start : rendered.user.stop] for rendered in (raw, templated)]
            assert [model.tokenizer.decode(ids).strip() for ids in ours] == [chat.turn] * 2
        one = chats(1)
        with torch.no_grad(), capture(model, ["blocks.0.output"]) as acts:
            model(model.encode([one[0].turn]))
        user = render(model.tokenizer, one[0], "raw").user
        mean = acts["blocks.0.output"][0, user.start : user.stop].mean(0)
        torch.testing.assert_close(capture_features(model, one, form="raw").pooled_LBD[0, 0], mean)

    def test_pooling_is_in_float32_and_blind_to_padding(self):
        resid = torch.full((1, 600, 2), 1.0, dtype=torch.bfloat16)
        resid[0, 300:] = float("nan")
        mask = torch.zeros(1, 600, dtype=torch.bool)
        mask[0, :300] = True
        pooled = pool(resid, mask)
        assert pooled.dtype == torch.float32
        assert torch.equal(pooled, torch.ones(1, 2))

    def test_a_chat_beyond_the_context_is_refused(self, model):
        """T12."""
        limit = model.hf.config.max_position_embeddings
        with pytest.raises(UserError, match="1 of 2 chats exceed"):
            capture_features(model, [*chats(1), Chat("long", "rent " * 2 * limit)])


class TestSplits:
    @given(
        st.lists(st.tuples(st.integers(0, 12), st.integers(0, 25)), min_size=12, max_size=60),
        st.integers(0, 5),
    )
    @settings(deadline=None, max_examples=60)
    def test_groups_and_copies_stay_on_one_side(self, rows, seed):
        """T6: no group and no text is on two sides; the order of the rows does not matter."""
        made = [Chat(str(i), f"text {t}", group=f"g{g}") for i, (g, t) in enumerate(rows)]
        try:
            split = group_split(made, seed)
        except UserError:
            return  # everything is connected: there is no split
        side = {i: n for n, part in enumerate((split.train, split.validation, split.test)) for i in part}
        assert sorted(side) == list(range(len(made)))
        for i, one in enumerate(made):
            for j, other in enumerate(made[:i]):
                if one.group == other.group or one.turn == other.turn:
                    assert side[i] == side[j]
        backwards = group_split(made[::-1], seed)
        assert [len(made) - 1 - i for i in backwards.test][::-1] == split.test

    def test_a_planted_duplicate_lands_on_one_side(self):
        rows = chats(50)
        twin = replace(rows[3], id="twin", turn=rows[3].turn.upper(), group="other")
        split = group_split([*rows, twin])
        parts = (split.train, split.validation, split.test)
        assert [3 in part for part in parts] == [50 in part for part in parts]

    def test_shares_are_met(self):
        split = group_split(chats(100), validation=0.2, test=0.3)
        assert (len(split.train), len(split.validation), len(split.test)) == (50, 20, 30)

    def test_leave_one_source_out(self):
        rows = [replace(chat, source="ab"[i % 2]) for i, chat in enumerate(chats(40))]
        rows[0] = replace(rows[0], group="tied")
        rows[1] = replace(rows[1], group="tied")
        for source, split in leave_one_source_out(rows):
            assert {rows[i].source for i in split.test} == {source}
            assert {rows[i].source for i in (*split.train, *split.validation)} == {
                "b" if source == "a" else "a"
            }
            assert not {0, 1} & {*split.train, *split.validation}


class TestProbes:
    def test_saved_probes_predict_as_before_and_as_sklearn(self, study, model, tmp_path):
        """T7: intercept and norm survive; the reloaded probe gives scikit-learn's predictions to 1e-6."""
        from sklearn.linear_model import Ridge

        _, features, labels, split, probes, _ = study
        save_probes(tmp_path, probes)
        loaded = load_probes(tmp_path, model)
        for k, name in enumerate(NAMES):
            probe = loaded.probes[name]
            train = features.pooled_LBD[probe.block][split.train].double().numpy()
            ridge = Ridge(alpha=probe.strength).fit(train, labels[split.train][:, k].numpy())
            expected = ridge.predict(features.pooled_LBD[probe.block].double().numpy())
            np.testing.assert_allclose(probe.predict(features).numpy(), expected, atol=1e-6)
            assert probe.predict(features).equal(probes.probes[name].predict(features))
            assert ((probe.score(features) >= 0) & (probe.score(features) <= 1)).all()
        assert loaded.data_hash == probes.data_hash
        assert replace(loaded, probes={}) == replace(probes, probes={})

    def test_files_say_what_they_belong_to(self, study, model, tmp_path):
        """T26: dimension, block, site, labeller, template and data are in the card; other weights are refused."""
        import json

        from shared.models import ModelConfig

        save_probes(tmp_path, study[4])
        card = json.loads((tmp_path / "probes.json").read_text())
        assert card["labeller"] == "made-v1"
        assert card["probes"]["user_rightness"]["sites"] == [study[4].probes["user_rightness"].site]
        assert len(card["trained_on"]) == len(study[3].train) + len(study[3].validation)
        with pytest.raises(UserError, match="fingerprint"):
            load_probes(tmp_path, load(ModelConfig("random:llama", seed=1)))
        narrow = {
            name: tensor[:-1].clone() for name, tensor in load_file(tmp_path / "probes.safetensors").items()
        }
        save_file(narrow, tmp_path / "probes.safetensors")
        with pytest.raises(UserError, match=f"the model is {model.architecture.width} wide"):
            load_probes(tmp_path, model)
        with pytest.raises(UserError, match=r"no probes\.json"):
            load_probes(tmp_path / "elsewhere")

    def test_another_template_and_other_tensors_are_refused(self, study, model, tmp_path, monkeypatch):
        """The same weights under another template are other activations; a card vouches for its own tensors alone."""
        save_probes(tmp_path, study[4])
        template = model.tokenizer.chat_template
        with monkeypatch.context() as patched:
            patched.setattr(model.tokenizer, "chat_template", template.replace("<|start|>", "<|begin|>"))
            if rendering_hash(model.tokenizer) == study[4].rendering:
                pytest.fail("the template was not changed")
            with pytest.raises(UserError, match="another chat template"):
                load_probes(tmp_path, model)
        load_probes(tmp_path, model)
        tensors = load_file(tmp_path / "probes.safetensors")
        tensors["user_rightness.weight_D"] = -tensors["user_rightness.weight_D"]
        save_file(tensors, tmp_path / "probes.safetensors")
        with pytest.raises(UserError, match="weights_hash is not what the card states"):
            load_probes(tmp_path, model)

    def test_evaluation_on_training_rows_is_refused(self, study, model):
        """T23."""
        rows, features, _, split, probes, _ = study
        held = capture_features(model, [rows[i] for i in split.test])
        probes.check(held)
        with pytest.raises(UserError, match="used to fit"):
            probes.check(features)
        with pytest.raises(UserError, match="span"):
            probes.check(replace(held, span="last"))
        with pytest.raises(UserError, match="form 'chat', the features have 'raw'"):
            probes.check(capture_features(model, [rows[split.test[0]]], form="raw"))
        labels, chosen = study[2], study[5]
        swapped = Split(split.test, split.validation, split.train)
        with pytest.raises(UserError, match="used to fit"):
            evaluate_probes(features, labels, probes, chosen, swapped, rows)
        with pytest.raises(UserError, match="rendering"):
            evaluate_probes(replace(features, rendering="x"), labels, probes, chosen, split, rows)

    def test_the_shift_between_forms_is_that_of_the_read_outs(self, study, model):
        """T11: where probes would read another form than is steered, the difference is reported."""
        from sklearn.metrics import r2_score

        rows, features, labels, split, probes, _ = study
        held, truth = [rows[i] for i in split.test], labels[split.test]
        found = form_shifts(model, probes, features.rows(split.test), held, truth)
        raw = capture_features(model, held, form="raw")
        for k, name in enumerate(NAMES):
            probe, one = probes.probes[name], found[name]
            assert one.form == "raw"
            unit = probe.weight_D / probe.weight_D.norm()
            site = features.sites.index(probe.site)
            moved = (raw.pooled_LBD[site] - features.pooled_LBD[site][split.test]).double() @ unit
            assert one.shift == pytest.approx(float(moved.mean()) / probe.projection_sd, rel=1e-4, abs=1e-6)
            assert one.spread == pytest.approx(float(moved.std()) / probe.projection_sd, rel=1e-4, abs=1e-6)
            read = r2_score(truth[:, k].numpy(), probe.predict(raw).numpy())
            assert one.r2 == pytest.approx(read, rel=1e-6)
        assert max(one.spread for one in found.values()) > 0.01
        with pytest.raises(UserError, match="form 'chat', the features have 'raw'"):
            form_shifts(model, probes, raw, held, truth)

    def test_figures_stand_beside_their_controls(self, study):
        rows, features, labels, split, probes, chosen = study
        scores = evaluate_probes(features, labels, probes, chosen, split, rows)
        for name in NAMES:
            score = scores[name]
            assert score.block == probes.probes[name].block
            assert score.r2 > 0.5
            assert score.r2 > score.r2_shuffled
            assert len(score.curve) == model_blocks(features)
            assert score.auroc.auroc is None or score.auroc.auroc > 0.8

    def test_every_figure_has_its_control_under_shuffled_labels(self):
        """Where the rows say everything about the labels, shuffled labels go through the same figures and fail."""
        planted = plant(600, 16, noise=0.05, seed=3)
        rows = [Chat(str(i), f"row {i}", source="ab"[i % 2]) for i in range(600)]
        hashes = tuple(row_hash(row) for row in rows)
        features = Features(("blocks.0.output",), planted.resid_BD[None], "user", hashes, "r", "f")
        split = group_split(rows)
        probes, chosen = fit_probes(features, planted.latents_BK, NAMES, split, "latents")
        scores = evaluate_probes(
            features, planted.latents_BK, probes, chosen, split, rows, shuffles=8
        ).values()
        for score in scores:
            assert min(score.spearman, score.auroc.auroc, score.auroc_quantile.auroc) > 0.95
        assert -0.2 < np.mean([score.r2_shuffled for score in scores]) < 0.02
        assert abs(np.mean([score.spearman_shuffled for score in scores])) < 0.05
        assert np.mean([score.auroc_shuffled for score in scores]) == pytest.approx(0.5, abs=0.05)
        assert np.mean([score.auroc_quantile_shuffled for score in scores]) == pytest.approx(0.5, abs=0.05)
        [again] = shuffled_searches(
            blocks_in_memory(features.pooled_LBD), planted.latents_BK, split, 1, seed=4
        )
        one = evaluate_probes(features, planted.latents_BK, probes, chosen, split, rows, shuffles=1, seed=4)
        test = split.test
        for k, name in enumerate(NAMES):
            predicted = again.chosen[k].predict(features.pooled_LBD[0][test]).numpy()
            truth = again.targets_BK[test][:, k].numpy()
            assert one[name].spearman_shuffled == pytest.approx(spearman(predicted, truth))
            assert one[name].auroc_shuffled == extremes_auroc(predicted, truth).auroc
        none = evaluate_probes(features, planted.latents_BK, probes, chosen, split, rows, shuffles=0)
        assert np.isnan(none[NAMES[0]].spearman_shuffled)
        assert none[NAMES[0]].auroc_shuffled is None

    def test_bag_of_words_reads_words_but_not_negation(self):
        draw = np.random.default_rng(0)
        flags, negated = draw.random(300) < 0.5, draw.random(300) < 0.5
        plain = ["praise me" if f else "critique me" for f in flags]
        twisted = [
            ("not " if n else "") + ("praise" if f != n else "critique") for f, n in zip(flags, negated)
        ]
        labels = torch.from_numpy(flags.astype(float))[:, None]
        split = Split(list(range(180)), list(range(180, 240)), list(range(240, 300)))
        for texts, low, high in ((plain, 0.95, 1.0), (twisted, -1.0, 0.1)):
            rows = [Chat(str(i), text) for i, text in enumerate(texts)]
            assert low < baseline_scores(rows, labels, split).r2["bag_of_words"][0] < high

    def test_bad_input_is_refused_before_fitting(self, study):
        _, features, labels, split, probes, _ = study
        missing = labels.clone()
        missing[0, 0] = float("nan")
        with pytest.raises(UserError, match="missing"):
            fit_probes(features, missing, NAMES, split, "x")
        flat = labels.clone()
        flat[:, 2] = 0.9
        with pytest.raises(UserError, match="user_information_advantage"):
            fit_probes(features, flat, NAMES, split, "x")
        with pytest.raises(UserError, match="counted from 0"):  # T10
            replace(probes.probes[NAMES[0]], sites=("blocks.-1.output",))
        logits = Features(("logits",), features.pooled_LBD[:1], "user", features.row_hashes, "r", "f")
        with pytest.raises(UserError, match="block's output"):
            fit_probes(logits, labels, NAMES, split, "x")


def model_blocks(features):
    return features.pooled_LBD.shape[0]


class TestDirections:
    def test_units_convert_exactly(self, study):
        """T9."""
        _, features, _, split, probes, _ = study
        for probe in probes.probes.values():
            direction = probe_direction(probe)
            train = features.pooled_LBD[probe.block][split.train].double()
            assert direction.alpha(2.0, "raw") == 2.0
            sd = float((train @ direction.unit_D).std())
            assert direction.alpha(-3.0, "proj_sd") == pytest.approx(-3.0 * sd)
            assert direction.alpha(0.5, "resid_norm") == pytest.approx(0.5 * float(train.norm(dim=1).mean()))

    def test_the_bisector_lies_half_way_and_has_a_scale_of_its_own(self, study):
        _, features, _, split, probes, _ = study
        probe = probes.probes[NAMES[0]]
        ends = [fitted_direction(probe, kind, features, split.train) for kind in ("probe", "pattern")]
        assert [one.name for one in ends] == [probe_direction(probe).name, pattern_direction(probe).name]
        half = fitted_direction(probe, "bisector", features, split.train)
        table = cosines([half, *ends])
        assert float(table[0, 1]) == pytest.approx(float(table[0, 2]))
        assert float(table[0, 1]) == pytest.approx(math.cos(math.acos(float(table[1, 2])) / 2))
        train = features.pooled_LBD[probe.block][split.train].double()
        assert half.projection_sd == pytest.approx(float((train @ half.unit_D).std()))
        assert half.resid_norm == pytest.approx(ends[0].resid_norm)

    def test_random_directions_are_norm_matched_and_seeded(self, study):
        matched = probe_direction(study[4].probes[NAMES[0]])
        first, again = random_directions(matched, 5), random_directions(matched, 5)
        assert all(torch.equal(one.unit_D, other.unit_D) for one, other in zip(first, again))
        assert {d.name for d in first} == {f"{NAMES[0]}.random{i}" for i in range(5)}
        for direction in first:
            assert float(direction.unit_D.norm()) == pytest.approx(1.0)
            assert direction.alpha(1.0) == matched.alpha(1.0)
        off = cosines([matched, *first]) - torch.eye(6, dtype=torch.float64)
        assert off.abs().max() < 0.5

    def test_random_directions_of_dimensions_blocks_and_seeds_are_independent(self, study):
        """No vector serves twice, as many cosines are small as of independent draws: SD 1 / sqrt(width)."""
        matched = [probe_direction(study[4].probes[name]) for name in NAMES]
        elsewhere = replace(matched[0], block=matched[0].block + 1)
        families = [random_directions(one, 5) for one in (*matched, elsewhere)] + [
            random_directions(matched[0], 5, seed=1)
        ]
        drawn = [one for family in families for one in family]
        off = cosines(drawn)[~torch.eye(len(drawn), dtype=torch.bool)]
        assert float(off.std()) == pytest.approx(len(matched[0].unit_D) ** -0.5, rel=0.15)
        assert off.abs().max() < 0.6

    def test_dose_zero_edits_nothing(self, study, model):
        """T24: alpha 0 is the unedited model, bit for bit."""
        direction = probe_direction(study[4].probes[NAMES[0]])
        assert direction.interventions(0.0) == []
        batch = model.encode([chat.messages for chat in chats(2)])
        with torch.no_grad():
            plain = model(batch)
            with edit(model, direction.interventions(0.0)):
                assert torch.equal(model(batch), plain)
            with edit(model, direction.interventions(3.0)):
                assert not torch.equal(model(batch), plain)
            assert torch.equal(model(batch), plain)

    def test_directions_are_saved_as_interventions(self, study, model, tmp_path):
        direction = probe_direction(study[4].probes[NAMES[0]])
        save_interventions(tmp_path, direction.interventions(1.5), model)
        [loaded] = load_interventions(tmp_path, model)
        assert (loaded.site, loaded.strength) == (direction.site, pytest.approx(direction.alpha(1.5)))
        assert torch.equal(loaded.vector_D, direction.unit_D.float())


def test_planted_direction_is_found_end_to_end():
    """Rung A through the public path: features in, a calibrated probe and both directions out."""
    planted = plant(1200, 64, noise=0.2, seed=7)
    noise = torch.randn_like(planted.resid_BD)
    rows = [Chat(str(i), f"row {i}") for i in range(1200)]
    features = Features(
        ("blocks.0.output", "blocks.1.output"),
        torch.stack([noise, planted.resid_BD]),
        "user",
        tuple(row_hash(row) for row in rows),
        "r",
        "f",
    )
    probes, _ = fit_probes(features, planted.latents_BK, NAMES, group_split(rows), "latents")
    for k, probe in enumerate(probes.probes.values()):
        assert probe.block == 1
        assert float(probe_direction(probe).unit_D @ planted.directions_KD[k]) > 0.9
        assert float(pattern_direction(probe).unit_D @ planted.directions_KD[k]) > 0.95


def test_chats_are_read_from_files(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("id,prompt,group\na,Was I wrong?,x\nb,Help me,\n")
    first, second = read_chats(path, columns={"text": "prompt"})
    assert (first.id, first.turn, first.group, first.source) == ("a", "Was I wrong?", "x", "mine")
    assert second.group == ""
    for content, match in (
        ("id,text\na,\n", "no text"),
        ("id,text\na,x\na,y\n", "more than one"),
        ("text\n", "no rows"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=match):
            read_chats(path)


def test_block_outputs_names_every_block(model):
    assert block_outputs(model) == tuple(f"blocks.{i}.output" for i in range(model.architecture.n_layers))
