"""The monitor without a browser: sessions on disk, the line, turns, steering by exact amounts, and the HTTP routes."""

import asyncio
import json
import threading
from dataclasses import replace

import pytest
import torch
from fastapi.testclient import TestClient

from assumptions.chats import Chat
from assumptions.dimensions import NAMES
from assumptions.features import capture_features
from assumptions.monitor.conversation import Said, keep_reply, state_scores, take_turn
from assumptions.monitor.desk import Desk
from assumptions.monitor.prepare import labelling, load_directions, prepare
from assumptions.monitor.server import LOOPBACK, build
from assumptions.monitor.session import Draw, Reply, Store, Turn, as_json, as_markdown, new_session
from assumptions.monitor.subject import Setting, Stated
from assumptions.steering import probe_direction
from shared.errors import UserError
from shared.generation import HFGenerator, Request, Sampling
from shared.interventions import Ablate, save_interventions
from shared.models import ModelConfig
from shared.tinyworld import social

DRAW = Draw(max_tokens=12, temperature=1.0, top_p=1.0, seed=5)
SHORT = Sampling(12, 1.0, 1.0, logprobs=None)
WANT = social.sample_turns(3, seed=9)
PUSH = [Setting("validation_seeking", "push", 3.0)]


@pytest.fixture(scope="module")
def subject(monitored):
    return monitored[0]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "sessions")


@pytest.fixture
def session(store, subject):
    return store.save(new_session("tinyworld", subject.model.fingerprint, remember=False))


def events(subject, store, session, text, settings=(), compare=True, stop=None):
    said = Said(text, list(settings), compare, DRAW)
    return list(take_turn(subject, store, session.id, said, stop or threading.Event()))


def reply(subject, messages, edits=()):
    [[answer]] = HFGenerator(subject.model, edits).generate([Request(messages, seed=DRAW.seed)], SHORT)
    return answer.text


class TestSubject:
    def test_scores_are_the_probes_and_near_the_truth(self, subject):
        for turn in WANT:
            scores = subject.read([{"role": "user", "content": turn.text}])
            features = capture_features(subject.model, [Chat("x", turn.text)])
            for k, name in enumerate(social.DIMENSIONS):
                assert scores[name] == pytest.approx(
                    float(subject.probes.probes[name].score(features)), abs=1e-6
                )
                assert scores[name] == pytest.approx(turn.posterior_9[k], abs=0.06)

    def test_a_push_moves_the_read_out_by_the_weights_norm_a_unit(self, subject):
        """+1 SD of the projection is sd |w| of the read-out, and the calibration's slope of the score, uncut."""
        messages = [{"role": "user", "content": WANT[0].text}]
        plain = subject.read(messages)
        for name in NAMES:
            probe = subject.probes.probes[name]
            step = probe.projection_sd * float(probe.weight_D.norm()) * probe.calibration.slope
            dose = 0.5 if plain[name] < 0.5 else -0.5
            moved = subject.read(messages, subject.edits([Setting(name, "push", dose)]))
            assert moved[name] - plain[name] == pytest.approx(dose * step, abs=1e-4)

    def test_what_is_held_is_read_whatever_is_said_and_pushed(self, subject):
        settings = [
            Setting("user_rightness", "hold", 0.85),
            Setting("validation_seeking", "push", 2.0),
            Setting("objectivity_seeking", "hold", 0.15),
        ]
        for turn in WANT:
            scores = subject.read([{"role": "user", "content": turn.text}], subject.edits(settings))
            assert scores["user_rightness"] == pytest.approx(0.85, abs=1e-4)
            assert scores["objectivity_seeking"] == pytest.approx(0.15, abs=1e-4)
        [*_, one] = subject.edits(settings)  # both in one edit, so that neither undoes the other
        assert len(subject.edits(settings)) == 2
        assert one.site == subject.probes.probes["user_rightness"].site

    def test_what_it_states_follows_the_push(self, subject):
        messages = [{"role": "user", "content": WANT[1].text}]
        low, high = (
            subject.ask(messages, subject.edits([Setting("validation_seeking", "push", dose)])).scores
            for dose in (-3.0, 3.0)
        )
        assert high["validation_seeking"] - low["validation_seeking"] > 0.4
        others = [abs(high[name] - low[name]) for name in NAMES if name != "validation_seeking"]
        assert sum(others) / len(others) < 0.2

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ([Setting("kindness", "push", 1.0)], "no probe reads 'kindness'"),
            (PUSH * 2, "set twice"),
            ([Setting("user_rightness", "push", 7.0)], "out of range"),
            ([Setting("user_rightness", "push", float("nan"))], "out of range"),
            ([Setting("user_rightness", "hold", 1.5)], "out of range, 0 to 1 for hold"),
        ],
    )
    def test_settings_that_make_no_sense_are_refused(self, subject, settings, message):
        with pytest.raises(UserError, match=message):
            subject.edits(settings)

    def test_directions_of_a_study_take_the_place_of_the_probes_own(self, subject, tmp_path):
        other = replace(probe_direction(subject.probes.probes["user_rightness"]), block=0)
        save_interventions(tmp_path / "user_rightness", other.interventions(1.0), subject.model)
        steered = replace(subject, directions=load_directions(tmp_path, subject.model))
        [one] = steered.edits([Setting("user_rightness", "push", 2.0)])
        assert one.site == "blocks.0.output"
        moved = one.vector_D.double() * one.strength
        assert torch.allclose(moved, other.unit_D * other.alpha(2.0), atol=1e-5)
        [own] = steered.edits([Setting("validation_seeking", "push", 2.0)])
        assert own.site == subject.probes.probes["validation_seeking"].site

    def test_folders_that_hold_no_directions_are_refused(self, subject, tmp_path):
        with pytest.raises(UserError, match="holds no directions"):
            load_directions(tmp_path, subject.model)
        save_interventions(tmp_path / "user_rightness", [Ablate("blocks.0.output")], subject.model)
        with pytest.raises(UserError, match="only directions that are added"):
            load_directions(tmp_path, subject.model)

    def test_missing_input_is_said_before_a_model_is_loaded(self, tmp_path, monkeypatch):
        monkeypatch.setattr("assumptions.monitor.prepare.load", lambda _: pytest.fail("loaded"))
        for probes, instrument, message in (
            (None, None, "give --probes FOLDER"),
            (tmp_path / "none", None, "holds no probes.json"),
            (tmp_path, "support", "no instrument"),
        ):
            with pytest.raises(UserError, match=message):
                prepare(ModelConfig("some/model"), probes, None, instrument)

    def test_it_asks_with_what_labelled_the_probes(self, subject):
        for labeller, name in (
            ("supporttypes_scores-v1", "supporttypes_scores"),
            ("4dims-v1", "nine_scores"),
        ):
            assert labelling(replace(subject.probes, labeller=labeller)) == name
        assert labelling(subject.probes) == "nine_scores"


class TestTurn:
    def test_both_replies_are_those_of_the_generator_with_common_random_numbers(
        self, subject, store, session
    ):
        text = WANT[0].text
        told = events(subject, store, session, text, PUSH)
        assert [event.name for event in told[:1] + told[-1:]] == ["scores", "turn"]
        turn = told[-1].content
        messages = [{"role": "user", "content": text}]
        assert turn.replies["plain"].text == reply(subject, messages)
        assert turn.replies["steered"].text == reply(subject, messages, subject.edits(PUSH))
        for arm in ("plain", "steered"):
            pieces = [e.content["text"] for e in told if e.name == "piece" and e.content["arm"] == arm]
            assert "".join(pieces) == turn.replies[arm].text
            assert turn.scores[arm] == subject.read(messages, subject.edits(PUSH) if arm == "steered" else [])
        assert [e.content["arm"] for e in told if e.name == "piece"][:4] == ["steered", "plain"] * 2
        assert store.load(session.id).turns == [turn]
        assert store.load(session.id).title == text[:60].strip()

    def test_neutral_settings_are_no_settings(self, subject, store, session):
        [*_, last] = events(subject, store, session, WANT[0].text, [Setting("user_rightness", "push", 0.0)])
        assert (list(last.content.replies), last.content.settings, last.content.kept) == (
            ["plain"],
            [],
            "plain",
        )

    def test_without_comparison_there_is_the_steered_reply_alone(self, subject, store, session):
        [*_, last] = events(subject, store, session, WANT[0].text, PUSH, compare=False)
        assert list(last.content.replies) == ["steered"]
        assert set(last.content.scores) == {"plain", "steered"}

    def test_the_reply_that_is_kept_is_what_the_next_turn_reads(self, subject, store, session):
        store.save(replace(session, remember=True))
        events(subject, store, session, "About my rent: not praise.", PUSH)
        kept = keep_reply(store, session.id, 0, "plain")
        said = kept.turns[0].replies["plain"].text
        assert [m["content"] for m in kept.messages("and now?")] == [
            "About my rent: not praise.",
            said,
            "and now?",
        ]
        [*_, last] = events(subject, store, session, "and now?")
        assert last.content.replies["plain"].text == reply(subject, kept.messages("and now?"))
        assert last.content.scores["plain"] == subject.read(kept.messages("and now?"))
        with pytest.raises(UserError, match="could still go on with"):
            keep_reply(store, session.id, 0, "steered")

    def test_a_stopped_turn_is_kept_as_far_as_it_came(self, subject, store, session):
        stop = threading.Event()
        told = []
        for event in take_turn(subject, store, session.id, Said(WANT[0].text, PUSH, True, DRAW), stop):
            told.append(event)
            if len(told) == 4:
                stop.set()
        turn = store.load(session.id).turns[0]
        assert {one.finish_reason for one in turn.replies.values()} == {"stopped"}
        whole = reply(subject, [{"role": "user", "content": WANT[0].text}])
        assert whole.startswith(turn.replies["plain"].text)
        assert whole != turn.replies["plain"].text
        assert not subject.model.active.edits

    def test_stated_scores_are_kept_with_the_turn(self, subject, store, session):
        events(subject, store, session, WANT[0].text, PUSH)
        stated = state_scores(subject, store, session.id, 0)
        assert set(stated) == {"plain", "steered"}
        assert store.load(session.id).turns[0].stated == stated
        truth = dict(zip(social.DIMENSIONS, WANT[0].posterior_9))
        assert all(stated["plain"].scores[name] == pytest.approx(truth[name], abs=0.25) for name in NAMES)
        with pytest.raises(UserError, match="no turn 4"):
            state_scores(subject, store, session.id, 3)

    def test_a_conversation_of_another_model_is_not_continued(self, subject, store, session):
        store.save(replace(session, fingerprint="0" * 16))
        with pytest.raises(UserError, match="start a new one"):
            events(subject, store, session, "hello")

    def test_a_message_that_does_not_fit_is_refused_and_nothing_is_kept(self, subject, store, session):
        with pytest.raises(UserError, match="exceed the model's 512 tokens"):
            events(subject, store, session, "praise " * 600)
        assert store.load(session.id).turns == []


TURN = Turn(
    "Hello\nthere",
    PUSH,
    DRAW,
    {"steered": Reply("Yes | no", "stop"), "plain": Reply("", "stopped")},
    "steered",
    {"plain": {"user_rightness": 0.25}, "steered": {"user_rightness": 0.5}},
    {"plain": Stated({}, "failed", "what?", "nine_scores-v1")},
    "2026-01-01T00:00:00+00:00",
)


class TestSessions:
    def test_what_is_saved_is_what_is_read(self, store):
        session = replace(new_session("m", "f" * 16, True), turns=[TURN, TURN])
        assert store.load(store.save(session).id) == session
        assert store.names() == [session.id]
        store.delete(session.id)
        assert store.names() == []

    @pytest.mark.parametrize("name", ["../secret", "20260101-000000-zzzzzz", "", "a/b"])
    def test_a_name_is_no_path(self, store, name):
        with pytest.raises(UserError, match="no session is called"):
            store.load(name)

    def test_a_file_that_is_no_session_is_named(self, store):
        name = "20260101-000000-abcdef"
        store.folder.mkdir()
        for content in ("{", "[]", '{"format": 1}', '{"format": 7}'):
            store.path(name).write_text(content)
            with pytest.raises(UserError, match=name):
                store.load(name)

    def test_markdown_holds_everything_that_was_said(self):
        session = replace(new_session("m", "f" * 16, False), turns=[TURN], title="A title")
        text = as_markdown(session)
        for part in ("# A title", "> Hello\n> there", "validation_seeking pushed by +3 SD", "> Yes | no"):
            assert part in text
        assert "| user_rightness | 0.25 | 0.50 |  |" in text
        assert (
            json.loads(json.dumps(as_json(session)))["turns"][0]["replies"]["plain"]["finish_reason"]
            == "stopped"
        )


class TestDesk:
    def test_jobs_run_one_after_another_in_order(self):
        desk, running, log = Desk(), [], []

        def job(name):
            def run(flag):
                running.append(name)
                assert len(running) == 1
                for i in range(3):
                    yield f"{name}{i}"
                running.remove(name)

            return run

        async def read(name):
            log.extend([event async for event in desk.stream(name, job(name))])

        async def everything():
            await asyncio.gather(*(read(name) for name in "abc"))
            return await desk.call(lambda: desk.waiting)

        assert asyncio.run(everything()) == 1
        assert sorted(log) == [f"{name}{i}" for name in "abc" for i in range(3)]
        assert [one for one in log if one.startswith("b")] == ["b0", "b1", "b2"]
        assert desk.waiting == 0
        desk.close()

    def test_an_error_reaches_the_reader_and_the_line_goes_on(self):
        desk = Desk()

        def fails(flag):
            yield 1
            raise UserError("no")

        async def read():
            seen = []
            with pytest.raises(UserError, match="no"):
                async for event in desk.stream("a", fails):
                    seen.append(event)  # noqa: PERF401
            return seen, await desk.call(lambda: 7)

        assert asyncio.run(read()) == ([1], 7)
        desk.close()

    def test_a_reader_that_leaves_ends_its_job_and_one_that_waits_never_begins(self):
        desk, ended, begun = Desk(), threading.Event(), []

        def endless(flag):
            begun.append("a")
            while not flag.is_set():
                yield 0
            ended.set()

        async def read():
            first = desk.stream("a", endless)
            await anext(first)
            second = asyncio.ensure_future(anext(desk.stream("b", endless)))
            await asyncio.sleep(0.05)
            assert desk.stop("b")
            await first.aclose()
            with pytest.raises(StopAsyncIteration):
                await second
            assert not desk.stop("b")

        asyncio.run(read())
        desk.close()
        assert ended.is_set()
        assert begun == ["a"]


class TestRoutes:
    @pytest.fixture
    def client(self, monitored, store):
        with TestClient(
            build(monitored[0], store, monitored[1], LOOPBACK), base_url="http://127.0.0.1:8760"
        ) as client:
            yield client

    def test_a_conversation_over_http(self, client, subject):
        about = client.get("/api/subject").json()
        assert [one["name"] for one in about["dimensions"]] == list(NAMES)
        assert about["talk"]["remember"] is False
        name = client.post("/api/sessions").json()["id"]
        body = {"text": WANT[0].text, "settings": [vars(PUSH[0])], "compare": True, "draw": vars(DRAW)}
        answer = client.post(f"/api/sessions/{name}/turns", json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = [block.split("\n") for block in answer.text.strip().split("\n\n")]
        kinds = [lines[0].removeprefix("event: ") for lines in told]
        assert kinds[:2] + kinds[-1:] == ["queued", "scores", "turn"]
        turn = json.loads(told[-1][1].removeprefix("data: "))
        assert turn["replies"]["plain"]["text"] == reply(subject, [{"role": "user", "content": WANT[0].text}])
        draft = client.post(
            f"/api/sessions/{name}/read", json={"text": WANT[0].text, "settings": [vars(PUSH[0])]}
        )
        assert draft.json() == turn["scores"]
        assert set(client.post(f"/api/sessions/{name}/turns/0/ask").json()) == {"plain", "steered"}
        assert (
            client.post(f"/api/sessions/{name}/turns/0/keep", json={"arm": "plain"}).json()["turns"][0][
                "kept"
            ]
            == "plain"
        )
        assert client.post(f"/api/sessions/{name}", json={"title": "Mine"}).json()["title"] == "Mine"
        exported = client.get(f"/api/sessions/{name}/transcript.json")
        assert "attachment" in exported.headers["content-disposition"]
        assert exported.json() == client.get(f"/api/sessions/{name}").json()
        assert "# Mine" in client.get(f"/api/sessions/{name}/transcript.md").text
        assert [one["title"] for one in client.get("/api/sessions").json()] == ["Mine"]
        client.delete(f"/api/sessions/{name}")
        assert client.get("/api/sessions").json() == []

    def test_errors_are_sentences(self, client):
        name = client.post("/api/sessions").json()["id"]
        body = {"text": "x", "settings": [], "compare": True, "draw": vars(DRAW)}
        for path, wrong, status, part in (
            (f"/api/sessions/{name}/turns", body | {"text": " "}, 400, "empty"),
            (f"/api/sessions/{name}/turns", body | {"settings": [{"dimension": "x"}]}, 422, "settings"),
            ("/api/sessions/nothing/read", {"text": "x"}, 400, "no session is called"),
            (f"/api/sessions/{name}/turns/0/keep", {"arm": "plain"}, 400, "no turn 1"),
        ):
            answer = client.post(path, json=wrong)
            assert answer.status_code == status
            assert part in answer.json()["error"]
        for settings, draw, part in (
            ([{"dimension": "x", "mode": "push", "value": 1}], {}, "no probe reads"),
            ([], {"temperature": -1}, "temperature must be"),
        ):
            told = client.post(
                f"/api/sessions/{name}/turns", json=body | {"settings": settings, "draw": vars(DRAW) | draw}
            )
            assert "event: error" in told.text
            assert part in told.text

    def test_a_defect_is_told_without_its_details(self, client, monkeypatch, caplog):
        name = client.post("/api/sessions").json()["id"]
        monkeypatch.setattr("assumptions.monitor.conversation.Turn", None)
        body = {"text": "praise", "settings": [], "compare": True, "draw": vars(DRAW)}
        told = client.post(f"/api/sessions/{name}/turns", json=body).text
        assert "the server failed at this turn" in told
        assert "NoneType" not in told
        assert "a turn failed" in caplog.text

    def test_other_names_and_other_origins_are_refused(self, client):
        assert client.get("/", headers={"host": "evil.example"}).status_code == 400
        assert client.post("/api/sessions", headers={"origin": "http://evil.example"}).status_code == 403
        assert client.post("/api/sessions", headers={"origin": "http://127.0.0.1:8760"}).status_code == 200
        assert "default-src 'self'" in client.get("/").headers["content-security-policy"]

    def test_a_file_that_is_no_session_stops_no_list(self, client, store):
        store.folder.mkdir(exist_ok=True)
        (store.folder / "20260101-000000-abcdef.json").write_text("{")
        [one] = client.get("/api/sessions").json()
        assert not one["usable"]
        assert "is no session" in one["title"]
