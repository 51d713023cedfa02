"""Rung B: elicitation against an engine of known function: statuses, health, resume, retries, kill -9, order."""

import hashlib
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assumptions.asking import PATIENCE, EngineStartError, OnDemand
from assumptions.chats import Chat
from assumptions.dimensions import NAMES
from assumptions.elicitation import RETRIED, Elicitation, ElicitationSettings, header
from assumptions.elicitation import elicit as elicit_from
from assumptions.instruments import INSTRUMENTS, instrument
from assumptions.parsing import Status
from assumptions.records import Record, RecordFile, final, read
from assumptions.scripted import EngineStopped, ScriptedGenerator
from shared.errors import UserError
from shared.generation import Generator, Sampling

NINE = instrument("nine_scores")
FREE = ElicitationSettings(guided=False, batch_size=7)
KINDS = {
    "fenced": 0.1,
    "prose": 0.1,
    "echo": 0.1,
    "truncated": 0.1,
    "prose_only": 0.1,
    "echo_then_answer": 0.1,
}
STATUS_OF = {
    None: Status.CLEAN,
    "fenced": Status.REPAIRED,
    "prose": Status.REPAIRED,
    "echo_then_answer": Status.REPAIRED,
    "echo": Status.TEMPLATE_ECHO,
    "truncated": Status.SALVAGED,
    "prose_only": Status.FAILED,
}


def elicit(*arguments, model="fingerprint", **options):
    return elicit_from(*arguments, model=model, **options)


def chats(count):
    return [Chat(f"c{i:03}", f"message number {i}") for i in range(count)]


def scores_of(prompt):
    digest = hashlib.sha256(prompt.encode()).digest()
    return {name: (1 + byte % 19) / 20 for name, byte in zip(NAMES, digest)}


def engine(**options):
    return ScriptedGenerator(NINE.shape(), scores_of, **options)


def expected(chat):
    return scores_of(NINE.messages(chat.turn)[-1]["content"])


def test_the_scripted_engine_is_a_generator():
    assert isinstance(engine(), Generator)


def test_every_status_is_counted_and_every_whole_answer_is_exact(tmp_path):
    generator, rows = engine(rates=KINDS), chats(200)
    result = elicit(generator, NINE, rows, tmp_path / "answers.jsonl", FREE)
    sent = [generator.kind_of(request) for request in _requests(rows)]
    assert Counter(r.status for r in result.records) == Counter(STATUS_OF[kind] for kind in sent)
    assert result.health() == {s.value: sum(STATUS_OF[k] is s for k in sent) for s in Status}
    truth = {chat.id: expected(chat) for chat in rows}
    for record in result.records:
        assert record.scores == {name: truth[record.id][name] for name in record.scores}
        assert (len(record.scores) == 9) == record.status.complete
        assert not (record.status in RETRIED and record.scores)
    assert result.valid_share() == pytest.approx(sum(STATUS_OF[k].complete for k in sent) / 200)


def _requests(rows):
    from assumptions.elicitation import _draw

    return [_draw(NINE, chat, 0, 0, FREE).request for chat in rows]


def test_resume_asks_only_for_failures(tmp_path):
    """T16: a failure is stored as one and asked again; what succeeded is never asked twice."""
    path, rows = tmp_path / "answers.jsonl", chats(60)
    first = elicit(engine(rates={"prose_only": 0.3, "echo": 0.2, "truncated": 0.1}), NINE, rows, path, FREE)
    failures = sum(record.status in RETRIED for record in first.records)
    assert 15 < failures < 45
    healthy = engine()
    second = elicit(healthy, NINE, rows, path, FREE)
    assert healthy.asked == failures
    assert not any(record.status in RETRIED for record in second.records)
    kept = {r.key: r for r in first.records if r.status not in RETRIED}
    assert {r.key: r for r in second.records if r.key in kept} == kept
    assert {r.attempt for r in second.records if r.key not in kept} == {1}
    idle = engine()
    assert elicit(idle, NINE, rows, path, FREE).records == second.records
    assert idle.asked == 0


def test_more_rows_and_samples_extend_a_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    warm = replace(FREE, temperature=1.0)
    elicit(engine(), NINE, chats(5), path, warm)
    more = engine()
    result = elicit(more, NINE, chats(8), path, replace(warm, samples=2))
    assert (more.asked, len(result.records)) == (8 * 2 - 5, 16)


def test_another_question_in_the_same_file_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    elicit(engine(), NINE, chats(2), path, FREE)
    for other, options, what in (
        (instrument("nine_scores_chat"), FREE, "instrument"),
        (NINE, replace(FREE, temperature=0.5), "temperature"),
        (NINE, replace(FREE, guided=True), "guided"),
    ):
        with pytest.raises(UserError, match=what):
            elicit(engine(), other, chats(2), path, options)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_one_refused_row_fails_alone_and_again_on_resume(tmp_path, batch_size):
    """A row that is always refused costs itself: not its batch, not the run, and not the run that resumes."""
    path, rows, options = tmp_path / "a.jsonl", chats(10), replace(FREE, batch_size=batch_size)
    for refused in ("c000", "c003", "c009"):
        path.unlink(missing_ok=True)
        number = int(refused[1:])
        for attempt in range(3):
            picky = engine(refuses=lambda prompt: f"number {number}\n" in prompt)  # noqa: B023
            result = elicit(picky, NINE, rows, path, options)
            failed = [r for r in result.records if r.status is Status.FAILED]
            said = "ValueError: a prompt of this batch is too long"
            assert [(r.id, r.error, r.attempt) for r in failed] == [(refused, said, attempt)]
            assert result.valid_share() == 0.9
            assert np.isnan(result.scores([refused], NAMES)).all()
            assert picky.asked <= (1 if attempt else 2 * 10)
        assert elicit(engine(), NINE, rows, path, options).valid_share() == 1.0


def test_many_refused_rows_before_the_first_answer_are_recorded(tmp_path):
    """Until something is answered nobody knows whose fault it is; then the failures kept back are recorded."""
    rows, options = chats(60), replace(FREE, batch_size=7)
    picky = engine(refuses=lambda prompt: int(prompt.split("number ")[1].split("\n")[0]) < PATIENCE - 1)
    result = elicit(picky, NINE, rows, tmp_path / "a.jsonl", options)
    assert [r.id for r in result.records if r.error] == [chat.id for chat in rows[: PATIENCE - 1]]
    assert result.valid_share() == (60 - PATIENCE + 1) / 60


@pytest.mark.parametrize("rows", [1, 5, 400])
def test_an_engine_that_answers_nothing_is_an_error_soon(tmp_path, rows):
    calls = []
    dead = engine(refuses=lambda prompt: calls.append(1) or True)
    with pytest.raises(ValueError, match="too long"):
        elicit(dead, NINE, chats(rows), tmp_path / "a.jsonl", FREE)
    assert read(tmp_path / "a.jsonl")[1] == []
    assert len(calls) <= 2 * PATIENCE


def test_an_engine_that_cannot_start_is_asked_once(tmp_path):
    started = []

    def start():
        started.append(1)
        raise RuntimeError("no memory for the key-value cache")

    with pytest.raises(EngineStartError, match="did not start: RuntimeError: no memory"):
        elicit(OnDemand(start), NINE, chats(30), tmp_path / "a.jsonl", FREE)
    assert len(started) == 1
    # the same when the file holds answers already: they say nothing about an engine that is not there
    elicit(engine(), NINE, chats(5), tmp_path / "b.jsonl", FREE)
    with pytest.raises(EngineStartError):
        elicit(OnDemand(start), NINE, chats(30), tmp_path / "b.jsonl", FREE)
    assert len(started) == 2
    assert len(read(tmp_path / "b.jsonl")[1]) == 5


def test_an_engine_is_started_at_the_first_request_only():
    idle = OnDemand(lambda: pytest.fail("nothing was asked"))
    idle.close()
    busy = OnDemand(engine)
    for _ in range(2):
        busy.generate(_requests(chats(2)), Sampling())
    assert busy.engine.asked == 4


def test_another_text_with_the_same_id_is_another_question(tmp_path):
    """T16: an answer counts for the text it was asked about; ids alone (message00000) identify nothing."""
    path, rows = tmp_path / "a.jsonl", chats(12)
    elicit(engine(), NINE, rows, path, FREE)
    edited = [replace(chat, turn=f"{chat.turn}, edited") if i % 3 else chat for i, chat in enumerate(rows)]
    edited[0] = replace(edited[0], history=({"role": "user", "content": "earlier"},))
    second = engine()
    result = elicit(second, NINE, edited, path, FREE)
    assert second.asked == 9
    assert len(result.records) == 12
    for record, chat in zip(result.records[1:], edited[1:]):
        assert record.scores == expected(chat)
    back = engine()
    first = elicit(back, NINE, rows, path, FREE)
    assert back.asked == 0  # the answers about the former texts still stand in the file
    assert [r.scores for r in first.records] == [expected(chat) for chat in rows]


def test_a_dead_engine_is_an_error_and_what_was_whole_stays(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(EngineStopped):
        elicit(engine(dies_after=14), NINE, chats(30), path, FREE)
    assert len(read(path)[1]) == 14
    rest = engine()
    assert len(elicit(rest, NINE, chats(30), path, FREE).records) == 30
    assert rest.asked == 16


def test_samples_are_averaged_and_missing_scores_are_nan():
    records = [
        Record("a", 0, Status.CLEAN, {"user_rightness": 0.2}, ""),
        Record("a", 1, Status.CLEAN, {"user_rightness": 0.6}, ""),
        Record("b", 0, Status.FAILED, {}, ""),
    ]
    scores = Elicitation(records).scores(["b", "a"], ["user_rightness", "tangible_support"])
    np.testing.assert_array_equal(scores, [[np.nan, np.nan], [0.4, np.nan]])


def test_health_by_stratum_and_the_share_that_was_cut():
    records = [
        Record("a", 0, Status.CLEAN, {}, "", finish_reason="stop"),
        Record("b", 0, Status.SALVAGED, {}, "", finish_reason="length"),
        Record("c", 0, Status.CLEAN, {}, "", finish_reason="stop"),
        Record("c", 1, Status.FAILED, {}, "", error="refused"),
    ]
    result = Elicitation(records)
    by = result.health_by({"a": "advice", "b": "advice", "c": "general"})
    assert {name: {k: v for k, v in counts.items() if v} for name, counts in by.items()} == {
        "advice": {"clean": 1, "salvaged": 1},
        "general": {"clean": 1, "failed": 1},
    }
    assert result.cut_share() == 0.25


def test_order_of_dimensions_is_shuffled_by_seed_and_scores_stay_named(tmp_path):
    options = replace(FREE, shuffle_order=True)
    result = elicit(engine(), NINE, chats(20), tmp_path / "a.jsonl", options)
    orders = {record.order for record in result.records}
    assert len(orders) > 10
    assert all(sorted(order) == sorted(NAMES) for order in orders)
    again = elicit(engine(), NINE, chats(20)[::-1], tmp_path / "b.jsonl", options)
    assert [r.order for r in again.records] == [r.order for r in result.records]


def test_settings_are_refused_before_anything_runs(tmp_path):
    """T28: every choice is checked before an engine is asked."""
    generator, path = engine(), tmp_path / "never.jsonl"
    for name, options, match in (
        ("4dims", ElicitationSettings(guided=True), "guided=false"),
        ("base", FREE, "baseline"),
        ("nine_scores", replace(FREE, samples=3), "temperature"),
    ):
        with pytest.raises(UserError, match=match):
            elicit(generator, instrument(name), chats(1), path, options)
    with pytest.raises(UserError, match=r"model\.fingerprint"):
        elicit(generator, NINE, chats(1), path, FREE, model="")
    with pytest.raises(UserError, match="'c000' stands on more than one"):
        elicit(generator, NINE, chats(1) * 2, path, FREE)
    for name in ("samples", "batch_size"):
        with pytest.raises(UserError, match=f"{name} must be at least 1"):
            replace(FREE, **{name: 0})
    assert generator.asked == 0
    assert not path.exists()


def test_who_answers_must_be_named(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(TypeError, match="model"):
        elicit_from(engine(), NINE, chats(1), path, FREE)
    elicit(engine(), NINE, chats(1), path, FREE)
    with pytest.raises(UserError, match="another model"):
        elicit(engine(), NINE, chats(1), path, FREE, model="other weights")


class TestRecordFile:
    """T27: append-only, whole lines only, any byte may be the last one."""

    head = header(NINE, FREE, "m")

    def records(self, count):
        return [
            Record(f"r{i}", 0, Status.CLEAN, {"user_rightness": i / 10}, "text\n\u2028") for i in range(count)
        ]

    def test_round_trip(self, tmp_path):
        with RecordFile(tmp_path / "f.jsonl", self.head) as file:
            file.append(self.records(3))
        assert read(tmp_path / "f.jsonl")[1] == self.records(3)

    @given(cut=st.integers(0, 600))
    @settings(deadline=None, max_examples=40)
    def test_cut_anywhere_then_resumed(self, cut, tmp_path_factory):
        path = tmp_path_factory.mktemp("cut") / "f.jsonl"
        with RecordFile(path, self.head) as file:
            file.append(self.records(4))
        whole = path.read_bytes()
        path.write_bytes(whole[: max(0, len(whole) - cut)])
        with RecordFile(path, self.head) as file:
            kept = list(file.records.values())
            file.append(self.records(4)[len(kept) :])
        assert kept == self.records(4)[: len(kept)]
        assert path.read_bytes() == whole

    def test_a_damaged_line_in_the_middle_is_named(self, tmp_path):
        path = tmp_path / "f.jsonl"
        with RecordFile(path, self.head) as file:
            file.append(self.records(2))
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], lines[1][:20], lines[2], ""]))
        with pytest.raises(UserError, match="line 2 is damaged"):
            RecordFile(path, self.head)

    def test_the_last_record_of_a_key_counts(self):
        first, second = Record("a", 0, Status.FAILED, {}, ""), Record("a", 0, Status.CLEAN, {}, "", attempt=1)
        assert final([first, Record("a", 1, Status.CLEAN, {}, ""), second])[0] is second


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
import test_elicitation as t

class Slow(t.ScriptedGenerator):
    def generate(self, requests, sampling):
        time.sleep(0.02)
        return super().generate(requests, sampling)

t.elicit(
    Slow(t.NINE.shape(), t.scores_of), t.NINE, t.chats(400), t.Path(sys.argv[1]),
    t.replace(t.FREE, batch_size=2),
)
"""


def test_kill_9_mid_write_then_resume_gives_the_same_final_set(tmp_path):
    path = tmp_path / "killed.jsonl"
    here = str(Path(__file__).parent)
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(path), here])
    try:
        deadline = time.monotonic() + 300
        while not (path.exists() and path.stat().st_size > 6000):
            assert time.monotonic() < deadline, "the elicitation wrote nothing"
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with path.open("ab") as file:
        file.write(b'{"id": "c399", "sample": 0, "sta')  # what a write cut by the kernel leaves
    done = len(path.read_bytes().split(b"\n")) - 2
    assert 0 < done < 400
    rest, whole = engine(), engine()
    options = replace(FREE, batch_size=2)
    resumed = elicit(rest, NINE, chats(400), path, options)
    assert rest.asked == 400 - done
    assert resumed.records == elicit(whole, NINE, chats(400), tmp_path / "whole.jsonl", options).records
    assert len(path.read_text().splitlines()) == 401


class TestInstruments:
    """The prompts: assumptions before the reply, third person and chat apart, all of them buildable."""

    @pytest.mark.parametrize(
        "name", [name for name, i in INSTRUMENTS.items() if i.shape_of and i.framing != "bare"]
    )
    def test_prompt_names_what_the_parser_reads(self, name):
        asked = INSTRUMENTS[name]
        text = asked.messages("I was right, was I not?")[-1]["content"]
        for dimension in asked.dimensions:
            assert f'"{dimension}":' in text
            assert f"- {dimension}: " in text
        assert "from 0 to 1" in text
        positions = [text.index('"'), *(text.index(f"{section}:") for section in asked.sections)]
        assert positions == sorted(positions)
        assert ("User A" in text) == (asked.framing == "third_person")

    def test_framings_have_different_names_and_hashes(self):
        assert len({i.id for i in INSTRUMENTS.values()}) == len(INSTRUMENTS)
        assert len({i.prompt_hash for i in INSTRUMENTS.values()}) == len(INSTRUMENTS)

    def test_history_is_quoted_or_kept(self):
        history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
        quoted = NINE.messages("again", history)
        assert len(quoted) == 1
        assert "User A: hi\nAI: hello" in quoted[0]["content"]
        assert instrument("nine_scores_chat").messages("again", history)[:2] == history

    def test_order_changes_form_and_schema_together(self):
        order = NAMES[::-1]
        schema = NINE.json_schema(order)
        assert tuple(schema["properties"]) == tuple(schema["required"]) == order
        text = NINE.messages("x", order=order)[0]["content"]
        assert [text.index(f'"{n}":') for n in order] == sorted(text.index(f'"{n}":') for n in order)
        with pytest.raises(UserError, match="permutation"):
            NINE.messages("x", order=NAMES[:3])

    def test_unknown_and_empty(self):
        with pytest.raises(UserError, match="supporttypes"):
            instrument("support")
        with pytest.raises(UserError, match="empty"):
            NINE.messages("  ")

    def test_tinyworld_instrument_is_tinyworlds_text(self):
        from shared.tinyworld import social

        asked = instrument("tinyworld_nine")
        assert asked.messages("About my rent.")[0]["content"] == social.instrument("About my rent.")
        assert asked.json_schema() == social.instrument_schema()
        assert social.DIMENSIONS == NAMES
        truth = {name: 0.05 * i for i, name in enumerate(NAMES, 1)}
        elicited = asked.parse(social.format_scores(truth))
        assert elicited.answer.status is Status.CLEAN
        assert json.dumps(elicited.scores) == json.dumps({k: round(v, 2) for k, v in truth.items()})

    def test_signs_agree_with_the_embedded_world(self):
        from assumptions.dimensions import SIGNS
        from shared.tinyworld import social

        assert dict(social.SIGNS) == SIGNS
