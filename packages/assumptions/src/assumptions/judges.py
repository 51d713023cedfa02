"""The judge of a study: the exact one of the embedded world, or a model in this process or on a server.

A model's grades lie in a file of the run (`assumptions.grades`), and its engine starts only when a grade is missing.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, TypeAlias

from assumptions.agreement import calibrate, exchanges_of, read_human_grades, repeat_agreement
from assumptions.answer_file import answers_path
from assumptions.asking import OnDemand
from assumptions.grades import grade
from assumptions.grades import header as judge_header
from assumptions.outcomes import Exchange, Judgement, LexicalJudge, ModelJudge
from assumptions.settings import JudgeSettings
from shared.errors import UserError
from shared.generation import Generator, HFGenerator, OpenAIGenerator
from shared.models import Model
from shared.runs import Run

Judging: TypeAlias = Callable[[Sequence[Exchange]], list[Judgement]]


def judging(settings: JudgeSettings, run: Run, model: Model) -> Judging:
    """The judge that the settings name; a model's grades are kept, and asked for again only where none was read.

    `model` is the one that is studied: it judges itself without a second copy in memory.
    """
    if settings.kind == "lexical":
        return LexicalJudge().judge

    def judge_on(engine: Generator) -> ModelJudge:
        name = f"{settings.model} at {settings.url}" if settings.kind == "server" else settings.model
        return ModelJudge(engine, name, settings.repeats, settings.temperature, run.seed)

    def judge(exchanges: Sequence[Exchange]) -> list[Judgement]:
        with closing(OnDemand(lambda: start_judge(settings, model))) as engine:
            return grade(judge_on(engine), exchanges, path)

    # Once for the study: without resuming, this removes a former run's grades.
    path = answers_path(
        run, "judgements", judge_header(judge_on(OnDemand(lambda: start_judge(settings, model))))
    )
    return judge


def judge_agreement(
    settings: JudgeSettings, judge: Judging, judgements: Sequence[Judgement], seed: int
) -> dict[str, Any]:
    """By outcome: Fleiss' kappa of the judge's repeats, and its calibration where people's grades are given."""
    found: dict[str, Any] = {"repeats": repeat_agreement(judgements)} if settings.repeats > 1 else {}
    if settings.human:
        grades = read_human_grades(settings.human)
        found |= {"people": calibrate(grades, judge(exchanges_of(grades)), seed)}
    return found


def check_judge(settings: JudgeSettings, model: Model) -> None:
    """UserError when the exact judge is to read replies that are not the embedded world's, or human grades are none."""
    from shared.tinyworld import MODEL_DIR

    if settings.human:
        read_human_grades(settings.human)
    if settings.kind != "lexical":
        return
    own = MODEL_DIR / "tokenizer.json"
    tokenizer = model.path / "tokenizer.json" if model.path is not None else None
    if tokenizer is None or not tokenizer.exists() or tokenizer.read_bytes() != own.read_bytes():
        raise UserError(
            "the lexical judge reads replies of the embedded world's models only: set judge.kind=server or local"
        )


def start_judge(settings: JudgeSettings, model: Model) -> Generator:
    """The engine that judges."""
    if settings.kind == "local":
        return HFGenerator(model if settings.model == model.config.name else settings.model)
    return OpenAIGenerator(settings.url, settings.model)
