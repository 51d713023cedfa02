"""Capitals in two steps on the embedded model: neurons of city -> state and of state -> capital, on held-out cities.

    make circuits EXPERIMENT=circuits_capitals     the same run, with its report, graph and named neurons
    python benchmarks/circuits_capitals.py         runs it and writes the table
    python benchmarks/circuits_capitals.py --run runs/x   only writes the table of a run that is finished

Sets of neurons are chosen for each state on training cities; a rate is the share of held-out cities whose question gets
the counterfactual city's answer when the set is swapped, the own answer when it is ablated. Intervals resample states.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _circuits_run import run_or_read
from _results import write_results

QUESTIONS = ("state", "capital", "both")


def main() -> None:
    """Run the experiment, or read a finished one, and write table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    metrics, settings, effects = run_or_read("circuits_capitals", parser.parse_args().run)
    raw = {"metrics": metrics, "effects": effects}
    print(
        write_results(
            "circuits_capitals", _claim(metrics, effects), _rows(effects), settings, raw
        ).read_text()
    )
    size = next(name for name in metrics if name.startswith("faithfulness_") and not name.endswith("_ci"))
    swapped = {name: rates["both"][0] for name, rates in metrics["steps"]["swapped"].items()}
    print(json.dumps({"swapped_both": swapped, size: metrics[size], f"{size}_ci": metrics[f"{size}_ci"]}))


def _rows(effects: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a set and edit: how often each question gets the own answer, and the counterfactual's."""
    cells = {(e["nodes"], e["edit"], e["question"]): e for e in effects}
    rows = []
    for nodes, edit in dict.fromkeys((e["nodes"], e["edit"]) for e in effects):
        row: dict[str, Any] = {"neurons": nodes, "edit": edit}
        for question in QUESTIONS:
            effect = cells[nodes, edit, question]
            row |= {f"{question}: own": _shown(effect["own"]), f"{question}: other": _shown(effect["other"])}
        rows.append(row)
    return rows


def _shown(interval: Sequence[float]) -> str:
    return f"{interval[0]:.2f} [{interval[1]:.2f}, {interval[2]:.2f}]"


def _claim(metrics: Mapping[str, Any], effects: Sequence[Mapping[str, Any]]) -> str:
    states, swapped = metrics["steps"]["states"], metrics["steps"]["swapped"]
    controls = max(swapped[name][q][0] for name in swapped if name.endswith("random") for q in QUESTIONS)
    still = next(
        e for e in effects if (e["nodes"], e["edit"], e["question"]) == ("second", "ablated", "both")
    )
    return (
        f"Held-out cities of {states} states. Swapping the neurons of state -> capital gives the two-step question the "
        f"counterfactual's capital on {_shown(swapped['second']['both'])}, those of city -> state on "
        f"{_shown(swapped['first']['both'])}; random ones on at most {controls:.2f}. Not shown: that the neurons are "
        f"needed (with those of state -> capital ablated {_shown(still['own'])} stay right)."
    )


if __name__ == "__main__":
    main()
