"""The measures of quality against references, the tuning rule, and one small study with its resumption."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from preft_cases import stir

from preft.adapters import Adapter, AdapterConfig, AdapterError
from preft.evaluate import heldout_loss
from preft.forward import masked_logits
from preft.quality import arms, study
from preft.quality.findings import difference, gap_by_distance, losses_by_distance, reached
from preft.quality.measures import bin_name, by_distance, greedy_answers, mean_loss, response_losses, rows_of
from preft.quality.people import people
from preft.quality.pipeline import PIPELINE
from preft.quality.prefix import Prefix, train_prefix
from preft.quality.prompting import instructed, stated
from preft.quality.settings import AdapterQualityConfig
from preft.quality.study import Cell, Result
from preft.quality.tradeoff import from_benchmark
from preft.quality.tuning import walk
from preft.reference import greedy_reference
from preft.train import TrainConfig
from preft.train.rows import padding_id
from shared.models import ModelConfig
from shared.runs import start_run
from shared.serialize import write_json
from shared.tinyworld.users import kept, make_users
from shared.tokens import Phase, collate

CHATS = make_users(1)[0].rows("train", 6)
SMALL = AdapterQualityConfig(
    users=2,
    seeds=2,
    train_chats=6,
    validation_chats=3,
    heldout_chats=3,
    arms=("lora", "lora_p"),
    ranks=(1, 2),
    prefix_tokens=(2,),
    shown_chats=(1,),
    rates=(1e-3, 1e-2),
    train=TrainConfig(steps=2, batch_size=3),
    answers=2,
    answer_ranks=(2,),
    answer_tokens=3,
    throughput="none",
    trace_ranks=(),
)


@pytest.fixture(scope="module")
def some(model):
    configs = {
        None: None,
        "lora": AdapterConfig(rank=3, phase=Phase.ALL),
        "lora_p": AdapterConfig(rank=3),
        "reft_p": AdapterConfig("direft", rank=3),
        "reft_decode": AdapterConfig("direft", rank=3, phase=Phase.DECODE),
    }
    return {
        name: config and stir(Adapter.create(model.hf, config, 1), 5, 0.3) for name, config in configs.items()
    }


def losses_under(model, adapter, chats=CHATS, shown=()):
    def logits(batch):
        return masked_logits(model.hf, adapter, batch)

    return response_losses(logits, rows_of(model.tokenizer, chats, shown), padding_id(model.tokenizer))


class TestMeasures:
    @pytest.mark.parametrize("name", [None, "lora", "lora_p", "reft_p", "reft_decode"])
    def test_the_mean_is_the_held_out_loss(self, model, some, name):
        losses = losses_under(model, some[name])
        expected = heldout_loss(model.hf, model.tokenizer, some[name], CHATS)
        assert mean_loss(losses) == pytest.approx(expected, rel=1e-5)

    def test_distances_count_from_the_prompt_row_by_row(self, model, some):
        """Adapters of two phases that differ from the bare model at every distance, or from distance 1 on only."""
        base, prompt, decode = (losses_under(model, some[name]) for name in (None, "reft_p", "reft_decode"))
        for row in range(len(CHATS)):
            assert base[row][0] == pytest.approx(decode[row][0], abs=2e-6)
            assert base[row][0] != pytest.approx(prompt[row][0], abs=2e-5)
            assert base[row][1] != pytest.approx(decode[row][1], abs=2e-5)

    def test_bins_hold_every_token_once(self):
        bins = by_distance([[1.0, 2.0, 3.0, 4.0, 5.0], [10.0]])
        assert bins == {"0": [11.0, 2], "1": [2.0, 1], "2-3": [7.0, 2], "4-7": [5.0, 1]}
        assert [bin_name(distance) for distance in (0, 1, 2, 3, 4, 7, 8, 15, 16)] == [
            "0", "1", "2-3", "2-3", "4-7", "4-7", "8-15", "8-15", "16-31"
        ]  # fmt: skip

    def test_shown_chats_are_prompt_and_their_responses_do_not_count(self, model):
        shown = [message for chat in CHATS[:2] for message in chat]
        plain = rows_of(model.tokenizer, CHATS[2:])
        behind = rows_of(model.tokenizer, CHATS[2:], shown)
        for one, other in zip(plain, behind, strict=True):
            assert one.input_ids[one.prompt_length :] == other.input_ids[other.prompt_length :]
            assert other.prompt_length > one.prompt_length

    @pytest.mark.parametrize("name", [None, "lora", "lora_p", "reft_p", "reft_decode"])
    def test_greedy_answers_in_a_batch_are_the_references(self, model, some, name):
        prompts = [[7, 8, 9], [20], list(range(30, 47))]
        expected = [greedy_reference(model.hf, some[name], ids, 6).tokens for ids in prompts]
        found = greedy_answers(model, some[name], prompts, 6)
        stops = set(model.eos_token_ids)
        cut = [next((t[: i + 1] for i, x in enumerate(t) if x in stops), t) for t in expected]
        assert found == cut


class TestPrefix:
    def test_the_forward_pass_is_pefts_own(self, model):
        prefix = Prefix(model.hf, 3, seed=1)
        batch = collate(rows_of(model.tokenizer, CHATS[:2]), padding_id(model.tokenizer))
        with torch.no_grad():
            own = prefix.logits(batch)
            pefts = prefix.peft(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
        real_BT = batch.attention_mask_BT.bool()
        torch.testing.assert_close(own[real_BT], pefts[real_BT], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(own[real_BT], masked_logits(model.hf, None, batch)[real_BT], atol=1e-2)

    def test_greedy_answers_behind_a_prefix_are_those_of_the_whole_sequence(self, model):
        prefix, prompts = Prefix(model.hf, 3, seed=1), [[7, 8, 9], [20]]
        for ids, answer in zip(prompts, greedy_answers(model, None, prompts, 4, prefix)):
            batch = model.encode(["x"])
            whole = torch.tensor([ids + answer[:-1]])
            batch = replace(
                batch,
                input_ids_BT=whole,
                attention_mask_BT=torch.ones_like(whole),
                position_ids_BT=torch.arange(whole.shape[1])[None],
            )
            with torch.no_grad():
                logits_TV = prefix.logits(batch)[0, len(ids) - 1 :]
            assert logits_TV.argmax(-1).tolist() == answer

    def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(self, model):
        before = {name: (value.clone(), value.requires_grad) for name, value in model.hf.named_parameters()}
        rows, pad_id = rows_of(model.tokenizer, CHATS), padding_id(model.tokenizer)
        settings = TrainConfig(steps=12, batch_size=6, learning_rate=0.1)
        trained = train_prefix(model.hf, model.tokenizer, rows, 4, settings)
        fresh = Prefix(model.hf, 4, settings.seed)
        losses = [mean_loss(response_losses(one.logits, rows, pad_id)) for one in (fresh, trained)]
        assert losses[1] < losses[0] - 0.05
        after = dict(model.hf.named_parameters())
        assert set(after) == set(before)
        for name, (value, wants) in before.items():
            assert torch.equal(after[name], value)
            assert after[name].requires_grad == wants


class TestWalk:
    RATES = (0.001, 0.003, 0.01, 0.03, 0.1)

    def test_it_ends_where_both_neighbours_are_worse(self):
        for best in range(5):
            asked = []

            def loss(rate, best=best, asked=asked):
                asked.append(rate)
                return abs(self.RATES.index(rate) - best) + 1.0

            for start in (None, *self.RATES):
                asked.clear()
                tuned = walk(self.RATES, start, loss)
                assert tuned.rate == self.RATES[best]
                assert len(asked) == len(set(asked)) == len(tuned.losses)
                near = {best - 1, best, best + 1} & set(range(5))
                assert {self.RATES[i] for i in near} <= set(asked)
                assert tuned.at_end(self.RATES) == (best in (0, 4))

    def test_a_training_that_diverges_is_never_chosen(self):
        tuned = walk(self.RATES, None, lambda rate: math.nan if rate >= 0.01 else rate)
        assert tuned.rate == 0.001


def cell(arm, size, losses, bins=None):
    results = [
        Result(f"u{i % 3}", i // 3, loss, bins or {"0": [loss, 1.0]}, 10, None)
        for i, loss in enumerate(losses)
    ]
    return Cell(arm, size, None, results)


class TestFindings:
    def test_the_size_that_reaches_the_reference_is_by_paired_differences(self):
        noise = [0.3, 0.1, 0.2, 0.35, 0.15, 0.25]  # between users: far larger than any difference

        def shifted(by):
            return [one + by for one in noise]

        cells = [
            cell("lora", 4, shifted(0.5)),
            cell("lora", 8, noise),
            cell("lora_p", 8, shifted(0.05)),
            cell("lora_p", 16, [n + d for n, d in zip(noise, (0.02, -0.01, 0.02, 0.02, -0.01, 0.02))]),
            cell("lora_p", 32, shifted(-0.01)),
        ]
        found = reached(cells, "lora_p")
        assert (found.mean, found.interval) == (32, 16)
        gap = difference(cells[2].results, cells[1].results)
        assert gap.estimate == pytest.approx(0.05)
        assert gap.low == pytest.approx(0.05)
        assert reached(cells[:3], "lora_p") == (None, None)

    def test_gaps_by_distance_are_weighted_by_tokens_within_a_result_and_paired_between(self):
        near, far = {"0": [2.0, 2.0], "1": [6.0, 2.0]}, {"0": [1.0, 2.0], "1": [1.0, 2.0]}
        gaps = gap_by_distance(cell("lora_p", 8, [1.0] * 3, near), cell("lora", 8, [1.0] * 3, far))
        assert [gap.estimate for gap in gaps.values()] == [0.5, 2.5]
        assert losses_by_distance(cell("lora", 8, [1.0] * 3, near).results) == {"0": 1.0, "1": 3.0}


class TestPeople:
    def test_parts_and_users_do_not_meet(self):
        reported, tuning = people(SMALL, seed=0)
        assert [len(reported), len(tuning)] == [2, 1]
        assert {one.name for one in reported}.isdisjoint(one.name for one in tuning)
        for one in (*reported, *tuning):
            parts = [
                {chat[0]["content"] for chat in part} for part in (one.train, one.validation, one.heldout)
            ]
            assert [len(part) for part in parts] == [6, 3, 3]
            assert len(set.union(*parts)) == 12

    def test_a_users_own_response_keeps_all_and_anothers_does_not(self):
        for user in make_users(6, seed=2):
            for question, answer in user.rows("test", 40):
                assert all(kept(answer["content"], question["content"], user.preferences))
                other = user.preferences._replace(greeting="x", sign_off="x", drink="pop", units="metric")
                judged = kept(answer["content"], question["content"], other)
                assert not judged.greeting
                assert not judged.sign_off
            length = "brief" if user.preferences.detail == "full" else "full"
            swapped = user.preferences._replace(detail=length)
            assert not kept(answer["content"], question["content"], swapped).detail

    def test_preferences_are_stated_in_front_of_the_question_only(self):
        [person], _ = people(replace(SMALL, users=1), seed=0)
        words = stated(person.preferences)
        assert all(str(value) in words for value in person.preferences._replace(detail="")[:4])
        for plain, told in zip(person.heldout, instructed(person).heldout):
            assert told[0]["content"] == f"{words} {plain[0]['content']}"
            assert told[1:] == plain[1:]


class TestBenchmarkFile:
    def records(self):
        speeds = {"base": (100.0, 200.0), "lora_p": (90.0, 196.0), "lora_own": (40.0, 90.0)}
        rows = [
            {"scene": "short", "round": i, "arm": arm, "tokens_per_s": value}
            for arm, values in speeds.items()
            for i, value in enumerate(values)
        ]
        return [*rows, {"scene": "slots", "round": 0, "arm": "lora_p", "tokens_per_s": 1.0}]

    def result(self, records):
        return {"name": "preft_serving", "settings": {"rank": 8}, "raw": records}

    def test_the_demos_recorded_throughput_is_read(self):
        [path] = sorted((Path(__file__).parents[2] / "benchmarks/results").glob("demo_*.json"))[:1]
        medians = json.loads(path.read_text())["raw"]["preft"]["throughput"]
        found = {one.arm: one.over_base for one in from_benchmark(path)}
        assert found == {arm: medians[arm] / medians["base"] for arm in ("lora", "lora_p", "reft_p")}

    def test_ratios_are_paired_by_round(self, tmp_path):
        write_json(tmp_path / "x.json", self.result(self.records()))
        found = {one.arm: one for one in from_benchmark(tmp_path / "x.json")}
        assert {arm: (one.rank, one.over_base) for arm, one in found.items()} == {
            "lora_p": (8, pytest.approx(0.94)),
            "lora": (8, pytest.approx(0.425)),
        }

    def test_a_file_without_arms_or_no_file_is_refused(self, tmp_path):
        write_json(tmp_path / "x.json", self.result(self.records()[:2]))
        for name, why in (("x.json", "no arm beside base"), ("y.json", "no file")):
            with pytest.raises(AdapterError, match=why):
                from_benchmark(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"arms": ("lora", "ia3")}, "ia3 are not among"),
        ({"arms": ("lora_p",)}, "needs lora"),
        ({"ranks": (2, 1)}, "ranks must be positive and ascending"),
        ({"answer_ranks": (64,)}, "answer_ranks: no adapters of ranks"),
        ({"seeds": 0}, "seeds must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, match):
    with pytest.raises(AdapterError, match=match):
        replace(SMALL, **changes)


def test_a_small_study_and_its_resumption(tmp_path, monkeypatch):
    """Interrupted behind the first arm, the study goes on there; finished, nothing is trained again."""
    trained, train = [], arms.train

    def counted(model, arm, size, chats, settings):
        trained.append((arm, size))
        if len(trained) == stop:
            raise KeyboardInterrupt
        return train(model, arm, size, chats, settings)

    monkeypatch.setattr(study, "train", counted)

    def run(config=SMALL, seed=0):
        trained.clear()
        with start_run(tmp_path / "run", config, seed=seed) as one:
            metrics = PIPELINE.run(config, ModelConfig("random:llama"), one)
            one.metrics(metrics)
        return metrics

    stop = 9
    with pytest.raises(KeyboardInterrupt):
        run()
    before = list(trained)
    stop = -1
    metrics = run()
    assert trained[0] == before[-1]  # the stage that was cut begins anew, those before it are kept
    whole = len(before) - 1 + len(trained)
    per_size = 2 + SMALL.users * SMALL.seeds  # both rates of the grid, then a user and a seed each
    assert 5 * per_size <= whole <= 5 * per_size + per_size
    assert set(metrics["heldout_loss"]) == {"base", "stated", "shown 1", "lora", "lora_p", "prefix"}
    assert set(metrics["heldout_loss"]["lora_p"]) == {"1", "2"}
    assert metrics["reaches_reference_at"].keys() == {"lora_p", "prefix"}
    assert set(metrics["answers"]["lora_p"]["2"]) == {"greeting", "sign_off", "detail", "answer", "all"}
    assert "1" not in metrics["answers"]["lora_p"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["learning_rate"]["lora"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert run() == metrics
    assert trained == []

    extended = run(replace(SMALL, ranks=(1, 2, 3)))
    assert {size for _, size in trained} == {3}
    assert extended["heldout_loss"]["lora"].items() > metrics["heldout_loss"]["lora"].items()
    stop = 1  # other chats: nothing of before counts
    with pytest.raises(KeyboardInterrupt):
        run(replace(SMALL, heldout_chats=2))
    assert trained == [("lora", 1)]
