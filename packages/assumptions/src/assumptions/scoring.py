"""Scores three ways, by one setting (paper section on elicitation; the digits' probabilities are ours).

    stated     the number that the model writes, once
    mean       the mean of the numbers that it writes in `samples` draws
    expected   the mean of the numbers that it could have written, by its token probabilities (`token_scores`)

The third is a second pass over the answers of the first, so it needs their token ids and an engine that tells the
likeliest tokens. Whether the engine does is asked with one token, before the first answer.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from assumptions.chats import Chat
from assumptions.elicitation import Elicitation, ElicitationSettings, elicit
from assumptions.instruments import Instrument
from assumptions.token_scores import TokenScores, check_engine, expected_scores
from shared.errors import UserError
from shared.generation import Generator

Score = Literal["stated", "mean", "expected"]
Scored: TypeAlias = Elicitation | TokenScores


class Scoring(NamedTuple):
    """The answers to an instrument, and the scores that are taken from them."""

    answers: Elicitation
    scored: Scored


def check_score(score: Score, settings: ElicitationSettings) -> None:
    """UserError where the number of samples does not fit the kind of score."""
    if score == "stated" and settings.samples > 1:
        raise UserError(f"score stated is one answer's number: samples={settings.samples} go with score mean")
    if score == "mean" and settings.samples == 1:
        raise UserError("score mean is over several answers: set samples above 1, and a temperature")


def asked_with(score: Score, settings: ElicitationSettings) -> ElicitationSettings:
    """The settings under which answers to be scored in this way are asked for."""
    return replace(settings, keep_tokens=True) if score == "expected" else settings


def expected_path(answers: Path) -> Path:
    """The file of the expected values of the answers in a file."""
    return answers.with_name(f"{answers.stem}.expected.jsonl")


def score_chats(
    generator: Generator,
    tokenizer: Any,
    instrument: Instrument,
    chats: Sequence[Chat],
    path: Path,
    settings: ElicitationSettings,
    score: Score,
    *,
    model: str,
) -> Scoring:
    """Ask for the assumptions behind every chat and score the answers, resuming the file at `path`.

    UserError, before anything is asked, where the score does not fit the settings, or an expected value cannot be had
    from the engine or the tokenizer (used for it alone).
    """
    check_score(score, settings)
    settings = asked_with(score, settings)
    if score == "expected" and not path.exists():
        expected_path(path).unlink(missing_ok=True)
        check_engine(generator, tokenizer, instrument, chats[0])
    answers = elicit(generator, instrument, chats, path, settings, model=model)
    if score != "expected":
        return Scoring(answers, answers)
    expected = expected_path(path)
    return Scoring(
        answers, expected_scores(generator, tokenizer, instrument, chats, answers, expected, model=model)
    )
