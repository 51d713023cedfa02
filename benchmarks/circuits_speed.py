"""Speed and memory of circuits: node scores, edges, long prompts; on a GPU also Llama-3.1-8B's shape.

    python benchmarks/circuits_speed.py                 about 90 seconds on two cores
    python benchmarks/circuits_speed.py --only nodes    one part
    python benchmarks/circuits_speed.py --rounds 3

Results are written after every part.

Every round runs all sides of a part one after the other; a figure is the median over rounds with its range. The last
line of the output is one JSON object with every figure, its range under NAME_ci.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import _circuits_edges
import _circuits_gpu
import _circuits_nodes
import torch
from _results import write_results

from shared.allocator import keep_freed_memory

CLAIM = (
    "Node scores and direct edges of random models, float32: ratios of times in one run, sides interleaved."
)
TARGETS = _circuits_nodes.TARGETS | _circuits_edges.TARGETS


def parts() -> dict[str, Callable[[int], list[dict[str, float]]]]:
    """The parts of the benchmark by name: each returns the figures of every round."""
    return {
        "nodes": _circuits_nodes.measure,
        "edges": _circuits_edges.measure,
        "long": lambda rounds: [_circuits_nodes.long_prompt_peak()],
        "gpu": _circuits_gpu.measure,
    }


def summary(rounds: list[dict[str, float]]) -> dict[str, tuple[float, float, float]]:
    """Median, lowest and highest of every figure over the rounds that have it."""
    names = dict.fromkeys(name for figures in rounds for name in figures)
    values = {name: [figures[name] for figures in rounds if name in figures] for name in names}
    return {name: (statistics.median(v), min(v), max(v)) for name, v in values.items()}


def rows(figures: dict[str, tuple[float, float, float]]) -> list[dict[str, Any]]:
    """One row a figure, with what is asked of it."""
    table = []
    for name, (median, low, high) in figures.items():
        sign, bound = TARGETS.get(name, ("", None))
        table.append(
            {
                "figure": name,
                "median": median,
                "range": f"{low:.4g} to {high:.4g}",
                "asked": "" if bound is None else f"{sign} {bound:g}",
            }
        )
    return table


def main() -> None:
    """Measure, write the result, print the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", choices=list(parts()), help="parts to run (default: all there can be)"
    )
    parser.add_argument("--long-prompt", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_freed_memory()  # as the pipelines and commands do; for every side
    if options.long_prompt:  # the process whose memory is measured
        print(json.dumps(_circuits_nodes.run_long_prompt()))
        return
    chosen = options.only or [name for name in parts() if name != "gpu" or torch.cuda.is_available()]
    if "gpu" not in chosen:
        print("no GPU part: it needs a CUDA device" if not torch.cuda.is_available() else "GPU part left out")
    figures: dict[str, tuple[float, float, float]] = {}
    raw = {}
    settings = {"shape": "12 layers, width 256, 1024 neurons", "rounds": options.rounds}
    settings |= {"parts": " ".join(chosen), "threads": str(torch.get_num_threads())}
    stem = "_".join(["circuits_speed", *(options.only or [])])
    for name in chosen:
        print(f"measuring {name} ...", flush=True)
        raw[name] = parts()[name](options.rounds)
        figures |= summary(raw[name])
        page = write_results(
            stem, CLAIM, rows(figures), settings, raw
        )  # what is measured stays if the rest is cut
    print(page.read_text())
    line = {name: median for name, (median, _, _) in figures.items()}
    print(json.dumps(line | {f"{name}_ci": [low, high] for name, (_, low, high) in figures.items()}))


if __name__ == "__main__":
    main()
