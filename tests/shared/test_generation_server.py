"""The wire: what is sent to a server, when it is sent again, and what a user reads when it fails."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shared.errors import UserError
from shared.generation import OpenAIGenerator, Request, Sampling
from shared.generation.requests import sample_seed

CHAT = [{"role": "user", "content": "hi"}]


class FakeServer(ThreadingHTTPServer):
    """A server that echoes: answers are made from the request; the first `failures` posts get status 500."""

    daemon_threads = True
    owner = "someone"
    failures = 0
    models_status = 200
    finish_reason = "stop"
    barrier = None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies = []
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """GET /v1/models and the two completion endpoints."""

    def do_GET(self):
        cards = [
            {"id": name, "object": "model", "created": 0, "owned_by": self.server.owner}
            for name in ("m", "ada")
        ]
        self.reply(self.server.models_status, {"object": "list", "data": cards})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.failures -= 1
            failed = self.server.failures >= 0
        if self.server.barrier is not None:
            self.server.barrier.wait(20)
        if failed:
            self.reply(500, {"error": {"message": "try later"}})
        elif self.path == "/v1/chat/completions":
            content = [{"token": "t", "logprob": -0.5, "bytes": None, "top_logprobs": []}]
            message = {"role": "assistant", "content": f"chat {body['seed']}"}
            self.choice({"message": message, "logprobs": {"content": content}})
        else:
            told = {
                "tokens": ["t"],
                "token_logprobs": [-0.25],
                "top_logprobs": [{"t": -0.25}],
                "text_offset": [0],
            }
            self.choice({"text": f"text {body['prompt']}", "logprobs": told})

    def choice(self, choice):
        choice |= {"index": 0, "finish_reason": self.server.finish_reason}
        self.reply(200, {"id": "1", "object": "x", "created": 0, "model": "m", "choices": [choice]})

    def reply(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    fake = FakeServer()
    thread = threading.Thread(target=fake.serve_forever)
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join()


def test_answers_keep_the_order_of_the_requests(server):
    with OpenAIGenerator(server.url, "m", concurrency=8) as generator:
        answers = generator.generate([Request(f"p{i}") for i in range(40)], Sampling(logprobs=0))
    assert [answer.text for [answer] in answers] == [f"text p{i}" for i in range(40)]
    assert all(answer.logprobs == [-0.25] and answer.token_ids == [] for [answer] in answers)


def test_requests_travel_at_the_same_time(server):
    server.barrier = threading.Barrier(6)  # opens only when six requests are in flight
    with OpenAIGenerator(server.url, "m", concurrency=6, max_retries=0) as generator:
        assert len(generator.generate([Request("x")] * 6, Sampling())) == 6


def test_what_is_sent(server):
    sampling = Sampling(max_tokens=3, temperature=0.5, top_p=0.9, n=2, stop=("end",))
    schema = {"type": "object"}
    with OpenAIGenerator(server.url, "m", concurrency=1) as generator:
        [samples] = generator.generate([Request(CHAT, seed=7, adapter="ada", json_schema=schema)], sampling)
        generator.generate([Request([1, 2])], Sampling(logprobs=None))
    common = {"model": "ada", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "stop": ["end"]}
    answer_format = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }
    for sample, body in enumerate(server.bodies[:2]):
        extra = {
            "seed": sample_seed(7, sample),
            "messages": CHAT,
            "logprobs": True,
            "response_format": answer_format,
        }
        assert body == common | extra
    assert [sample.text for sample in samples] == [f"chat {sample_seed(7, i)}" for i in range(2)]
    assert server.bodies[2].pop("logprobs", None) is None
    plain = {"model": "m", "max_tokens": 64, "temperature": 0.0, "top_p": 1.0, "seed": 0, "prompt": [1, 2]}
    assert server.bodies[2] == plain


def test_vllm_servers_are_asked_for_more(server):
    server.owner = "vllm"
    with OpenAIGenerator(server.url, "m") as generator:
        generator.generate([Request("x")], Sampling())
    assert server.bodies[0]["return_token_ids"] is True
    assert (server.bodies[0]["top_k"], server.bodies[0]["repetition_penalty"]) == (0, 1.0)


def test_failures_are_tried_again_up_to_a_limit(server):
    server.failures = 2
    with OpenAIGenerator(server.url, "m", max_retries=2) as generator:
        assert generator.generate([Request("x")], Sampling())[0][0].text == "text x"
        assert len(server.bodies) == 3
        server.failures = 3
        with pytest.raises(UserError, match="refused a request: .*try later"):
            generator.generate([Request("x")], Sampling())
    assert len(server.bodies) == 6


def test_an_unreachable_server_is_named(server):
    server.server_close()
    with pytest.raises(UserError, match=rf"cannot reach {server.url}: is the server running"):
        OpenAIGenerator(server.url, "m", max_retries=0)


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "refused the key: pass api_key or set OPENAI_API_KEY"), (400, "refused a request")],
)
def test_a_refusal_at_the_door(server, status, message):
    server.models_status = status
    with pytest.raises(UserError, match=message):
        OpenAIGenerator(server.url, "m", max_retries=0)


def test_a_server_without_a_model_list_is_taken_at_its_word(server):
    server.models_status = 404
    with OpenAIGenerator(server.url, "anything", max_retries=0) as generator:
        assert generator.generate([Request("x")], Sampling())[0][0].text == "text x"


def test_what_a_server_cannot_tell_or_do(server):
    with pytest.raises(UserError, match="serves no model 'absent'; it serves: ada, m"):
        OpenAIGenerator(server.url, "absent")
    with OpenAIGenerator(server.url, "m") as generator:
        with pytest.raises(UserError, match="serves no model 'bob'"):
            generator.generate([Request("x"), Request("x", adapter="bob")], Sampling())
        with pytest.raises(UserError, match="logprobs > 0 needs token ids, which only vLLM servers tell"):
            generator.generate([Request("x")], Sampling(logprobs=2))
        assert server.bodies == []
        server.finish_reason = "content_filter"
        with pytest.raises(UserError, match="the server ended a request with 'content_filter'"):
            generator.generate([Request("x")], Sampling())


def test_requests_are_spaced_by_the_rate_limit():
    from shared.generation.pacing import Pace

    now, slept = [100.0], []
    pace = Pace(120.0, clock=lambda: now[0], sleep=slept.append)
    for _ in range(4):
        pace.wait()  # nobody moves the clock: each waits half a second longer than the one before
    assert slept == [0.5, 1.0, 1.5]
    now[0] = 200.0
    pace.wait()
    assert len(slept) == 3
    free = Pace(None, clock=lambda: 0.0, sleep=slept.append)
    free.wait(), free.wait()
    assert len(slept) == 3
    with pytest.raises(UserError, match="requests_per_minute must be positive"):
        Pace(0.0)


def test_every_request_waits_for_its_turn(server, monkeypatch):
    turns = []
    with OpenAIGenerator(server.url, "m", concurrency=4, requests_per_minute=6e6) as generator:
        monkeypatch.setattr(generator._pace, "wait", lambda: turns.append(1))
        generator.generate([Request("x")] * 5, Sampling())
    assert len(turns) == 5
