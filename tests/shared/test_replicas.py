"""Several vLLM processes: how cores and GPUs are shared out, and what a replica does with work, errors and its end."""

import multiprocessing
import os
import threading
from multiprocessing.connection import Connection

import pytest
import torch

from shared.errors import UserError
from shared.generation import Completion, Request, Sampling, VLLMReplicas, replicas
from shared.generation.requests import Draw
from shared.generation.vllm_arguments import platform_arguments

GREEDY = Sampling(max_tokens=4)


class Echo:
    """Stands in for VLLMGenerator in a replica: answers with the prompt, refuses "bad", breaks on "worse"."""

    def __init__(self, config, adapters, **engine):
        if config == "missing":
            raise UserError("no such model")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def _complete(self, draws, sampling):
        prompts = [draw.request.prompt for draw in draws]
        if "bad" in prompts:
            raise UserError("a bad prompt")
        if "worse" in prompts:
            raise ValueError("broken")
        return [Completion(prompt, [sampling.max_tokens], [], "stop") for prompt in prompts]


class Thread(threading.Thread):
    """A thread with what VLLMReplicas asks of a process."""

    exitcode = 1

    def terminate(self):
        raise AssertionError("a replica did not end when its connection closed")


class Threads:
    """A multiprocessing context whose processes are threads, so that `Echo` reaches them."""

    Pipe = staticmethod(multiprocessing.Pipe)
    environments: list

    def __init__(self):
        self.environments = []

    def Process(self, target, args):
        self.environments.append(os.environ["VLLM_CPU_OMP_THREADS_BIND"])
        connection, *rest = args
        own = Connection(os.dup(connection.fileno()))  # as a process has it: the parent closes its copy
        return Thread(target=target, args=(own, *rest))


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr(replicas, "VLLMGenerator", Echo)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # only a main thread may
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5})
    context = Threads()
    monkeypatch.setattr(replicas, "get_context", lambda _: context)
    return context


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("requests", [0, 1, 5])
def test_answers_come_back_in_order_whatever_the_number_of_replicas(threads, count, requests):
    asked = [Request(f"p{i}") for i in range(requests)]
    with VLLMReplicas("model", count) as engine:
        answers = engine.generate(asked, GREEDY)
        assert [answer.text for [answer] in answers] == [request.prompt for request in asked]
    assert len(threads.environments) == count


def test_errors_reach_the_caller_and_the_next_call_is_answered(threads):
    with VLLMReplicas("model", 2) as engine:
        with pytest.raises(UserError, match="a bad prompt"):
            engine.generate([Request("good"), Request("bad")], GREEDY)
        with pytest.raises(RuntimeError, match="replica 0 failed:(.|\n)*ValueError: broken"):
            engine.generate([Request("worse"), Request("bad")], GREEDY)
        assert [a.text for [a] in engine.generate([Request("x"), Request("y")], GREEDY)] == ["x", "y"]
    with pytest.raises(UserError, match="closed"):
        engine.generate([Request("x")], GREEDY)
    engine.close()


def test_a_model_that_does_not_load_is_an_error_of_the_constructor(threads):
    with pytest.raises(UserError, match="no such model"):
        VLLMReplicas("missing", 2)


def test_a_replica_whose_parent_has_gone_ends_without_a_word(threads):
    """It may fail to load after another has, when nobody listens any more."""
    for config in ("missing", "model"):
        here, there = multiprocessing.Pipe()
        here.close()
        replicas._serve(there, config, None, {})


def test_a_replica_that_ended_is_named_and_ends_the_others(threads):
    engine = VLLMReplicas("model", 2)
    thread, connection = engine._children[1]
    here, there = multiprocessing.Pipe()
    there.close()
    engine._children[1] = (thread, here)
    connection.close()
    thread.join()
    with pytest.raises(UserError, match="replica 1 ended with exit code 1"):
        engine.generate([Request("x"), Request("y")], GREEDY)
    with pytest.raises(UserError, match="closed"):
        engine.generate([Request("x")], GREEDY)


def test_an_interrupted_call_leaves_no_answers_to_the_next_one(threads, monkeypatch):
    """Ctrl-C in a notebook: the answers that are on their way must not be taken for those of later requests."""

    def interrupt(*_):
        raise KeyboardInterrupt

    engine = VLLMReplicas("model", 2)
    with monkeypatch.context() as patched:
        patched.setattr(VLLMReplicas, "_receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([Request("x"), Request("y")], GREEDY)
    with pytest.raises(UserError, match="closed"):
        engine.generate([Request("other"), Request("requests")], GREEDY)


def test_cores_are_shared_out_and_the_environment_is_put_back(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    before = dict(os.environ)
    VLLMReplicas("model", 2).close()
    assert threads.environments == ["0,1", "2,5"]
    assert dict(os.environ) == before
    assert [e["OMP_NUM_THREADS"] for e in replicas.environments(3, 1)] == ["1", "1", "1"]
    for count, message in ((0, "at least 1"), (5, "5 replicas do not fit on 4 cores")):
        with pytest.raises(UserError, match=message):
            replicas.environments(count, 1)


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert replicas.environments(2, 2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    assert replicas.environments(2, 1) == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    with pytest.raises(UserError, match="3 replicas of 2 GPUs do not fit on 4 GPUs"):
        replicas.environments(3, 2)


def test_a_draw_can_be_sent_to_another_process():
    import pickle

    draw = Draw(Request([{"role": "user", "content": "hello"}], "a", {"type": "object"}, 3), 5)
    assert pickle.loads(pickle.dumps((draw, GREEDY))) == (draw, GREEDY)


def test_vllm_asks_for_what_a_model_in_this_process_leaves_of_a_gpu(threads, monkeypatch):
    """Its default, nearly all of a GPU, must be free when it starts: beside a loaded model it would not start."""
    assert "gpu_memory_utilization" not in platform_arguments(on_gpu=True)
    memory = [(70e9, 80e9), (40e9, 80e9)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: memory[gpu])
    assert platform_arguments(on_gpu=True)["gpu_memory_utilization"] == pytest.approx(0.45)
    memory[:] = [(79e9, 80e9)] * 2
    assert platform_arguments(on_gpu=True)["gpu_memory_utilization"] == 0.9
    memory[1] = (3e9, 80e9)
    with pytest.raises(UserError, match="leaves vLLM no GPU memory"):
        VLLMReplicas("model", 2)
    assert "gpu_memory_utilization" not in platform_arguments(on_gpu=False)
