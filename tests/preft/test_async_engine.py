"""The asynchronous engine in a process of its own: concurrent requests, cancellation, adapters that come and go.

The engine process finds the plugin by its entry point; adapters are loaded, swapped and removed over its client.
"""

import asyncio
import shutil
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from preft_cases import CONFIGS, Case, Checker, prompt, stir

from preft.adapters import Adapter
from preft.formats import save_adapter
from preft.reference import greedy_reference
from shared.generation.process_state import third_party_warnings_ignored
from shared.models import Model

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.slow]
KINDS = [None, *CONFIGS]
KEPT: list[Any] = []  # ZeroMQ contexts: vLLM leaves their end to the interpreter's, and a collected one warns


class Client:
    """The engine, the loop it lives in, and the adapters by name."""

    def __init__(self, engine: Any, loop: asyncio.Runner, folders: dict[str, Path]) -> None:
        from vllm.lora.request import LoRARequest

        self.engine, self.loop, self.count = engine, loop, 0
        self.loras = {
            name: LoRARequest(name, i, str(path)) for i, (name, path) in enumerate(folders.items(), 1)
        }

    def run(self, work: Any) -> Any:
        async def patient() -> Any:
            return await asyncio.wait_for(work, timeout=200)

        return self.loop.run(patient())

    async def stream(
        self, text: Any, lora: Any, max_tokens: int, **sampling: Any
    ) -> AsyncGenerator[list[int], None]:
        """New tokens of a greedy request, as they come."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.count += 1
        kind = RequestOutputKind.DELTA
        params = SamplingParams(max_tokens=max_tokens, temperature=0, output_kind=kind, **sampling)
        async for output in self.engine.generate(text, params, f"request-{self.count}", lora_request=lora):
            if output.outputs[0].token_ids:
                yield list(output.outputs[0].token_ids)

    async def answer(self, case: Case, max_tokens: int = 16, lora: Any = None) -> list[int]:
        text = {"prompt_token_ids": list(case.prompt)}
        lora = lora or (self.loras[case.adapter] if case.adapter else None)
        return [token async for tokens in self.stream(text, lora, max_tokens) for token in tokens]

    async def answers(self, cases: list[Case], max_tokens: int = 16) -> list[list[int]]:
        return list(await asyncio.gather(*(self.answer(case, max_tokens) for case in cases)))


@pytest.fixture(scope="module")
def client(model_folder: Path, folders: dict[str, Path], plugin: None) -> Iterator[Client]:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(model_folder),
        dtype="float32",
        enforce_eager=True,
        distributed_executor_backend="uni",
        max_model_len=256,
        max_num_seqs=12,
        max_num_batched_tokens=64,
        block_size=32,
        enable_lora=True,
        max_loras=2,
        max_cpu_loras=16,
        max_lora_rank=8,
        disable_log_stats=True,
    )
    with asyncio.Runner() as loop, third_party_warnings_ignored():

        async def build() -> Any:
            return AsyncLLM.from_engine_args(arguments)

        async def end(engine: Any) -> None:
            engine.shutdown()  # within the loop: vLLM leaves the closing of its sockets to it

        engine = loop.run(build())
        KEPT.append(engine.engine_core.resources.ctx)
        try:
            yield Client(engine, loop, folders)
        finally:
            loop.run(end(engine))


def every_kind(length: int) -> list[Case]:
    return [Case(name, prompt(length + 3 * i, i)) for i, name in enumerate(KINDS)]


def test_concurrent_requests_of_every_kind(client: Client, checker: Checker) -> None:
    cases = every_kind(20) + every_kind(41)
    assert client.run(client.answers(cases)) == [checker.reference(case, 16) for case in cases]


def test_cancelled_requests_disturb_no_other(client: Client, checker: Checker) -> None:
    """Clients leave before the first token, after it and in mid-answer, while others are served."""
    kept, left = every_kind(30), every_kind(35)

    async def leave(case: Case, after: int) -> None:
        stream = client.stream(
            {"prompt_token_ids": list(case.prompt)}, client.loras.get(case.adapter or ""), 64
        )
        if after == 0:  # the first token never comes
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), timeout=1e-3)
        for _ in range(after):
            await anext(stream, None)
        await stream.aclose()

    async def work() -> list[list[int]]:
        leaving = [asyncio.create_task(leave(case, i % 4)) for i, case in enumerate(left)]
        found = await client.answers(kept)
        await asyncio.gather(*leaving)
        return found

    assert client.run(work()) == [checker.reference(case, 16) for case in kept]
    assert client.run(client.answers(left[:4])) == [checker.reference(case, 16) for case in left[:4]]


def test_adapters_come_change_and_go_under_load(
    client: Client, checker: Checker, model: Model, adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    """A swap and a removal in mid-run: who decodes goes on, who comes next gets the new weights."""
    from vllm.lora.request import LoRARequest

    versions = [adapters["lora_p_1"], stir(Adapter.create(model.hf, CONFIGS["lora_p_1"]), seed=55)]
    checks = Checker(model, {"0": versions[0], "1": versions[1]})
    folder, background = tmp_path / "versioned", every_kind(25)

    async def serve_version(number: int) -> tuple[list[int], AsyncGenerator[list[int], None]]:
        shutil.rmtree(folder, ignore_errors=True)
        save_adapter(versions[number], folder)
        assert await client.engine.add_lora(
            LoRARequest("versioned", 80, str(folder), load_inplace=number > 0)
        )
        lora = LoRARequest("versioned", 80, str(folder))
        stream = client.stream({"prompt_token_ids": list(prompt(40, number))}, lora, 24)
        return await anext(stream), stream

    async def work() -> tuple[Any, ...]:
        others = asyncio.create_task(client.answers(background))
        streams = [await serve_version(number) for number in (0, 1)]
        assert await client.engine.remove_lora(80)
        rest = [first + [token async for tokens in stream for token in tokens] for first, stream in streams]
        return rest, await others

    found, others = client.run(work())
    assert found == [checks.reference(Case(str(i), prompt(40, i)), 24) for i in (0, 1)]
    assert others == [checker.reference(case, 16) for case in background]


def test_a_bad_adapter_is_refused_and_the_engine_lives_on(
    client: Client, checker: Checker, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    case = Case("lora_p_0", prompt(20))
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        client.run(client.answer(case, lora=LoRARequest("nothing", 81, str(tmp_path))))
    assert client.run(client.answer(case)) == checker.reference(case, 16)


@pytest.mark.parametrize("name", [None, "lora_p_0", "reft_p_0", "lora_all", "lora_decode", "lora_boundary"])
def test_streaming_input_reads_its_history_as_prompt(
    client: Client, model: Model, adapters: dict[str, Adapter], name: str | None
) -> None:
    """Each addition makes the whole session a prompt, as a new request would; the last token sampled is dropped."""
    from vllm.engine.protocol import StreamingInput

    parts, length = [prompt(20, 11), prompt(15, 12), prompt(40, 13)], 10
    turns: list[list[int]] = [[]]
    answered = asyncio.Queue[None]()

    async def inputs() -> AsyncGenerator[Any, None]:
        for i, part in enumerate(parts):
            if i:
                await answered.get()
            yield StreamingInput(prompt={"type": "token", "prompt_token_ids": list(part)})

    async def work() -> None:
        lora = client.loras[name] if name else None
        async for tokens in client.stream(inputs(), lora, length, ignore_eos=True):
            turns[-1] += tokens
            if len(turns[-1]) == length:
                turns.append([])
                answered.put_nowait(None)

    client.run(work())
    text: list[int] = []
    for part, turn in zip(parts, turns):
        text += part
        assert turn == greedy_reference(model.hf, adapters[name] if name else None, text, length).tokens
        text += turn[:-1]
