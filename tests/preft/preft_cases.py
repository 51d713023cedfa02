"""Adapters that visibly change a tiny model, requests, and the comparison of vLLM with the masked reference."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from preft.adapters import Adapter, AdapterConfig
from preft.composition import Composition
from preft.reference import greedy_reference
from shared.errors import UserError
from shared.generation import Request, Sampling
from shared.models import Model
from shared.tokens import Message, Phase

CONFIGS = {
    "lora_p_0": AdapterConfig(rank=4),
    "lora_p_1": AdapterConfig(rank=8),
    "lora_p_2": AdapterConfig(rank=2, target_modules=("q_proj", "v_proj")),
    "lora_p_3": AdapterConfig(rank=4, alpha=6.0, rslora=True),
    "reft_p_0": AdapterConfig("direft", rank=4),
    "reft_p_1": AdapterConfig("loreft", rank=2, layers=(0, 2)),
    "lora_all": AdapterConfig(rank=4, phase=Phase.ALL),
    "lora_decode": AdapterConfig(rank=4, phase=Phase.DECODE),
    "lora_boundary": AdapterConfig(rank=4, phase=Phase.DECODE_BOUNDARY),
    "reft_all": AdapterConfig("direft", rank=4, phase=Phase.ALL),
}
COMPOSED = "then"  # lora_p_0 for the prompt, lora_decode for the answer


class Case(NamedTuple):
    """One request: its adapter (None for the base model) and its prompt's token ids."""

    adapter: str | None
    prompt: tuple[int, ...]


def stir(adapter: Adapter, seed: int, size: float = 1.0) -> Adapter:
    """Give an adapter factors that are not zero, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * size / parameter.shape[-1] ** 0.5
        adapter.retract_()
    return adapter.requires_grad_(False)


class Checker:
    """Runs cases through an engine and compares each with the reference, which is computed once a case."""

    def __init__(self, model: Model, adapters: Mapping[str, Adapter | Composition]) -> None:
        self.model, self.adapters = model, adapters
        self._known: dict[tuple[Case, int], list[int]] = {}

    def reference(self, case: Case, max_tokens: int) -> list[int]:
        if (case, max_tokens) not in self._known:
            adapter = self.adapters[case.adapter] if case.adapter else None
            stops = tuple(self.model.eos_token_ids)
            found = greedy_reference(self.model.hf, adapter, list(case.prompt), max_tokens, stops)
            assert found.smallest_gap > 2e-5, "a tie in the reference makes the comparison meaningless"
            self._known[case, max_tokens] = found.tokens
        return self._known[case, max_tokens]

    def served(self, engine: Any, cases: Sequence[Case], max_tokens: int) -> list[list[int]]:
        requests = [Request(list(case.prompt), adapter=case.adapter) for case in cases]
        answers = engine.generate(requests, Sampling(max_tokens=max_tokens, logprobs=None))
        return [answer[0].token_ids for answer in answers]

    def check(self, engine: Any, cases: Sequence[Case], max_tokens: int = 16) -> None:
        expected = [self.reference(case, max_tokens) for case in cases]
        found = self.served(engine, cases, max_tokens)
        wrong = [
            f"{case.adapter}, prompt of {len(case.prompt)}: {got} instead of {want}"
            for case, got, want in zip(cases, found, expected)
            if got != want
        ]
        assert not wrong, f"{len(wrong)} of {len(cases)} differ from the reference:\n" + "\n".join(wrong)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random byte tokens (no special ones)."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(5, 261, (length,), generator=generator).tolist())


def chats(count: int, turns: int = 1) -> list[list[Message]]:
    """One-word questions that are always answered in one way."""
    words = ["sun", "moon", "sea", "wind", "rain", "snow", "leaf", "root"]
    found = []
    for i in range(count):
        chat: list[Message] = []
        for turn in range(turns):
            chat.append({"role": "user", "content": words[(i + turn) % len(words)]})
            chat.append({"role": "assistant", "content": f"{words[(i + turn) % len(words)]} yes"})
        found.append(chat)
    return found


def process_id() -> Any:
    """A model that is a process id; one task ends its process, another raises."""

    def work(task: str) -> int:
        if task == "die":
            os._exit(7)
        if task == "raise":
            raise KeyError("gone")
        return os.getpid()

    return work


def no_model() -> Any:
    """What a process of the pool cannot open."""
    raise UserError("no such model")


def distributed_process(rank: int, world: int, port: int, arguments: list[str]) -> None:
    """One of the processes of a launch: trains into the folder named last, twice, and then checks a sharded model."""
    import torch.distributed as dist

    from preft.cli import main

    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in (where | place).items()})
    torch.set_num_threads(1)
    weights = Path(arguments[-1]) / "adapter/adapter_model.safetensors"
    assert main(arguments) == 0
    dist.barrier()  # the first process measures and writes longest
    stamp = weights.stat().st_mtime_ns
    assert main(arguments) == 0
    assert weights.stat().st_mtime_ns == stamp, "a finished run is kept"
    sharded_model_checks()
    dist.destroy_process_group()


def sharded_model_checks() -> None:
    """A model sharded over the processes of the open group: every check is made on all of them."""
    from torch.distributed.fsdp import fully_shard

    from preft.train.module import AdaptedModel, inputs_of
    from preft.train.rows import training_rows
    from preft.train.sharding import gather_, retract_sharded_
    from shared.models import ModelConfig, load
    from shared.tokens import collate

    for method in ("lora", "loreft"):
        model = load(ModelConfig("random:llama"))
        inputs = inputs_of(collate(training_rows(model.tokenizer, chats(3)), 0))
        adapter = stir(Adapter.create(model.hf, AdapterConfig(method, rank=3)), seed=8).requires_grad_(True)
        adapted, twin = AdaptedModel(model.hf, adapter), copy.deepcopy(adapter)
        with adapted.held():
            whole = torch.autograd.grad(adapted(**inputs)["loss"], list(adapter.parameters()))
        with adapted.held(gradient_checkpointing=True):
            for module in [*adapted.modules()][::-1]:
                if type(module).__name__ in adapted._no_split_modules:
                    fully_shard(module)
            fully_shard(adapted)
            adapted(**inputs)["loss"].backward()
        for expected, parameter in zip(whole, adapter.parameters(), strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad.full_tensor(), expected, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(1.5)
        retract_sharded_(adapter, twin)
        for _, delta in gather_(twin, adapter).parts():
            if method == "loreft":
                torch.testing.assert_close(delta.R_RD @ delta.R_RD.T, torch.eye(3), atol=1e-5, rtol=0)
