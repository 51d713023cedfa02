"""`assumptions elicit`: ask a model what it assumes about the writers of a file of messages.

    assumptions elicit --model path/to/model --data mine.csv --column text=prompt --out runs/mine
    assumptions elicit --server http://127.0.0.1:8000/v1 --model NAME --data chats.jsonl --instrument openended --free
    ... --expected            scores also as expected values over token probabilities
    ... --retest 3 --orders 3 reliability, with intraclass correlations

Where all nine scores are asked of a model in this process, `assumptions probe` can go on with the folder.

The folder gets answers.jsonl (resumed when the command is repeated), scores.csv (one row a chat), and where asked for
expected.csv and reliability.json. Standard output: how many answers could be read, as JSON.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from assumptions.asking import OnDemand
from assumptions.chats import Chat, read_chats
from assumptions.commands.study import Study, begin
from assumptions.dimensions import NAMES
from assumptions.elicitation import Elicitation, ElicitationSettings, check, elicit
from assumptions.instruments import Instrument, instrument
from assumptions.reliability import Measurement, orders, reliability, retests
from assumptions.settings import AssumptionProbingConfig, JudgeSettings
from assumptions.token_scores import TokenScores, expected_scores
from shared.commands import output_folder
from shared.errors import UserError
from shared.generation import Generator, HFGenerator, OpenAIGenerator, VLLMGenerator
from shared.models import Model, ModelConfig, load
from shared.serialize import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `assumptions elicit`."""
    parser.add_argument(
        "--model", required=True, help="a folder, a Hugging Face id, tinyworld, or a server's model"
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="messages: .csv, .jsonl, .json or a saved dataset"
    )
    parser.add_argument("--out", type=output_folder, required=True, help="folder of the results")
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME=COLUMN", help="text=prompt, id=key ..."
    )
    parser.add_argument("--instrument", default="nine_scores")
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm")
    parser.add_argument(
        "--server", help="address of an OpenAI-compatible server, ending in /v1, in place of --engine"
    )
    parser.add_argument("--requests-per-minute", type=float, help="rate limit of the server")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--free", action="store_true", help="no grammar: the answer is read leniently")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shuffle-order", action="store_true", help="another order of the dimensions for every answer"
    )
    parser.add_argument("--expected", action="store_true", help="scores also over token probabilities")
    parser.add_argument("--retest", type=int, default=0, metavar="N", help="reliability over N seeds")
    parser.add_argument(
        "--orders", type=int, default=0, metavar="N", help="reliability over N orders of dimensions"
    )


def main(arguments: argparse.Namespace) -> int:
    """Elicit, and write what was asked for."""
    asked, settings = instrument(arguments.instrument), _settings(arguments)
    check(asked, settings)
    if arguments.engine == "hf" and not (arguments.free or arguments.server):
        raise UserError("--engine hf has no grammar: add --free, or take vllm")
    if arguments.expected and arguments.server:
        raise UserError("--expected needs the model's tokens: take --engine vllm or hf")
    if (arguments.expected or arguments.retest or arguments.orders) and not asked.dimensions:
        raise UserError(
            f"{asked.id} has no scores: --expected, --retest and --orders are for instruments that do"
        )
    chats = read_chats(arguments.data, _columns(arguments.column))
    facets = _facets(arguments, asked, chats, settings)
    model = None if arguments.server else load(ModelConfig(arguments.model, dtype=arguments.dtype))
    name = arguments.model if model is None else model.fingerprint
    arguments.out.mkdir(parents=True, exist_ok=True)
    with closing(OnDemand(lambda: _engine(arguments, model))) as engine:
        answers = elicit(engine, asked, chats, arguments.out / "answers.jsonl", settings, model=name)
        if asked.dimensions:
            _write_scores(arguments.out / "scores.csv", asked, chats, answers)
        if arguments.expected and model is not None:
            path = arguments.out / "expected.jsonl"
            expected = expected_scores(engine, model.tokenizer, asked, chats, answers, path, model=name)
            _write_scores(arguments.out / "expected.csv", asked, chats, expected)
        found = [
            reliability(engine, asked, facet, conditions, arguments.out / "reliability", model=name)
            for facet, conditions in facets.items()
        ]
    if found:
        write_json(arguments.out / "reliability.json", [row for facet in found for row in facet.rows()])
    print(json.dumps(answers.health() | {"valid_share": answers.valid_share()}))
    if model is not None and asked.dimensions == NAMES:
        begin(arguments.out, _study(arguments, model, settings, len(chats)), model.fingerprint)
        print(f"next: assumptions probe {arguments.out}", file=sys.stderr)
    return 0


def _study(
    arguments: argparse.Namespace, model: Model, settings: ElicitationSettings, messages: int
) -> Study:
    """What the later commands go on with; until `assumptions steer` names a judge, the model judges itself."""
    config = AssumptionProbingConfig(
        data=str(arguments.data),
        columns=_columns(arguments.column) or {},
        messages=messages,
        instrument=arguments.instrument,
        engine=arguments.engine,
        elicitation=settings,
        judge=JudgeSettings("local", model=arguments.model),
    )
    return Study(model.config, config, arguments.seed)


def _settings(arguments: argparse.Namespace) -> ElicitationSettings:
    return ElicitationSettings(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        samples=arguments.samples,
        guided=not arguments.free,
        shuffle_order=arguments.shuffle_order,
        keep_tokens=arguments.expected,
        seed=arguments.seed,
    )


def _columns(given: Sequence[str]) -> dict[str, str] | None:
    pairs = [one.partition("=") for one in given]
    wrong = next((one for one, (_, equals, column) in zip(given, pairs) if not (equals and column)), None)
    if wrong is not None:
        raise UserError(f"--column {wrong}: write NAME=COLUMN, for example text=prompt")
    return {name: column for name, _, column in pairs} or None


def _engine(arguments: argparse.Namespace, model: Model | None) -> Generator:
    if model is None:
        pace = arguments.requests_per_minute
        return OpenAIGenerator(arguments.server, arguments.model, requests_per_minute=pace)
    return HFGenerator(model) if arguments.engine == "hf" else VLLMGenerator(model.config)


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


def _write_scores(
    path: Path, asked: Instrument, chats: Sequence[Chat], scored: Elicitation | TokenScores
) -> None:
    """One row a chat; an empty cell where there is no score."""
    table = scored.scores([chat.id for chat in chats], asked.dimensions)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *asked.dimensions])
        for chat, row in zip(chats, table, strict=True):
            writer.writerow([chat.id, *("" if np.isnan(score) else repr(float(score)) for score in row)])
