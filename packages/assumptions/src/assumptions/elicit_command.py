"""`assumptions elicit`: ask a model what it assumes about the writers of a file of messages.

    assumptions elicit --model path/to/model --data mine.csv --column text=prompt --out runs/mine
    assumptions elicit --server http://127.0.0.1:8000/v1 --model NAME --data chats.jsonl --instrument openended --free
    ... --score expected      scores as expected values over token probabilities (of a server: with --tokenizer)
    ... --retest 3 --orders 3 reliability, with intraclass correlations

Where all nine scores are asked of a model in this process, `assumptions probe` can go on with the folder.

The folder gets elicit.json (what was asked), answers.jsonl (resumed when the command is repeated), scores.csv (one row
a chat), and where asked for reliability.json. Standard output: how many answers could be read, as JSON. Repeated with
other settings into the same folder the command refuses: a folder holds one elicitation.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from assumptions.answer_file import once
from assumptions.chats import Chat, read_chats
from assumptions.commands.engine import add_engine, check_engine, named, open_engine
from assumptions.commands.study import Study, begin
from assumptions.dimensions import NAMES
from assumptions.elicitation import ElicitationSettings, check
from assumptions.instruments import INSTRUMENTS, Instrument, instrument
from assumptions.reliability import Measurement, orders, reliability, retests
from assumptions.scoring import Score, Scored, check_score, score_chats
from assumptions.settings import AssumptionProbingConfig, JudgeSettings, SteeringSettings
from assumptions.splits import row_hash
from shared.commands import output_folder
from shared.data import write_csv
from shared.errors import UserError
from shared.loading import load_tokenizer
from shared.models import Model, ModelConfig
from shared.runs import config_hash
from shared.serialize import write_json
from shared.tinyworld import EMBEDDED

# Replies of a study, as the paper samples them: the pipeline's own settings are the embedded world's short ones.
REPLIES = SteeringSettings(max_tokens=400, temperature=0.7, top_p=0.9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `assumptions elicit`."""
    add_engine(parser)
    parser.add_argument(
        "--data", type=Path, required=True, help="messages: .csv, .jsonl, .json or a saved dataset"
    )
    parser.add_argument("--out", type=output_folder, required=True, help="folder of the results")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="a column that is called otherwise: text=prompt, id=key, group=user, history=before",
    )
    parser.add_argument(
        "--instrument",
        default="nine_scores",
        help=f"what is asked (default: %(default)s): {', '.join(INSTRUMENTS)}",
    )
    parser.add_argument("--samples", type=int, default=1, help="answers a message (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=128, help="answers between two writes to the disk")
    parser.add_argument(
        "--shuffle-order", action="store_true", help="another order of the dimensions for every answer"
    )
    parser.add_argument(
        "--score",
        choices=get_args(Score),
        help="the number stated, the mean over --samples, or the expected value over token probabilities; default: "
        "the mean where there are samples, else as stated",
    )
    parser.add_argument("--tokenizer", help="name or folder of the server's model's, for --score expected")
    parser.add_argument("--retest", type=int, default=0, metavar="N", help="reliability over N seeds")
    parser.add_argument(
        "--orders", type=int, default=0, metavar="N", help="reliability over N orders of dimensions"
    )


def main(arguments: argparse.Namespace) -> int:
    """Elicit, and write what was asked for."""
    asked, settings = instrument(arguments.instrument), _settings(arguments)
    check(asked, settings)
    check_engine(arguments)
    score: Score = arguments.score or ("mean" if settings.samples > 1 else "stated")
    check_score(score, settings)
    if (arguments.score or arguments.retest or arguments.orders) and not asked.dimensions:
        raise UserError(
            f"{asked.id} has no scores: --score, --retest and --orders are for instruments that do"
        )
    if score == "expected" and arguments.server and not arguments.tokenizer:
        raise UserError(
            "--score expected counts tokens: name the tokenizer of the server's model, --tokenizer"
        )
    chats = read_chats(arguments.data, _columns(arguments.column))
    facets = _facets(arguments, asked, chats, settings)
    path = arguments.out / "answers.jsonl"
    once(arguments.out / "elicit.json", _question(arguments, settings, score), path)
    model, name, on_demand = open_engine(arguments)
    tokenizer = _tokenizer(arguments, model)
    with closing(on_demand) as engine:
        answers, scored = score_chats(engine, tokenizer, asked, chats, path, settings, score, model=name)
        if asked.dimensions:
            _write_scores(arguments.out / "scores.csv", asked, chats, scored)
        found = [
            reliability(engine, asked, facet, conditions, arguments.out / "reliability", model=name)
            for facet, conditions in facets.items()
        ]
    if found:
        write_json(arguments.out / "reliability.json", [row for facet in found for row in facet.rows()])
    print(json.dumps(answers.health() | {"valid_share": answers.valid_share()}))
    if model is not None and asked.dimensions == NAMES:
        begin(arguments.out, _study(arguments, model, settings, score, chats), model.fingerprint)
        print(f"next: assumptions probe {arguments.out}", file=sys.stderr)
    return 0


def _question(arguments: argparse.Namespace, settings: ElicitationSettings, score: Score) -> dict[str, Any]:
    """What the folder holds answers to: all that they and the scores follow from, but the rows of the file."""
    return {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "engine": named(arguments),
        "data": str(arguments.data),
        "columns": _columns(arguments.column),
        "tokenizer": arguments.tokenizer,  # expected scores are asked for in its tokens
        "instrument": arguments.instrument,
        # how many answers are asked for at a time changes none of them
        "settings": replace(settings, batch_size=ElicitationSettings.batch_size),
        "score": score,
    }


def _tokenizer(arguments: argparse.Namespace, model: Model | None) -> Any:
    """The model's, the one named for a server's model, or None."""
    if model is not None:
        return model.tokenizer
    return load_tokenizer(ModelConfig(arguments.tokenizer)) if arguments.tokenizer else None


def _study(
    arguments: argparse.Namespace,
    model: Model,
    settings: ElicitationSettings,
    score: Score,
    chats: Sequence[Chat],
) -> Study:
    """What the later commands go on with; until `assumptions steer` names a judge, the model judges itself."""
    config = AssumptionProbingConfig(
        data=str(arguments.data),
        columns=_columns(arguments.column) or {},
        messages=len(chats),
        instrument=arguments.instrument,
        engine=arguments.engine,
        replicas=arguments.replicas,
        score=score,
        elicitation=settings,
        steering=SteeringSettings() if arguments.model in EMBEDDED else REPLIES,
        judge=JudgeSettings("local", model=arguments.model),
    )
    rows = config_hash([(chat.id, row_hash(chat), chat.group, chat.source) for chat in chats])
    return Study(replace(model.config, device="auto"), config, arguments.seed, rows=rows)


def _settings(arguments: argparse.Namespace) -> ElicitationSettings:
    return ElicitationSettings(
        batch_size=arguments.batch_size,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        samples=arguments.samples,
        guided=not arguments.free,
        shuffle_order=arguments.shuffle_order,
        seed=arguments.seed,
    )


def _columns(given: Sequence[str]) -> dict[str, str] | None:
    pairs = [one.partition("=") for one in given]
    wrong = next((one for one, (_, equals, column) in zip(given, pairs) if not (equals and column)), None)
    if wrong is not None:
        raise UserError(f"--column {wrong}: write NAME=COLUMN, for example text=prompt")
    return {name: column for name, _, column in pairs} or None


def _facets(
    arguments: argparse.Namespace, asked: Instrument, chats: Sequence[Chat], settings: ElicitationSettings
) -> dict[str, list[Measurement]]:
    """The conditions to measure reliability over, by facet; UserError where it cannot be measured."""
    for option in ("retest", "orders"):
        if (times := getattr(arguments, option)) < 0 or times == 1:
            raise UserError(f"--{option} compares at least two, got {times}")
    if (arguments.retest or arguments.orders) and len(chats) < 2:
        raise UserError("--retest and --orders need at least two messages")
    facets = {}
    if arguments.retest:
        facets["retest"] = retests(chats, settings, arguments.retest)
    if arguments.orders:
        facets["order"] = orders(chats, asked, settings, arguments.orders)
    return facets


def _write_scores(path: Path, asked: Instrument, chats: Sequence[Chat], scored: Scored) -> None:
    """One row a chat; an empty cell where there is no score."""
    table = scored.scores([chat.id for chat in chats], asked.dimensions)
    names = asked.dimensions
    write_csv(
        path, [{"id": c.id} | dict(zip(names, row.tolist())) for c, row in zip(chats, table, strict=True)]
    )
