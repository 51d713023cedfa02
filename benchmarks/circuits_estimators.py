"""How near every estimator comes to exact patching of single neurons, and how well its top neurons do as a set.

    python benchmarks/circuits_estimators.py [--stories ../shared/models/stories260k] [--natural 12] [--pairs 3]

Single nodes: every neuron of a prompt at every position is set to zero, one at a time, by brute force; the table has
each estimator's Pearson and Spearman correlation with it and the overlap of the 20 strongest. Sets: faithfulness and
completeness of the 20 strongest neurons, all others at zero. The two rank estimators differently: that is the finding,
whichever wins. Medians over prompts with 95 % bootstrap intervals: TinyWorld's agreement and capital pairs, and, where
it lies beside the checkout, a 260K model of stories. Every prompt is a stage of the run folder: a run goes on when
called again.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import write_results

from circuits.attribution import ESTIMATORS, Problem, Settings, attribute, pose
from circuits.faithfulness import curve
from circuits.metric import logit_difference, top_logits
from circuits.tasks import answer_token
from shared.models import Model, load
from shared.runs import start_run
from shared.stats import bootstrap_interval, spearman
from shared.tinyworld.tasks import agreement_pairs, capital_pairs

CLAIM = "Estimators of neuron scores against exact patching of every neuron (zero reference), medians over prompts."
STORIES = Path(__file__).parents[1] / ".." / "shared" / "models" / "stories260k"
NATURAL = (
    "Once upon a time, there was a little girl named Lily. She loved to play with her",
    "The sun was hot. Ben wanted to drink some",
    "He was so happy that he gave his mom a big",
    "Tom and Sam are friends. They like to play with",
    'Mom said, "Do not run in the house." But Tim',
    "They went home and ate",
    "One day, a big dog saw a small cat. The cat was",
    "She was very sad because she lost her toy. Her mom gave her a",
    "The bird could fly high in the",
    "Lily and her brother went to the park to play on the",
    "Once upon a time, there was a boy named Tim. He had a red",
    "The cat and the dog were good",
    "Sara had a big box. She put her",
    "It was a sunny day. The children ran to the",
)
TOP = 20


def tinyworld_problems(model: Model, count: int) -> Iterator[tuple[str, Problem]]:
    """Agreement across a noun and capitals: the logit of the right answer over the wrong one."""
    for name, pairs in (
        ("agreement", agreement_pairs("nounpp", "test", count)),
        ("capitals", capital_pairs("test", count)),
    ):
        for pair in pairs:
            ids = [[answer_token(model.tokenizer, word)] for word in (pair.answer, pair.wrong)]

            def metric(logits: torch.Tensor, at: torch.Tensor, ids: list[list[int]] = ids) -> Any:
                return logit_difference(logits, at, *ids)

            yield f"tinyworld {name}", pose(model, model.encode([pair.clean]), metric)


def story_problems(model: Model, count: int) -> Iterator[tuple[str, Problem]]:
    """The most likely next token's logit above the mean."""
    for prompt in NATURAL[:count]:
        yield "stories260k", pose(model, model.encode([prompt]), lambda logits, at: top_logits(logits, at, 1))


def compare(problem: Problem, name: str, exact_n: np.ndarray) -> dict[str, float]:
    """One estimator on one prompt."""
    start = time.perf_counter()
    scores_BKLTN = attribute(problem, name, settings=Settings(steps=10))
    seconds = time.perf_counter() - start
    found_n = scores_BKLTN[0, 0].flatten().numpy()
    strongest = [set(np.argsort(-np.abs(values))[:TOP].tolist()) for values in (found_n, exact_n)]
    [point] = curve(
        problem.model, problem.batch, problem.metric, scores_BKLTN[:, 0], [TOP], problem.reference_BLTN
    )
    faithfulness, completeness = point.per_example()[:, 0].tolist()
    return {
        "pearson": float(np.corrcoef(found_n, exact_n)[0, 1]),
        "spearman": float(spearman(found_n, exact_n)),
        "top_20_overlap": float(len(strongest[0] & strongest[1])),
        "faithfulness_20": faithfulness,
        "completeness_20": completeness,
        "seconds": seconds,
    }


def measure(problem: Problem, settings: Settings) -> dict[str, dict[str, float]]:
    """Every estimator on one prompt, the brute force first."""
    start = time.perf_counter()
    exact = attribute(problem, "exact", settings=settings)[0, 0].flatten().numpy()
    brute_s = time.perf_counter() - start
    found = {name: compare(problem, name, exact) for name in ESTIMATORS if name != "exact"}
    return {"exact": {"nodes": float(exact.size), "seconds": brute_s}} | found


def median(values: np.ndarray) -> np.ndarray:
    """Median over the last axis."""
    return np.asarray(np.median(values, axis=-1))


def table(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a data set and estimator: medians over its prompts, with intervals but for the seconds."""
    rows = []
    for data in dict.fromkeys(one["data"] for one in measured):
        group = [one["figures"] for one in measured if one["data"] == data]
        for name in group[0]:
            if name == "exact":
                continue
            row: dict[str, Any] = {"data": data, "estimator": name, "prompts": len(group)}
            for key in group[0][name]:
                middle, low, high = bootstrap_interval([one[name][key] for one in group], statistic=median)
                row[key] = middle if key == "seconds" else f"{middle:.2f} [{low:.2f}, {high:.2f}]"
            rows.append(row)
    return rows


def winners(rows: list[dict[str, Any]]) -> str:
    """Which estimator has the best median of each figure, a data set after the other."""
    ideal = {"spearman": 1.0, "top_20_overlap": float(TOP), "faithfulness_20": 1.0}
    said = []
    for data in dict.fromkeys(row["data"] for row in rows):
        named = []
        for figure, wanted in ideal.items():
            values = {row["estimator"]: float(row[figure].split()[0]) for row in rows if row["data"] == data}
            nearest = min(values.values(), key=lambda value: abs(value - wanted))
            names = " and ".join(name for name, value in values.items() if value == nearest)
            named.append(f"{figure} {names} ({nearest:.2f})")
        said.append(f"{data}: {', '.join(named)}")
    return "Best medians: " + "; ".join(said) + "."


def main() -> None:
    """Measure and write the result after every prompt."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stories", type=Path, default=STORIES)
    parser.add_argument("--natural", type=int, default=12, help="prompts of the stories model")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of each TinyWorld task")
    parser.add_argument("--folder", type=Path, default=Path("runs/circuits_estimators"))
    options = parser.parse_args()
    sources = [tinyworld_problems(load("tinyworld"), options.pairs)]
    if options.stories.is_dir():
        sources.insert(0, story_problems(load(str(options.stories)), options.natural))
    settings = {"steps": 10, "reference": "zero", "top": TOP}
    measured: list[dict[str, Any]] = []
    with start_run(options.folder, settings) as run:
        for source in sources:
            for index, (data, problem) in enumerate(source):
                name = f"{data.replace(' ', '_')}_{index}.json"
                figures = run.json_stage(name, partial(measure, problem, Settings(chunk=128)))
                measured.append({"data": data, "figures": figures})
                print(f"{data}: {figures['exact']}", flush=True)
                rows = table(measured)
                page = write_results(
                    "circuits_estimators", f"{CLAIM} {winners(rows)}", rows, settings, measured
                )
    print(page.read_text())


if __name__ == "__main__":
    main()
