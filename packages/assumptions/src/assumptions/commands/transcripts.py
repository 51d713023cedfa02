"""`assumptions transcripts`: what a model assumes at every turn of finished conversations, and how it drifts.

    assumptions transcripts --model path/to/model --data mine.jsonl --out runs/drift
    assumptions transcripts --model path/to/model --data spiral_bench/results:res_v0.2/MODEL.json --out runs/spirals

Every user message is put to the instrument with all that came before it. The folder gets answers-KEY.jsonl (resumed),
turns.csv (one row a turn), metrics.json (slopes on the turn) and report.html.
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from assumptions.commands.engine import add_engine, check_engine, named, open_engine
from shared.commands import output_folder

if TYPE_CHECKING:
    from assumptions.corpora.item import Item
    from assumptions.spirals import Spiral
    from shared.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `assumptions transcripts`."""
    add_engine(parser)
    parser.add_argument(
        "--data",
        required=True,
        help="rows of id and messages (role, content), or a public set: NAME/PART:SOURCE",
    )
    parser.add_argument("--out", type=output_folder, required=True, help="folder of the results")
    parser.add_argument("--instrument", default="nine_scores", help="asked at every turn")
    parser.add_argument("--limit", type=int, help="at most so many transcripts")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer to the instrument")
    parser.add_argument("--seed", type=int, default=0)


@dataclass(frozen=True)
class TranscriptRow:
    """A row of a file of transcripts."""

    messages: list[dict[str, str]]
    id: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        from assumptions.chats import read_history

        if not read_history(self.messages):
            raise ValueError("'messages' is empty")


def main(arguments: argparse.Namespace) -> None:
    """Ask about every turn, write the table, the figures and the page, and print the page's place."""
    from assumptions.answer_file import answers_path
    from assumptions.elicitation import ElicitationSettings, check, elicit, header
    from assumptions.instruments import instrument
    from assumptions.spirals import slopes, spirals, turn_chats
    from shared.errors import UserError
    from shared.runs import start_run
    from shared.serialize import plain

    asked = instrument(arguments.instrument)
    settings = ElicitationSettings(arguments.max_tokens, guided=not arguments.free, seed=arguments.seed)
    check(asked, settings)
    check_engine(arguments)
    if not asked.dimensions:
        raise UserError(f"{asked.id} has no scores to follow; take one that does, say nine_scores")
    chats = turn_chats(read_transcripts(arguments.data, arguments.limit))
    question = {"command": "transcripts", "model": arguments.model, "engine": named(arguments)}
    question |= {"instrument": asked.id, "settings": plain(settings), "data": arguments.data}
    with start_run(arguments.out, question, arguments.seed) as run:
        model, name, on_demand = open_engine(arguments)
        if model is not None:
            run.use_model(model)
        path = answers_path(run, "answers", header(asked, settings, name))
        with closing(on_demand) as engine:
            answers = elicit(engine, asked, chats, path, settings, model=name)
        found = spirals(answers, chats, asked.dimensions)
        write_turns(run.path("turns.csv"), found)
        by_score = slopes(found, arguments.seed)
        health = answers.health()
        run.metrics({"health": health, "slopes": plain(by_score), "conversations": len(found)})
        add_transcripts(run.report, found, asked.id, health, arguments.seed)
    print(arguments.out / "report.html")


def read_transcripts(data: str, limit: int | None) -> list["Item"]:
    """Transcripts of a file, or of a public set written NAME[/PART]:SOURCE."""
    from assumptions.chats import read_history
    from assumptions.corpora import load_corpus
    from assumptions.corpora.item import Item
    from assumptions.sources import public_set
    from shared.data import DataError, read_rows

    if (known := public_set(data)) is not None:
        return load_corpus(known.name, known.source, part=known.part, limit=limit).items
    rows = read_rows(Path(data), TranscriptRow, drop_extra=True)[:limit]
    if not rows:
        raise DataError(f"{data} holds no rows")
    return [
        Item(row.id or str(number), read_history(row.messages), row.group or "", Path(data).stem)
        for number, row in enumerate(rows, start=1)
    ]


def write_turns(path: Path, found: Sequence["Spiral"]) -> None:
    """One row a turn of every conversation; an empty cell where there is no score."""
    from shared.data import write_csv

    rows = [
        {"conversation": one.conversation, "turn": turn + 1}
        | {name: scores[turn] for name, scores in one.scores.items()}
        for one in found
        for turn in range(len(next(iter(one.scores.values()))))
    ]
    write_csv(path, rows)


def add_transcripts(
    report: "Report", found: Sequence["Spiral"], asked: str, health: dict[str, int], seed: int
) -> None:
    """The page: mean scores over turns, slopes with intervals, and the change of every conversation."""
    from assumptions.charts import turns_chart
    from assumptions.goals import mean_by_turn
    from assumptions.spirals import BALANCE, first_to_last, slopes

    report.text(
        f"# Transcripts turn by turn\n\n{len(found)} conversations, every user message put to `{asked}` with what came "
        f"before it. Slopes are least-squares on the turn; intervals are over conversations. {BALANCE} is the mean of "
        "the scores that raise sycophancy less that of those that lower it."
    )
    report.table([health], "Answers by status")
    names = list(found[0].scores)
    lines = {name: mean_by_turn([one.scores[name] for one in found]) for name in names}
    report.figure(turns_chart({"all conversations": lines}, {}), "Mean score by turn of those that reach it.")
    report.table(
        [
            {"score": name, "slope a turn": one.estimate, "from": one.low, "to": one.high}
            for name, one in slopes(found, seed).items()
        ],
        "Drift",
    )
    followed = BALANCE if BALANCE in names else names[0]
    changes = first_to_last(found, followed)
    report.table(
        [
            {"conversation": one.conversation, "turns": len(one.scores[followed])}
            | {"slope": one.slopes[followed], "last less first": changes[one.conversation]}
            for one in found
        ],
        f"{followed}, by conversation",
    )
