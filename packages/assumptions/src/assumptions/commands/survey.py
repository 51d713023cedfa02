"""`assumptions survey`: what people expect of an answer from an assistant and from a person, and what a model assumes.

    assumptions survey items queries.csv --participants 20 --out survey.csv
    assumptions survey analyze survey.csv ratings.csv --scores runs/mine/scores.csv --out runs/gap

`items` writes the counterbalanced questions; people answer with a number from 0 to 100 in a column `rating`, left empty
where they pass a question over. `analyze` fits the mixed model a dimension and sets the model's elicited scores
(`assumptions elicit`, ids those of the queries) beside people's: the folder gets metrics.json and report.html.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shared.commands import output_file, output_folder

if TYPE_CHECKING:
    from assumptions.expectations import Gap
    from shared.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two steps and their options."""
    steps = parser.add_subparsers(dest="step", required=True, metavar="items|analyze")
    items = steps.add_parser("items", help="write the questions of all participants")
    items.add_argument("queries", type=Path, help="messages to ask about: columns id and text")
    items.add_argument("--participants", type=int, required=True, help="an even number")
    items.add_argument("--dimensions", nargs="+", help="default: all nine")
    items.add_argument("--out", type=output_file, required=True, help="the questions: .csv or .jsonl")
    items.add_argument("--seed", type=int, default=0)
    analyze = steps.add_parser("analyze", help="fit the mixed model, and set a model's scores beside")
    analyze.add_argument("survey", type=Path, help="the questions that `items` wrote")
    analyze.add_argument(
        "ratings", type=Path, help="columns participant, query, addressee, dimension, rating"
    )
    analyze.add_argument("--scores", type=Path, help="scores.csv of a model about the same queries")
    analyze.add_argument("--out", type=output_folder, required=True, help="folder of the results")
    analyze.add_argument("--seed", type=int, default=0)


def main(arguments: argparse.Namespace) -> None:
    """Take the step."""
    (_items if arguments.step == "items" else _analyze)(arguments)


def _items(arguments: argparse.Namespace) -> None:
    from assumptions.dimensions import NAMES, dimension
    from assumptions.expectations import Query, export_survey, survey
    from shared.data import read_rows

    dimensions = [dimension(name).name for name in arguments.dimensions or NAMES]
    queries = read_rows(arguments.queries, Query, drop_extra=True)
    asked = survey(queries, arguments.participants, dimensions, arguments.seed)
    export_survey(arguments.out, asked)
    print(
        f"{arguments.out}: {len(asked)} questions, {len(queries)} queries, {arguments.participants} participants"
    )


def _analyze(arguments: argparse.Namespace) -> None:
    from assumptions.expectations import Asked, gaps, import_ratings, read_scores
    from shared.data import read_rows
    from shared.runs import start_run
    from shared.serialize import plain

    asked = read_rows(arguments.survey, Asked)
    scores = read_scores(arguments.scores) if arguments.scores else {}
    ratings = import_ratings(arguments.ratings, asked)
    found = gaps(ratings, scores, arguments.seed)
    question = {name: str(getattr(arguments, name)) for name in ("survey", "ratings", "scores")}
    with start_run(arguments.out, {"command": "survey"} | question, arguments.seed) as run:
        run.metrics(
            {"answered": len(ratings) / len(asked), "gaps": {one.dimension: plain(one) for one in found}}
        )
        add_survey(run.report, found, len(ratings), len(asked))
    print(arguments.out / "report.html")


def add_survey(report: "Report", found: list["Gap"], answered: int, asked: int) -> None:
    """The page: effect of the addressee with its interval by dimension, variances, and the model's gap."""
    report.text(
        f"# What people expect, and what a model assumes\n\n{answered} of {asked} questions were answered. The "
        "effect of the addressee is the rating (0 to 1) of an answer from an assistant less that from a person, by a "
        "mixed model with random intercepts of participant and query. The gap is the model's score less people's "
        "mean rating for an assistant; its bootstrap interval is over queries."
    )
    rows = []
    for one in found:
        fit, gap = one.addressee, one.model_less_people
        row = {"dimension": one.dimension, "assistant less person": fit.slope.estimate}
        row |= {"from": fit.slope.low, "to": fit.slope.high, "for a person": fit.intercept}
        row |= {"SD of participants": fit.group_sd[0], "SD of queries": fit.group_sd[1]}
        row |= {"SD of the rest": fit.residual_sd}
        row |= {"model less people": gap.estimate, "low": gap.low, "high": gap.high} if gap else {}
        rows.append(row)
    report.table(rows, "By dimension")
