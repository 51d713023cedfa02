"""Speed of prefill-only adapters in vLLM beside the bare model and beside all-token adapters, in one interleaved run.

    python benchmarks/preft_serving.py                  the table: about 15 minutes on two cores
    python benchmarks/preft_serving.py --quick          a first look in about two
    python benchmarks/preft_serving.py --curve 16 64 256 512        ratios over context length
    python benchmarks/preft_serving.py --trace trace.jsonl --scenes short     a file of `vllm bench serve`
    python benchmarks/preft_serving.py --model llama-3.1-8b --dtype bfloat16  real shapes, on a GPU

Results are written after every round to benchmarks/results (JSON, table, plot), so a run may be cut at any time, by
--minutes or by hand. The last line of the output is one JSON object: every ratio of the table and its interval.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import _preft_plan as plan
import torch
from _preft_engine import EngineConfig, EngineProcess, Measured, Order
from _preft_models import SHAPES, adapter_folders, model_folder, skeleton
from _preft_report import summary, write
from _preft_trace import Item, popularity, random_trace, read_trace

from preft.vllm.slot_memory import slot_bytes
from shared.errors import UserError

ROOT = Path(__file__).parents[1] / "runs" / "bench-preft"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="25m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quick", action="store_true", help="one short round: 64 prompt, 64 new tokens")
    parser.add_argument("--minutes", type=float, default=15.0, help="start no round after this time")
    parser.add_argument("--scenes", nargs="+", choices=[scene.name for scene in plan.SCENES], default=None)
    parser.add_argument("--arms", nargs="+", choices=plan.ARMS, default=None, help="only these arms")
    parser.add_argument("--curve", nargs="+", type=int, default=[], metavar="PROMPT", help="prompt lengths")
    parser.add_argument("--trace", type=Path, help="JSONL trace to replay instead of random prompts")
    parser.add_argument("--requests", type=int, default=64, help="requests a round")
    parser.add_argument("--concurrency", type=int, default=64, help="requests in flight")
    parser.add_argument("--adapters", type=int, default=64, help="adapters of an arm, all resident")
    parser.add_argument("--popularity", choices=("distinct", "uniform", "zipf"), default="distinct")
    parser.add_argument("--cold", action="store_true", help="adapters are read from disk within the time")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, help="instead of every scene's own")
    parser.add_argument("--new-tokens", type=int, help="instead of every scene's own")
    parser.add_argument("--step-tokens", type=int, default=2048, help="tokens of a scheduler step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the result's files (default: preft_serving, with what differs)")
    options = parser.parse_args(argv)
    if options.quick:
        options.minutes = min(options.minutes, 2.0)
        options.new_tokens = options.new_tokens or 64
    if not options.name:
        kinds = (
            ["quick"] * options.quick
            + ["curve"] * bool(options.curve)
            + [options.model] * (options.model != "25m")
        )
        options.name = "_".join(["preft_serving", *kinds])
    return options


class Benchmark:
    """The engines of a run, opened when a scene needs them, and the records measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = time.monotonic()
        self.records: list[dict[str, Any]] = []
        self.engines: dict[str, EngineProcess] = {}
        self.model = model_folder(options.model, ROOT)
        self.vocabulary = SHAPES[options.model].config["vocab_size"]
        self.trace = read_trace(options.trace, self.vocabulary) if options.trace else None
        self.scenes = self._scenes()
        one = slot_bytes(skeleton(self.model), options.rank, getattr(torch, options.dtype))
        self.settings = vars(options) | {"adapter_slot_mib": round(one / 2**20, 2)}
        self.ratios = (*plan.RATIOS, *plan.curve_ratios(options.curve))

    def _scenes(self) -> list[plan.Scene]:
        chosen = self.options.scenes or ([] if self.options.curve else [scene.name for scene in plan.SCENES])
        scenes = [scene for scene in plan.SCENES if scene.name in chosen]
        if (self.options.quick or self.trace) and not self.options.scenes:
            scenes = scenes[:1]
        scenes += plan.curve_scenes(self.options.curve, 128, self.options.minutes / 2)
        if not (served := [scene for scene in scenes if self._arms(scene)]):
            raise UserError("none of the --arms is in one of the --scenes")
        return served

    def run(self) -> None:
        """Measure scene after scene until the time is up; a scene gets its share of what is left."""
        left = sum(scene.minutes for scene in self.scenes)
        for i, scene in enumerate(self.scenes):
            self._open(scene, self.scenes[i:])
            remaining = self.options.minutes * 60 - (time.monotonic() - self.started)
            self._measure(scene, time.monotonic() + remaining * scene.minutes / left)
            left -= scene.minutes
        self.close()

    def _open(self, scene: plan.Scene, later: list[plan.Scene]) -> None:
        needed = {plan.ARMS[arm].engine for other in later for arm in self._arms(other)}
        for name in set(self.engines) - needed:
            self.engines.pop(name).close()
        new = [name for name in self._engines(scene) if name not in self.engines]
        for name in new:
            self.say(f"{scene.name}: engine {name} starts")
            self.engines[name] = EngineProcess(self._config(name))
        for name in new:
            self.engines[name].ready()

    def _arms(self, scene: plan.Scene) -> list[str]:
        return [arm for arm in scene.arms if not self.options.arms or arm in self.options.arms]

    def _engines(self, scene: plan.Scene) -> list[str]:
        return list(dict.fromkeys(plan.ARMS[arm].engine for arm in self._arms(scene)))

    def _config(self, name: str) -> EngineConfig:
        options, engine = self.options, plan.ENGINES[name]
        arms = [plan.ARMS[arm] for scene in self.scenes for arm in self._arms(scene)]
        mine = [arm.adapters or options.adapters for arm in arms if arm.engine == name and arm.kind]
        longest = max(len(item.prompt) + item.new_tokens for item in self._longest())
        return EngineConfig(
            str(self.model),
            plugin=engine.plugin,
            slots=(engine.slots or options.adapters) if engine.lora else 0,
            cpu_adapters=sum(mine),
            rank=engine.rank or options.rank,
            concurrency=options.concurrency,
            step_tokens=options.step_tokens,
            max_length=-(-longest // 64) * 64,
            dtype=options.dtype,
            gpu_share=0.9 / max(len(self._engines(scene)) for scene in self.scenes),
            dummy_weights=SHAPES[options.model].needs_gpu,
        )

    def _longest(self) -> list[Item]:
        return self.trace or [
            Item([0] * self._lengths(scene)[0], self._lengths(scene)[1]) for scene in self.scenes
        ]

    def _lengths(self, scene: plan.Scene) -> tuple[int, int]:
        curve = scene.name.startswith("context")
        prompt = scene.prompt_tokens if curve else self.options.prompt_tokens or scene.prompt_tokens
        return prompt, self.options.new_tokens or scene.new_tokens

    def _measure(self, scene: plan.Scene, deadline: float) -> None:
        turn = 0
        while turn == 0 or time.monotonic() < deadline:
            for arm in scene.arms_of(turn):
                if arm in self._arms(scene):
                    if turn == 0:  # a short run of every arm first: loads adapters and warms caches
                        self._replay(scene, arm, turn, new_tokens=2)
                    self._record(scene, arm, turn, self._replay(scene, arm, turn))
            write(self.options.name, self.records, self.ratios, self.settings)
            turn += 1

    def _replay(self, scene: plan.Scene, arm: str, turn: int, new_tokens: int | None = None) -> Measured:
        options, who = self.options, plan.ARMS[arm]
        count = who.adapters or options.adapters
        adapters = popularity(options.popularity, options.requests, count, turn, options.seed)
        prompt, new = self._lengths(scene)
        seed = options.seed + 1000 * turn + (500 if new_tokens else 0)
        items = random_trace(options.requests, prompt, new_tokens or new, adapters, self.vocabulary, seed)
        if self.trace:
            drawn = popularity(options.popularity, len(self.trace), count, turn, options.seed)
            pairs = zip(self.trace, drawn, strict=True)
            items = [
                i._replace(adapter=adapter, new_tokens=new_tokens or i.new_tokens) for i, adapter in pairs
            ]
        folders = [str(folder) for folder in self._folders(who, count)]
        return self.engines[who.engine].replay(Order(items, folders, options.concurrency, options.cold))

    def _folders(self, who: plan.Arm, count: int) -> list[Path]:
        if who.kind is None:
            return []
        return adapter_folders(self.model, who.kind, who.rank or self.options.rank, count, who.phase)

    def _record(self, scene: plan.Scene, arm: str, turn: int, measured: Measured) -> None:
        self.records.append({"scene": scene.name, "round": turn, "arm": arm, **measured._asdict()})
        self.say(
            f"{scene.name} round {turn}: {arm:16} {measured.tokens_per_s:7.0f} tokens/s, first token "
            f"{measured.ttft_ms:6.0f} ms, decode step {measured.decode_step_ms:6.1f} ms"
        )

    def say(self, text: str) -> None:
        """A line of progress, with the seconds since the start."""
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def close(self) -> None:
        """End all engines."""
        while self.engines:
            self.engines.popitem()[1].close()


def main() -> None:
    """Measure, write, print the table and its JSON."""
    options = arguments()
    check(options)
    benchmark = Benchmark(options)
    try:
        benchmark.run()
    except KeyboardInterrupt:
        benchmark.say("interrupted: what was measured is written")
    finally:
        benchmark.close()
    if benchmark.records:
        print(write(options.name, benchmark.records, benchmark.ratios, benchmark.settings).read_text())
    print(json.dumps(summary(benchmark.ratios, benchmark.records)))


def check(options: argparse.Namespace) -> None:
    """UserError where this machine cannot run what is asked for."""
    if SHAPES[options.model].needs_gpu and not torch.cuda.is_available():
        raise UserError(
            f"{options.model} is a real model's shape and needs a GPU, which this machine lacks: run this command on "
            "one, or leave --model out to measure the 25m model here"
        )
    if min(options.requests, options.concurrency, options.adapters) < 1:
        raise UserError("--requests, --concurrency and --adapters must be at least 1")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
