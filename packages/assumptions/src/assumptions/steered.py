"""The steering half of the study: where to steer, chosen on validation messages; then the test messages, dosed.

Both parts answer messages under directions and have the replies judged; replies lie in files known by the directions
and the messages they were made with, so an edited message or another direction is steered anew. Test messages are
answered by `dose_test` alone.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float

from assumptions.answer_file import answers_path
from assumptions.asking import OnDemand
from assumptions.chats import Chat
from assumptions.control import Trial, best, candidate_blocks, directions_by_block, trial, trial_family
from assumptions.doses import Condition, Curve, Reply, dose_response, steer
from assumptions.features import Features
from assumptions.grades import grade
from assumptions.grades import header as judge_header
from assumptions.outcomes import Exchange, Judgement, LexicalJudge, ModelJudge
from assumptions.probes import ProbeSet
from assumptions.settings import AssumptionProbingConfig, JudgeSettings
from assumptions.sources import moved_outcomes
from assumptions.splits import Split, row_hash
from assumptions.steering import Direction, pattern_direction, probe_direction, random_directions
from shared.data import read_rows, write_rows
from shared.generation import Generator, OpenAIGenerator, Sampling
from shared.interventions import save_interventions
from shared.models import Model
from shared.runs import Run, config_hash

Judging: TypeAlias = Callable[[Sequence[Exchange]], list[Judgement]]


@dataclass(frozen=True)
class Answered:
    """Replies under some directions, and the curve of each direction by its name."""

    replies: list[Reply]
    curves: dict[str, Curve]


@dataclass(frozen=True)
class Steering:
    """What answers and judges messages under directions: the study's settings, its model, judge and run."""

    config: AssumptionProbingConfig
    model: Model
    judge: Judging
    run: Run

    def answer(
        self, kind: str, chats: Sequence[Chat], directions: Sequence[Direction], doses: Sequence[float]
    ) -> Answered:
        """Curves of the directions over the chats; replies of a former run of just these are kept."""
        asked = {"directions": [d.digest for d in directions], "chats": [(c.id, row_hash(c)) for c in chats]}
        stage = self.run.stage(f"{kind}-{config_hash(asked)}.jsonl")
        if not stage.done:
            with stage as path:
                write_rows(path, self._steer(kind, chats, directions, doses))
        replies = read_rows(stage.path, Reply)
        turns = {chat.id: chat.turn for chat in chats}
        judgements = self.judge([Exchange(turns[reply.chat], reply.text) for reply in replies])
        outcomes = {one.name: moved_outcomes(self.config.data, one.dimension) for one in directions}
        curves = {one.name: dose_response(replies, judgements, one, outcomes[one.name]) for one in directions}
        return Answered(replies, curves)

    def _steer(
        self, kind: str, chats: Sequence[Chat], directions: Sequence[Direction], doses: Sequence[float]
    ) -> list[Reply]:
        settings = self.config.steering

        def progress(conditions: list[Condition]) -> Iterable[Condition]:
            return self.run.progress(conditions, f"steered replies: {kind}")

        sampling = Sampling(settings.max_tokens, settings.temperature, settings.top_p, logprobs=None)
        unit, seed = settings.unit, self.run.seed
        return steer(self.model, chats, directions, doses, sampling, unit=unit, seed=seed, progress=progress)


def choose_directions(
    study: Steering,
    probes: ProbeSet,
    features: Features,
    labels_BK: Float[torch.Tensor, "B K"],
    split: Split,
    chats: Sequence[Chat],
) -> tuple[dict[str, Direction], dict[str, list[Trial]]]:
    """The direction of every steered dimension at the block chosen for it, and what each block tried has shown."""
    settings = study.config.steering
    choice = settings.choice
    make = probe_direction if settings.kind == "probe" else pattern_direction
    if choice.by == "reading":
        return {name: make(probes.probes[name]) for name in settings.dimensions}, {}
    n_layers = study.model.architecture.n_layers
    candidates: dict[str, list[Direction]] = {}
    for name in settings.dimensions:
        blocks = candidate_blocks(choice.blocks, n_layers, probes.probes[name].block)
        candidates[name] = directions_by_block(
            features, labels_BK, probes, split, name, blocks, settings.kind
        )
    families = {
        name: [trial_family(direction, choice.random, study.run.seed) for direction in directions]
        for name, directions in candidates.items()
    }
    everything = [one for of_name in families.values() for family in of_name for one in family]
    asked = [chats[i] for i in split.validation][: choice.messages]
    curves = study.answer("choice", asked, everything, choice.doses).curves
    trials = {
        name: [trial(family[0], [curves[one.name] for one in family]) for family in of_name]
        for name, of_name in families.items()
    }
    chosen = {
        name: directions[trials[name].index(best(trials[name], choice.largest_loss))]
        for name, directions in candidates.items()
    }
    return chosen, trials


def dose_test(
    study: Steering, directions: dict[str, Direction], chats: Sequence[Chat]
) -> tuple[dict[str, list[Curve]], list[Reply]]:
    """Curves by dimension, the direction's own first and then its random controls; and all replies to the chats."""
    settings, run = study.config.steering, study.run
    families = {
        name: [direction, *random_directions(direction, settings.random, run.seed)]
        for name, direction in directions.items()
    }
    for name, direction in directions.items():
        edits = direction.interventions(1.0, settings.unit)
        save_interventions(run.path(f"directions/{name}"), edits, study.model)
    everything = [one for family in families.values() for one in family]
    answered = study.answer("replies", chats, everything, settings.doses)
    curves = {name: [answered.curves[one.name] for one in family] for name, family in families.items()}
    return curves, answered.replies


def judging(settings: JudgeSettings, run: Run) -> Judging:
    """The judge of a study: the exact one, or a model on a server, whose grades are kept in a file of the run."""
    if settings.kind == "lexical":
        return LexicalJudge().judge

    def judge_on(engine: Generator) -> ModelJudge:
        name = f"{settings.model} at {settings.url}"
        return ModelJudge(engine, name, settings.repeats, settings.temperature, run.seed)

    def judge(exchanges: Sequence[Exchange]) -> list[Judgement]:
        with closing(OnDemand(lambda: start_judge(settings))) as engine:
            return grade(judge_on(engine), exchanges, path)

    # Once for the study: without resuming, this removes a former run's grades.
    path = answers_path(run, "judgements", judge_header(judge_on(OnDemand(lambda: start_judge(settings)))))
    return judge


def start_judge(settings: JudgeSettings) -> Generator:
    """The engine that judges."""
    return OpenAIGenerator(settings.url, settings.model)
