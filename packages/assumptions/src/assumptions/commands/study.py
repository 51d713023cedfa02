"""A study on disk: the folder that `assumptions elicit` begins and the later commands go on with.

A study is a run of the `assumption_probing` pipeline, taken one step at a time. `study.json` says what is studied and
how far it has come; each command changes the settings of its step and runs the pipeline up to it. What earlier steps
have left is kept: answers always, other files while the settings are the same.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assumptions.answer_file import answers_name
from assumptions.elicitation import header
from assumptions.instruments import instrument
from assumptions.pipeline import PIPELINE, Step
from assumptions.pipeline import run as run_pipeline
from assumptions.scoring import asked_with, expected_path
from assumptions.settings import AssumptionProbingConfig
from shared.config import ConfigError, to_dataclass
from shared.errors import UserError
from shared.models import ModelConfig
from shared.runs import start_run
from shared.serialize import read_json, write_json

NAME = "study.json"


@dataclass(frozen=True)
class Study:
    """What is studied, and the last step that was taken; `rows`: hash of the messages, in their order."""

    model: ModelConfig
    settings: AssumptionProbingConfig
    seed: int = 0
    last: Step = "elicit"
    rows: str = ""


def load_study(folder: Path) -> Study:
    """The study of a folder; UserError when there is none."""
    path = folder / NAME
    if not path.exists():
        raise UserError(
            f"{folder} holds no study: begin with `assumptions elicit ... --out {folder}`, by an instrument that asks "
            "for all nine scores"
        )
    try:
        return to_dataclass(Study, read_json(path))
    except ConfigError as error:
        raise UserError(f"{path} is no study of this version: {error}; begin another folder") from None


def begin(folder: Path, study: Study, fingerprint: str) -> None:
    """Make a study of a folder in which `answers.jsonl` answers its question; the pipeline finds them there.

    A study that is there already keeps the settings and the results of its later steps, unless its file of messages has
    other rows by now: then those steps are to be taken again.
    """
    config, path = study.settings, folder / NAME
    question = header(
        instrument(config.instrument), asked_with(config.score, config.elicitation), fingerprint
    )
    named = folder / answers_name("elicitation", question)
    shutil.copyfile(folder / "answers.jsonl", named)
    if config.score == "expected":
        shutil.copyfile(expected_path(folder / "answers.jsonl"), expected_path(named))
    if path.exists():
        former = load_study(folder)
        if former.rows == study.rows:
            return
        study = replace(study, settings=replace(former.settings, messages=config.messages))
    write_json(path, study)


def advance(folder: Path, study: Study, last: Step) -> dict[str, Any]:
    """Run the study up to a step, in its folder; returns the figures, which metrics.json holds too.

    Settings and step are noted once the step is done: one that failed leaves the study where it was.
    """
    record = {"pipeline": PIPELINE.name, "settings": study.settings, "model": study.model}
    with start_run(folder, record, study.seed) as run:
        figures = run_pipeline(study.settings, study.model, run, last)
        run.metrics(figures)
    write_json(folder / NAME, replace(study, last=last))
    return figures


def table(rows: dict[str, dict[str, float | None]]) -> str:
    """Rows of figures by name, as aligned text."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    width = max(len(name) for name in rows)
    show: Callable[[float | None], str] = lambda value: "-" if value is None else f"{value:.3f}"  # noqa: E731
    lines = [" " * width + "".join(f"{column:>16}" for column in columns)]
    lines += [
        f"{name:<{width}}" + "".join(f"{show(row.get(column)):>16}" for column in columns)
        for name, row in rows.items()
    ]
    return "\n".join(lines)
