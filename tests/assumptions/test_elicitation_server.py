"""Elicitation from a server that misbehaves: no row is lost or doubled, none paid for twice, failures asked again."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from assumptions.chats import Chat
from assumptions.cli import main
from assumptions.dimensions import NAMES
from assumptions.elicitation import ElicitationSettings, elicit
from assumptions.instruments import instrument
from assumptions.records import read
from shared.data import write_rows
from shared.errors import UserError
from shared.generation import OpenAIGenerator

NINE = instrument("nine_scores")
SETTINGS = ElicitationSettings(batch_size=8)
SCORES = dict.fromkeys(NAMES, 0.3)
# What goes wrong with a row, for good while the server is ill, and what its record then says.
LASTING = {
    3: ("garbage", "no JSON"),
    7: ("text", "holds no choice"),
    12: ("empty", "holds no choice"),
    17: ("null", "holds no choice"),
    18: ("filtered", "content_filter"),
    20: ("stall", "did not answer in time"),
    21: ("refused", "too long for me"),
}
PASSING = {1: "error", 2: "limit", 9: "hang up", 13: "limit"}  # once each


class Server(ThreadingHTTPServer):
    """Answers every row with the same scores, or as the tables say; counts what it was asked."""

    daemon_threads = True

    def __init__(self, pause=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.lock, self.ill, self.pause = Counter(), threading.Lock(), True, pause
        self.waits, self.released = [], threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def fault(self, row):
        """What happens to this request."""
        with self.lock:
            self.asked[row] += 1
            self.waits.append((row, time.monotonic()))
            if self.asked[row] == 1 and row in PASSING:
                return PASSING[row]
        return LASTING[row][0] if self.ill and row in LASTING else ""


class Handler(BaseHTTPRequestHandler):
    """The list of models, and chat completions."""

    def do_GET(self):
        self.send(200, json.dumps({"object": "list", "data": [{"id": "m", "owned_by": "x", "created": 0}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        row = int(re.search(r"row (\d+)\.", body["messages"][-1]["content"])[1])
        time.sleep(self.server.pause)
        message = {"role": "assistant", "content": json.dumps(SCORES)}
        match self.server.fault(row):
            case "error":
                self.send(500, '{"error": {"message": "later"}}')
            case "limit":
                self.send(429, '{"error": {"message": "slow down"}}', {"Retry-After": "0.4"})
            case "hang up":
                self.close_connection = True
            case "garbage":
                self.send(200, '{"choices": [{"mess')
            case "text":
                self.send(200, "<html>busy</html>", {"Content-Type": "text/html"})
            case "empty":
                self.send(200, '{"choices": []}')
            case "null":
                self.send(200, '{"choices": [{"index": 0, "finish_reason": "stop", "message": null}]}')
            case "filtered":
                self.choose(message, "content_filter")
            case "stall":
                self.server.released.wait(20)
            case "refused":
                self.send(400, '{"error": {"message": "too long for me"}}')
            case _:
                self.choose(message, "stop")

    def choose(self, message, reason):
        self.send(200, json.dumps({"choices": [{"index": 0, "finish_reason": reason, "message": message}]}))

    def send(self, status, text, headers=()):
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | dict(headers)).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(request):
    fake = Server(getattr(request, "param", 0.0))
    thread = threading.Thread(target=fake.serve_forever)
    thread.start()
    yield fake
    fake.released.set()
    fake.shutdown()
    fake.server_close()
    thread.join()


def chats(count):
    return [Chat(f"c{i:02}", f"This is row {i}.", group=str(i)) for i in range(count)]


def ask(server, path, count=24):
    with OpenAIGenerator(server.url, "m", concurrency=8, max_retries=1, timeout=1.5) as engine:
        return elicit(engine, NINE, chats(count), path, SETTINGS, model="m")


def test_faults_of_single_rows_are_recorded_and_asked_again_and_nothing_else_is(server, tmp_path):
    path = tmp_path / "answers.jsonl"
    answers = ask(server, path)
    failed = {record.id: record.error for record in answers.records if record.error}
    assert set(failed) == {f"c{row:02}" for row in LASTING}
    for row, (_, said) in LASTING.items():
        assert said in failed[f"c{row:02}"]
    assert answers.health()["clean"] == 24 - len(LASTING)
    once = {row for row in range(24) if row not in PASSING and row not in LASTING}
    assert {server.asked[row] for row in once} == {1}  # no answer is paid for twice
    assert {server.asked[row] for row in PASSING} == {2}
    first, second = (when for row, when in server.waits if row == 2)
    assert second - first >= 0.4  # as the server asked for

    server.asked.clear()
    server.ill = False
    answers = ask(server, path)
    assert set(server.asked) == set(LASTING)
    assert [record.scores for record in answers.records] == [SCORES] * 24
    _, records = read(path)
    assert Counter(record.id for record in records) == Counter(
        {f"c{row:02}": 1 + (row in LASTING) for row in range(24)}
    )
    server.asked.clear()
    ask(server, path)
    assert not server.asked


def test_a_server_that_refuses_everything_is_an_error_and_no_row_is_marked(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "fault", lambda *_: "refused")
    with pytest.raises(UserError, match="too long for me"):
        ask(server, tmp_path / "answers.jsonl")
    _, records = read(tmp_path / "answers.jsonl")
    assert records == []


@pytest.mark.parametrize("server", [0.1], indirect=True)
def test_a_command_that_is_killed_goes_on_where_it_was(server, tmp_path, capsys):
    server.ill = False
    write_rows(tmp_path / "rows.jsonl", [{"id": c.id, "text": c.turn} for c in chats(40)])
    out = tmp_path / "out"
    command = f"elicit --server {server.url} --model m --data {tmp_path}/rows.jsonl --out {out}".split()
    command += ["--batch-size", "4", "--concurrency", "4"]
    process = subprocess.Popen([sys.executable, "-m", "assumptions", *command])
    try:
        deadline = time.monotonic() + 120
        while sum(server.asked.values()) < 14:
            assert time.monotonic() < deadline, "the command asked nothing"
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    written = (out / "answers.jsonl").read_bytes().count(b"\n") - 1
    assert 8 <= written < 40
    assert main([*command, "--batch-size", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["clean"] == 40
    _, records = read(out / "answers.jsonl")
    assert Counter(record.id for record in records) == Counter(f"c{row:02}" for row in range(40))
    twice = [row for row, times in server.asked.items() if times > 1 and row not in PASSING]
    assert len(twice) <= 8  # of the batches that were on their way
