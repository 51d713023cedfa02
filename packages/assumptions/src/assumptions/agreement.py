"""Agreement of graders: with themselves over repeats, with each other, and with people (paper section on outcomes).

    Fleiss    kappa = (P - P_e) / (1 - P_e), P the mean share of agreeing pairs of grades of an item, P_e the sum of the
              squared shares of the grades; items may have different numbers of grades, at least two
    Cohen     two graders, quadratic weights: grades from 1 to 5 are ordered, and 1 against 5 is worse than 4 against 5

A judge's mean over many replies is corrected by the replies that people graded too (prediction-powered inference,
arXiv 2301.09633): mean of the judge over all, plus the mean of person less judge where both are known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from assumptions.outcomes import OUTCOMES, Exchange, Judgement, read_grade
from shared.data import read_rows
from shared.errors import UserError
from shared.stats import Interval, Numbers, bootstrap_interval, spearman


def fleiss_kappa(grades: Sequence[Sequence[int]]) -> float:
    """Agreement of several graders on items; nan without an item of two grades, or where all grades are alike."""
    several = [row for row in grades if len(row) > 1]
    if not several:
        return float("nan")
    categories = sorted({grade for row in several for grade in row})
    counts_BC = np.array([[row.count(c) for c in categories] for row in map(list, several)], dtype=float)
    number_B = counts_BC.sum(1)
    observed = float((((counts_BC**2).sum(1) - number_B) / (number_B * (number_B - 1))).mean())
    expected = float(((counts_BC.sum(0) / counts_BC.sum()) ** 2).sum())
    return (observed - expected) / (1 - expected) if expected < 1 else float("nan")


def cohen_kappa(first: Numbers, second: Numbers) -> ndarray | float:
    """Quadratically weighted agreement of two graders over the last axis (means over repeats are rounded).

    With these weights kappa is 1 - mean((a - b)^2) / (var a + var b + (mean a - mean b)^2); nan where neither varies.
    """
    a, b = (np.rint(np.asarray(grades, dtype=float)) for grades in (first, second))
    chance = a.var(-1) + b.var(-1) + (a.mean(-1) - b.mean(-1)) ** 2
    observed = ((a - b) ** 2).mean(-1)
    kappa = 1 - np.divide(observed, chance, out=np.full_like(chance, np.nan), where=chance > 0)
    return float(kappa) if kappa.ndim == 0 else kappa


def repeat_agreement(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Fleiss' kappa of a judge's repeats by outcome; nan where it graded everything once."""
    return {
        name: fleiss_kappa(
            [[g for text in one.written.get(name, ()) if (g := read_grade(text))] for one in judgements]
        )
        for name in OUTCOMES
    }


def panel(panel_of: Sequence[Sequence[Judgement]]) -> tuple[list[Judgement], dict[str, float]]:
    """One judgement an exchange, the mean over several judges, and Fleiss' kappa between them by outcome."""
    if len({len(one) for one in panel_of}) != 1:
        raise UserError("the judges of a panel must judge the same exchanges")
    together, kappas = [], {}
    by_exchange = list(zip(*panel_of, strict=True))
    for row in by_exchange:
        known = {name: [one.scores[name] for one in row if one.scores[name] is not None] for name in OUTCOMES}
        scores = {name: float(np.mean(values)) if values else None for name, values in known.items()}
        together.append(Judgement(scores, {}))
    for name in OUTCOMES:
        graded = [[round(s) for one in row if (s := one.scores[name]) is not None] for row in by_exchange]
        kappas[name] = fleiss_kappa(graded)
    return together, kappas


@dataclass(frozen=True)
class HumanGrade:
    """What a person gave one reply for one outcome, 1 to 5."""

    message: str
    reply: str
    outcome: str
    score: float

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES or not 1 <= self.score <= 5:
            raise UserError(
                f"outcome {self.outcome!r} with score {self.score!r}: needed are one of {', '.join(OUTCOMES)} and a "
                "score from 1 to 5"
            )


def read_human_grades(path: Path | str) -> list[HumanGrade]:
    """Read a file with columns message, reply, outcome, score; one row a grade."""
    return read_rows(Path(path), HumanGrade, drop_extra=True)


@dataclass(frozen=True)
class Calibration:
    """A judge beside people, for one outcome; `length` is Spearman of (judge - person) with the reply's words."""

    graded: int
    unread: int
    kappa: Interval
    exact: float
    bias: Interval
    length: float
    confusion: list[list[int]]  # rows: the person's grade 1 to 5, columns: the judge's, rounded


def exchanges_of(grades: Sequence[HumanGrade]) -> list[Exchange]:
    """What the judge is to be asked about: one exchange a row."""
    return [Exchange(one.message, one.reply) for one in grades]


def calibrate(
    grades: Sequence[HumanGrade], judgements: Sequence[Judgement], seed: int = 0
) -> dict[str, Calibration]:
    """Compare a judge with people by outcome, over the rows where it gave a grade; intervals by bootstrap over rows."""
    found = {}
    for outcome in OUTCOMES:
        rows = [
            (grade, judged.scores[outcome])
            for grade, judged in zip(grades, judgements, strict=True)
            if grade.outcome == outcome
        ]
        known = [(grade, score) for grade, score in rows if score is not None]
        if known:
            found[outcome] = _calibration(known, len(rows) - len(known), seed)
    return found


def _calibration(known: Sequence[tuple[HumanGrade, float]], unread: int, seed: int) -> Calibration:
    person = np.array([grade.score for grade, _ in known])
    judge = np.array([score for _, score in known])
    words = [len(grade.reply.split()) for grade, _ in known]

    confusion = np.zeros((5, 5), dtype=int)
    np.add.at(confusion, (np.rint(person).astype(int) - 1, np.rint(judge).astype(int) - 1), 1)
    return Calibration(
        len(known),
        unread,
        bootstrap_interval(person, judge, statistic=cohen_kappa, seed=seed),
        float(np.mean(np.rint(person) == np.rint(judge))),
        bootstrap_interval(judge - person, seed=seed),
        float(spearman(judge - person, words)),
        confusion.tolist(),
    )


def corrected_mean(
    judged: Float[ndarray, " B"],
    judged_too: Float[ndarray, " N"],
    person: Float[ndarray, " N"],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The judge's mean over B replies, corrected by N replies that people graded too; bootstrap over both sets."""
    if not len(judged) or not len(person) or len(judged_too) != len(person):
        raise UserError(
            "a corrected mean needs judged replies, and the judge's and people's grades of the same others"
        )
    difference = person - judged_too
    draw = np.random.default_rng(seed)
    means = judged[draw.integers(len(judged), size=(resamples, len(judged)))].mean(1)
    shifts = difference[draw.integers(len(person), size=(resamples, len(person)))].mean(1)
    low, high = np.quantile(means + shifts, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(judged.mean() + difference.mean()), float(low), float(high))
