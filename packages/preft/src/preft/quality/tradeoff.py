"""What a loss costs in speed: generated tokens a second of every arm over the bare model's, from one of two sources.

measured    one vLLM engine a rank, arms and bare model interleaved (`preft.throughput`)
FILE.json   a result of benchmarks/preft_serving.py or benchmarks/demo.py: arms at that benchmark's rank, on its model
            and machine

Speed does not depend on what an adapter has learned, so fresh ones are served.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from preft.adapters import Adapter, AdapterError
from preft.formats import save_adapter
from preft.quality.arms import ADAPTERS
from preft.quality.settings import MEASURED, NONE, AdapterQualityConfig
from preft.quality.stored import stored
from preft.throughput import measure
from shared.models import Model
from shared.runs import Run
from shared.serialize import read_json

# Names of the serving benchmark's arms: all-token adapters on this project's own operators.
BENCHMARK_ARMS = {"lora": "lora_own", "reft": "reft_own", "lora_p": "lora_p", "reft_p": "reft_p"}


class Speed(NamedTuple):
    """An arm's generated tokens a second over the bare model's, median of the rounds, at a rank."""

    arm: str
    rank: int
    over_base: float
    tokens_per_s: float


def speeds(config: AdapterQualityConfig, model: Model, run: Run) -> list[Speed]:
    """Speed of the arms at the ranks that are measured; none where `throughput` is "none"."""
    if config.throughput == NONE:
        return []
    if config.throughput != MEASURED:
        return from_benchmark(Path(config.throughput))
    asked = {"model": model.fingerprint, "arms": config.arms, "trace": config.trace}
    found: list[Speed] = []
    for rank in config.trace_ranks:
        identity = asked | {"rank": rank}
        rows = stored(run, f"throughput/rank-{rank}", identity, partial(_rows, config, model, rank, run))
        found += [Speed(**row) for row in rows]
    return found


def _rows(config: AdapterQualityConfig, model: Model, rank: int, run: Run) -> list[dict[str, Any]]:
    return [one._asdict() for one in _at_rank(config, model, rank, run)]


def from_benchmark(path: Path) -> list[Speed]:
    """Speed of the arms in a recorded result: the scene "short" of the serving benchmark, or the demo's throughput."""
    if not path.is_file():
        raise AdapterError(
            f"throughput: there is no file {path}; give the JSON of benchmarks/preft_serving.py, or measured"
        )
    result: Mapping[str, Any] = read_json(path)
    found = _from_demo(result) if result["name"] == "demo" else _from_serving(result)
    if not found:
        raise AdapterError(f"{path} holds no arm beside base in its scene short: run the whole benchmark")
    return found


def _from_demo(result: Mapping[str, Any]) -> list[Speed]:
    """Ratios of the medians over the demo's rounds, at the demo's rank, 8."""
    medians = result["raw"]["preft"]["throughput"]
    known = [arm for arm in ADAPTERS if arm in medians]
    return [Speed(arm, 8, medians[arm] / medians["base"], medians[arm]) for arm in known]


def _from_serving(result: Mapping[str, Any]) -> list[Speed]:
    """Medians of the ratios of each round, all-token adapters on this project's own operators."""
    records = [one for one in result["raw"] if one["scene"] == "short"]
    base = {one["round"]: one["tokens_per_s"] for one in records if one["arm"] == "base"}
    found = []
    for arm, name in BENCHMARK_ARMS.items():
        own = {one["round"]: one["tokens_per_s"] for one in records if one["arm"] == name}
        ratios = [speed / base[turn] for turn, speed in own.items() if turn in base]
        if ratios:
            rank = int(result["settings"]["rank"])
            found.append(Speed(arm, rank, median(ratios), median(own.values())))
    return found


def _at_rank(config: AdapterQualityConfig, model: Model, rank: int, run: Run) -> list[Speed]:
    """One engine whose adapters all have the rank, so that none pays for another's size."""
    from shared.generation.vllm_engine import VLLMGenerator

    folders = {arm: run.path(f"throughput/{arm}-{rank}") for arm in config.arms}
    for arm, folder in folders.items():
        adapter = Adapter.create(model.hf, replace(ADAPTERS[arm], rank=rank))
        save_adapter(adapter, folder, model.config.name, model.fingerprint)
    trace = config.trace
    engine = {"max_loras": trace.adapters, "max_cpu_loras": trace.adapters * len(folders)}
    served = replace(model.config, dtype=str(model.dtype).removeprefix("torch."))
    with VLLMGenerator(served, adapters=folders, **engine) as generator:
        arms: dict[str, Sequence[Any]] = {"base": []}
        arms |= {
            arm: _copies(arm, folder, place, trace.adapters)
            for place, (arm, folder) in enumerate(folders.items())
        }
        found = measure(generator.llm, arms, trace, model.architecture.vocab_size)
    bare = found.pop("base")
    return [
        Speed(arm, rank, median(own / base for own, base in zip(speed.all, bare.all)), speed.median)
        for arm, speed in found.items()
    ]


def _copies(arm: str, folder: Path, place: int, count: int) -> Sequence[Any]:
    """`count` vLLM requests for distinct adapters of an arm, all from one folder; ids follow the generator's own."""
    from vllm.lora.request import LoRARequest

    first = 1 + len(ADAPTERS) + place * count
    return [LoRARequest(f"{arm}-copy{i}", first + i, str(folder.resolve())) for i in range(count)]
