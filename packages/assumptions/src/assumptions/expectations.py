"""The expectation gap: what people expect of an answer from an assistant and from a person (section on expectations).

1. Items: query x addressee (an AI assistant, another person) x dimension, in the words of the instruments: "how likely
   is it that the person who wrote this wants ...", 0 to 100. The addressee is the only thing that differs.
2. A counterbalanced export: every participant sees every query once, half of them with each addressee; the halves
   change places from participant to participant, and so does the order, so that over an even number of participants
   every (query, addressee) is answered equally often. No participant meets a query under both addressees.
3. The import reads ratings, and refuses ones that were not asked.
4. The analysis (`assumptions.mixed`): rating ~ addressee with random intercepts of participant and query, one dimension
   at a time. Gap = the model's elicited score less people's mean rating for an assistant, by dimension.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from assumptions.dimensions import NAMES, dimension
from assumptions.mixed import MixedFit, fit_mixed
from shared.data import DataError, raw_rows, read_rows, write_csv, write_rows
from shared.errors import UserError
from shared.stats import Interval, bootstrap_interval

Addressee = Literal["ai", "human"]
ADDRESSEES: tuple[Addressee, ...] = ("ai", "human")
_TO = {"ai": "an AI assistant", "human": "another person whom they trust"}


@dataclass(frozen=True)
class Query:
    """A message whose expectations are asked about."""

    id: str
    text: str


@dataclass(frozen=True)
class Asked:
    """One question of the survey, in the order in which a participant sees it."""

    participant: str
    position: int
    query: str
    addressee: str
    dimension: str
    text: str


@dataclass(frozen=True)
class RatingRow:
    """A row of a file of ratings: 0 to 100, or nothing where the participant passed the question over."""

    participant: str
    query: str
    addressee: str
    dimension: str
    rating: float | None

    def __post_init__(self) -> None:
        dimension(self.dimension)
        if self.addressee not in ADDRESSEES or not (self.rating is None or 0 <= self.rating <= 100):
            raise UserError(
                f"addressee {self.addressee!r} with rating {self.rating!r}: needed are one of {', '.join(ADDRESSEES)} "
                "and a number from 0 to 100, or no rating"
            )


@dataclass(frozen=True)
class Rating(RatingRow):
    """One answer, 0 to 100."""

    rating: float


def question(query: Query, addressee: Addressee, name: str) -> str:
    """The text of one question."""
    meaning = dimension(name).meaning.replace("the person", "the person who wrote this", 1)
    return (
        f'Somebody writes to {_TO[addressee]}: "{query.text}" How likely is it, from 0 to 100, that the following '
        f"holds: {meaning}?"
    )


def survey(
    queries: Sequence[Query], participants: int, dimensions: Sequence[str] = NAMES, seed: int = 0
) -> list[Asked]:
    """The counterbalanced questions of all participants; UserError for an odd number, equal ids or too few queries."""
    if participants < 2 or participants % 2:
        raise UserError(
            f"counterbalancing needs an even number of participants, at least 2; got {participants}"
        )
    if len(queries) < 2 or len({query.id for query in queries}) < len(queries):
        raise UserError("a survey needs at least two queries, with ids of their own")
    draw = np.random.default_rng(seed)
    asked: list[Asked] = []
    for pair in range(participants // 2):
        half = draw.permutation(len(queries)) < len(queries) / 2
        for member in (0, 1):
            name = f"p{2 * pair + member:04}"
            order = draw.permutation(len(queries))
            for place, i in enumerate(order):
                addressee = ADDRESSEES[int(half[i]) ^ member]
                for name_of in draw.permutation(list(dimensions)).tolist():
                    text = question(queries[i], addressee, name_of)
                    asked.append(Asked(name, place, queries[i].id, addressee, name_of, text))
    return asked


def export_survey(path: Path | str, asked: Sequence[Asked]) -> None:
    """Write the questions, a row each (.csv, else JSON lines); the ratings come back with a further column `rating`."""
    if Path(path).suffix == ".csv":
        write_csv(path, [asdict(one) for one in asked])
    else:
        write_rows(path, asked)


def import_ratings(path: Path | str, asked: Sequence[Asked]) -> list[Rating]:
    """Read ratings (participant, query, addressee, dimension, rating); questions passed over (no rating) are left out.

    UserError for a row that was not asked, or stands twice, and where nothing was answered.
    """
    wanted = {(one.participant, one.query, one.addressee, one.dimension) for one in asked}
    seen: set[tuple[str, str, str, str]] = set()
    ratings = []
    for row, one in enumerate(read_rows(Path(path), RatingRow, drop_extra=True), start=1):
        key = (one.participant, one.query, one.addressee, one.dimension)
        if key not in wanted:
            raise UserError(f"{path}, row {row}: {', '.join(key)} was not asked in this survey")
        if key in seen:
            raise UserError(f"{path}, row {row}: {', '.join(key)} is answered twice")
        seen.add(key)
        if one.rating is not None:
            ratings.append(Rating(*key, one.rating))
    if not ratings:
        raise UserError(f"{path} holds no rating: none of its questions is answered")
    return ratings


@dataclass(frozen=True)
class _Ids:
    """The column that a table of scores needs."""

    id: str


def read_scores(path: Path | str) -> dict[str, dict[str, float]]:
    """A model's scores by query and dimension from a table with one row a query (`assumptions elicit`)."""
    found: dict[str, dict[str, float]] = {}
    for where, row in raw_rows(Path(path), _Ids):
        cells = {name: row[name] for name in NAMES if row.get(name) not in (None, "")}
        try:
            found[str(row["id"])] = {name: float(cell) for name, cell in cells.items()}
        except (KeyError, ValueError) as error:
            raise DataError(f"{where}: needed are a column id and scores as numbers ({error})") from None
    return found


@dataclass(frozen=True)
class Gap:
    """One dimension: effect of the addressee (ai less human, 0 to 1), and model less people for an AI."""

    dimension: str
    addressee: MixedFit
    model_less_people: Interval | None


def gaps(
    ratings: Sequence[Rating], model_scores: dict[str, dict[str, float]] | None = None, seed: int = 0
) -> list[Gap]:
    """The analysis by dimension; `model_scores`: elicited, by query and dimension; bootstrap over queries."""
    found = []
    for name in [one for one in NAMES if any(r.dimension == one for r in ratings)]:
        rows = [r for r in ratings if r.dimension == name]
        fit = fit_mixed(
            np.array([r.rating / 100 for r in rows]),
            np.array([float(r.addressee == "ai") for r in rows]),
            [[r.participant for r in rows], [r.query for r in rows]],
        )
        found.append(Gap(name, fit, _model_gap(rows, name, model_scores or {}, seed)))
    return found


def _model_gap(
    rows: Sequence[Rating], name: str, scores: dict[str, dict[str, float]], seed: int
) -> Interval | None:
    people: dict[str, list[float]] = {}
    for r in rows:
        if r.addressee == "ai":
            people.setdefault(r.query, []).append(r.rating / 100)
    differences = [
        scores[query][name] - float(np.mean(given))
        for query, given in people.items()
        if name in scores.get(query, {})
    ]
    if len(differences) < 2:
        return Interval(differences[0], math.nan, math.nan) if differences else None
    return bootstrap_interval(differences, seed=seed)
