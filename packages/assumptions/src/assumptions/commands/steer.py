"""`assumptions steer`: steer replies to a study's test messages along its probes, beside controls, and judge them."""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from assumptions.settings import Control
from assumptions.steering import Scope

LEAST_JUDGED = 0.5  # share of replies below which a slope is not worth much


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `assumptions steer`."""
    parser.add_argument("study", type=Path, help="folder that `assumptions probe` has gone on with")
    parser.add_argument("--dimensions", nargs="+", help="default: validation_seeking objectivity_seeking")
    parser.add_argument(
        "--doses",
        nargs="*",
        type=float,
        help="in SD of the projection, 0 among them; without any the range in which replies stay coherent is searched",
    )
    parser.add_argument("--scope", choices=get_args(Scope), help="tokens that are steered; default: all")
    parser.add_argument("--random", type=int, help="random directions beside each")
    parser.add_argument(
        "--controls",
        nargs="*",
        choices=get_args(Control),
        help="beside the random ones; default: all of them",
    )
    parser.add_argument(
        "--block",
        choices=("dose_response", "reading"),
        help="where to steer: chosen by dose-response on validation messages (default), or where the score is read",
    )
    parser.add_argument("--messages", type=int, help="test messages answered at every dose")
    parser.add_argument("--again", type=int, help="test messages elicited again at every dose; 0 for none")
    parser.add_argument("--max-tokens", type=int, help="of a reply; default: 400")
    parser.add_argument("--engine", choices=("hf", "vllm"), help="vllm serves the directions as adapters")
    parser.add_argument(
        "--judge",
        choices=("lexical", "local", "server"),
        help="lexical: exact, of the embedded world's replies; local: a model (default: the one that is studied); "
        "server: an OpenAI-compatible one, its key in OPENAI_API_KEY",
    )
    parser.add_argument("--judge-model", help="name or folder of the model that judges")
    parser.add_argument("--judge-repeats", type=int, help="grades a reply; above 1 with --judge-temperature")
    parser.add_argument("--judge-temperature", type=float, help="of the judge; default: 0")
    parser.add_argument(
        "--human-grades",
        type=Path,
        help="people's grades to set beside: columns message, reply, outcome, score",
    )
    parser.add_argument("--judge-url", help="address of the server: http://127.0.0.1:8000/v1")


def main(arguments: argparse.Namespace) -> None:
    """Steer, judge, and print the slope of every direction beside the steepest random one."""
    from dataclasses import replace

    from assumptions.commands.study import advance, load_study, table

    study = load_study(arguments.study)
    names = ("dimensions", "doses", "scope", "random", "controls", "messages", "max_tokens", "engine")
    steering = replace(study.settings.steering, **given(arguments, names))
    if arguments.block is not None:
        steering = replace(steering, choice=replace(steering.choice, by=arguments.block))
    judge = study.settings.judge
    if arguments.judge is not None:
        model = study.model.name if arguments.judge == "local" else ""
        judge = replace(judge, kind=arguments.judge, model=model, url="")
    options = {
        name: getattr(arguments, f"judge_{name}") for name in ("model", "url", "repeats", "temperature")
    }
    options["human"] = None if arguments.human_grades is None else str(arguments.human_grades)
    judge = replace(judge, **{name: value for name, value in options.items() if value is not None})
    again = study.settings.again if arguments.again is None else arguments.again
    settings = replace(study.settings, steering=steering, judge=judge, again=again)
    figures = advance(arguments.study, replace(study, settings=settings), "steer")
    rows = {
        name: {
            "slope": figures["dose_response_slope"][name],
            "over random": figures["slope_over_largest_random"][name],
            "rho": figures["dose_response_rho"][name],
            "judged at 0": figures["judged"][name]["0"],
        }
        for name in steering.dimensions
    }
    print(table(rows))
    unjudged = [name for name, row in rows.items() if (row["judged at 0"] or 0.0) < LEAST_JUDGED]
    if unjudged:
        print(
            f"note: the judge ({judge.kind}) graded less than half of the unedited replies under "
            f"{', '.join(unjudged)}, so the slopes mean little: name another with --judge",
            file=sys.stderr,
        )
    for name, against in figures["doubts"].items():
        for one in against:
            print(f"note: {name}: {one}", file=sys.stderr)
    folder = arguments.study
    print(f"next: assumptions report {folder}; assumptions monitor --study {folder}")


def given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """The options among `names` that were given."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}
