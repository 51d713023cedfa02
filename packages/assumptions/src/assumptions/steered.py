"""The steering half of the study: where to steer, chosen on validation messages; then the test messages, dosed.

Both parts answer messages under conditions and have the replies judged; the replies of a condition lie in a file known
by the condition and the messages, so an edited message or another direction is steered anew, and a run that was stopped
goes on at the next condition. Test messages are answered by `dose_test` alone.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from assumptions.chats import Chat
from assumptions.coherence import surprises, textures
from assumptions.conditions import UNEDITED, Condition, Reply, SteeredEngine, answer, dosed
from assumptions.control import Trial, best, candidate_blocks, directions_by_block, trial, trial_family
from assumptions.directions import (
    Ground,
    fitted_direction,
    means_direction,
    shuffled_direction,
    sycophancy_direction,
)
from assumptions.doses import Curve, Effect, dose_response, effect
from assumptions.engines import HFEngine, served
from assumptions.features import Features
from assumptions.judges import Judging
from assumptions.outcomes import Exchange, Judgement, sycophancy
from assumptions.probes import ProbeSet
from assumptions.ranges import DoseRange, coherence_under, search_range
from assumptions.rewording import word_controls
from assumptions.settings import AssumptionProbingConfig
from assumptions.sources import moved_outcomes
from assumptions.splits import Split, row_hash
from assumptions.steering import Direction, random_directions
from shared.data import read_rows, write_rows
from shared.errors import UserError
from shared.generation import Sampling
from shared.interventions import save_interventions
from shared.models import Model
from shared.runs import Run, Stage, config_hash
from shared.serialize import plain


class Answered(NamedTuple):
    """Replies under some conditions, and what the judge made of each."""

    replies: list[Reply]
    judgements: list[Judgement]


@dataclass(frozen=True)
class Steering:
    """What answers and judges messages under directions: the study's settings, its model, judge and run."""

    config: AssumptionProbingConfig
    model: Model
    judge: Judging
    run: Run

    @property
    def sampling(self) -> Sampling:
        """How replies are sampled."""
        settings = self.config.steering
        return Sampling(settings.max_tokens, settings.temperature, settings.top_p, logprobs=None)

    def dosed(self, directions: Sequence[Direction], doses: Sequence[float]) -> list[Condition]:
        """The unedited model and the directions at every dose, in the study's unit and scope."""
        return dosed(directions, doses, self.config.steering.unit, self.config.steering.scope)

    def answer(self, kind: str, chats: Sequence[Chat], conditions: Sequence[Condition]) -> Answered:
        """Replies of the chats under the conditions, judged; each condition answered in a former run is kept."""
        stages = [self._stage(kind, chats, condition) for condition in conditions]
        pending = [pair for pair in zip(conditions, stages, strict=True) if not pair[1].done]
        if pending:
            with self._engine(kind, [condition for condition, _ in pending]) as engine:
                for condition, stage in self.run.progress(pending, f"steered replies: {kind}"):
                    with stage as path:
                        write_rows(
                            path, answer(engine, chats, [condition], self.sampling, seed=self.run.seed)
                        )
        replies = [reply for stage in stages for reply in read_rows(stage.path, Reply)]
        turns = {chat.id: chat.turn for chat in chats}
        return Answered(replies, self.judge([Exchange(turns[reply.chat], reply.text) for reply in replies]))

    def _stage(self, kind: str, chats: Sequence[Chat], condition: Condition) -> Stage:
        """The file of one condition's replies, named by all that they follow from."""
        put = [condition.reword(chat) if condition.reword else chat for chat in chats]
        asked = {"condition": condition.digest, "rows": [(chat.id, row_hash(chat)) for chat in put]}
        return self.run.stage(f"{kind}/{config_hash(asked)}.jsonl")

    def curves(
        self, kind: str, chats: Sequence[Chat], directions: Sequence[Direction], doses: Sequence[float]
    ) -> dict[str, Curve]:
        """The dose-response curve of every direction over the chats, by its name."""
        return self.curves_of(self.answer(kind, chats, self.dosed(directions, doses)), directions)

    def curves_of(self, answered: Answered, directions: Sequence[Direction]) -> dict[str, Curve]:
        """The curves of directions whose replies are there."""
        replies, judged = answered
        outcomes = {one.name: moved_outcomes(self.config.data, one.dimension) for one in directions}
        return {one.name: dose_response(replies, judged, one, outcomes[one.name]) for one in directions}

    @contextmanager
    def _engine(self, kind: str, conditions: Sequence[Condition]) -> Iterator[SteeredEngine]:
        if self.config.steering.engine == "vllm":
            folder = self.run.path(f"adapters-{kind}")
            with served(self.model, conditions, folder, self.config.steering.replicas) as engine:
                yield engine
        else:
            yield HFEngine(self.model)


@dataclass(frozen=True)
class Grounds:
    """What directions are made of: features of all rows, their labels by dimension, the split, and the probes."""

    features: Features
    labels_BK: Float[torch.Tensor, "B K"]
    split: Split
    chats: Sequence[Chat]
    probes: ProbeSet

    def labels(self, dimension: str, rows: Sequence[int]) -> Float[torch.Tensor, " B"]:
        """Labels of a dimension in the given rows."""
        return self.labels_BK[list(rows), list(self.probes.probes).index(dimension)]


def choose_directions(
    study: Steering, grounds: Grounds
) -> tuple[dict[str, Direction], dict[str, list[Trial]]]:
    """The direction of every steered dimension at the block chosen for it, and what each block tried has shown."""
    settings = study.config.steering
    choice, probes, split = settings.choice, grounds.probes, grounds.split
    if choice.by == "reading":
        return {
            name: fitted_direction(probes.probes[name], settings.kind, grounds.features, split.train)
            for name in settings.dimensions
        }, {}
    n_layers = study.model.architecture.n_layers
    candidates: dict[str, list[Direction]] = {}
    for name in settings.dimensions:
        blocks = candidate_blocks(choice.blocks, n_layers, probes.probes[name].block)
        candidates[name] = directions_by_block(
            grounds.features, grounds.labels_BK, probes, split, name, blocks, settings.kind
        )
    families = {
        name: [trial_family(direction, choice.random, study.run.seed) for direction in directions]
        for name, directions in candidates.items()
    }
    everything = [one for of_name in families.values() for family in of_name for one in family]
    asked = [grounds.chats[i] for i in split.validation][: choice.messages]
    curves = study.curves("choice", asked, everything, choice.doses)
    trials = {
        name: [trial(family[0], [curves[one.name] for one in family]) for family in of_name]
        for name, of_name in families.items()
    }
    chosen = {
        name: directions[trials[name].index(best(trials[name], choice.largest_loss))]
        for name, directions in candidates.items()
    }
    return chosen, trials


class Families(NamedTuple):
    """Every direction with its controls behind it by dimension, and why a control is missing, by its name."""

    of_name: dict[str, list[Direction]]
    missing: dict[str, str]


def families(study: Steering, grounds: Grounds, directions: Mapping[str, Direction]) -> Families:
    """Every direction with its controls behind it, all at its block and of its norm."""
    settings, train = study.config.steering, grounds.split.train
    judged = _labelled(study, grounds) if "sycophancy" in settings.controls else ([], np.array([]))
    found, missing = {}, {}
    for name, direction in directions.items():
        ground = Ground.of(grounds.features, train, direction.block)
        labels_B = grounds.labels(name, train)
        family = [direction, *random_directions(direction, settings.random, study.run.seed)]
        if "shuffled" in settings.controls:
            probe = grounds.probes.probes[name]
            family.append(shuffled_direction(ground, direction, probe, labels_B, study.run.seed))
        if "means" in settings.controls:
            family.append(means_direction(ground, direction, labels_B))
        if "sycophancy" in settings.controls:
            there = Ground.of(grounds.features, judged[0], direction.block)
            try:
                family.append(sycophancy_direction(there, direction, judged[1]))
            except UserError as error:
                missing["sycophancy"] = str(error)
        found[name] = family
    return Families(found, missing)


def _labelled(study: Steering, grounds: Grounds) -> tuple[list[int], Float[np.ndarray, " B"]]:
    """Rows of training messages, and the judged sycophancy of the unedited replies to them."""
    rows = grounds.split.train[: study.config.steering.labelled]
    answered = study.answer("labelled", [grounds.chats[i] for i in rows], [Condition(UNEDITED)])
    return rows, sycophancy(answered.judgements)


def find_doses(
    study: Steering, grounds: Grounds, directions: Mapping[str, Direction]
) -> tuple[list[float], dict[str, DoseRange]]:
    """The study's doses: those given, or an even grid over the smallest range in which all directions stay coherent."""
    settings = study.config.steering
    if settings.doses:
        return settings.doses, {}
    search = settings.range
    asked = [grounds.chats[i] for i in grounds.split.validation][: search.messages]
    ranges = {}
    for name, direction in study.run.progress(list(directions.items()), "range of doses"):
        coherence = coherence_under(
            HFEngine(study.model),
            study.model,
            asked,
            direction,
            study.sampling,
            unit=settings.unit,
            scope=settings.scope,
            seed=study.run.seed,
        )
        ranges[name] = search_range(coherence, search.start, search.limit, search.floor)
    smallest = min(ranges.values(), key=lambda one: one.largest)
    return smallest.doses(search.steps), ranges


@dataclass(frozen=True)
class Steered:
    """Curves by dimension (the direction's own first, then its controls), controls in words, replies, side effects.

    `judgements` are those of the replies, in their order.
    """

    curves: dict[str, list[Curve]]
    words: dict[str, list[Effect]]
    replies: list[Reply]
    judgements: list[Judgement]
    side_effects: dict[str, Any]


def dose_test(
    study: Steering,
    of_name: Mapping[str, Sequence[Direction]],
    chats: Sequence[Chat],
    doses: Sequence[float],
) -> Steered:
    """Answer the test messages under every direction of every family and under the controls in words."""
    settings, run = study.config.steering, study.run
    shutil.rmtree(run.folder / "directions", ignore_errors=True)  # a former choice of dimensions
    for name, family in of_name.items():
        edits = family[0].interventions(1.0, settings.unit, settings.scope)
        save_interventions(run.path(f"directions/{name}"), edits, study.model)
    everything = [one for family in of_name.values() for one in family]
    spoken = {
        name: word_controls(name, study.config.data) for name in of_name if "words" in settings.controls
    }
    conditions = {one.key: one for some in spoken.values() for one in some}
    answered = study.answer("replies", chats, [*study.dosed(everything, doses), *conditions.values()])
    curves = study.curves_of(answered, everything)
    words = {
        name: [effect(*answered, one.name, moved_outcomes(study.config.data, name)) for one in some]
        for name, some in spoken.items()
    }
    replies = answered.replies
    side = side_effects(study, of_name, chats, replies)
    by_name = {name: [curves[one.name] for one in family] for name, family in of_name.items()}
    return Steered(by_name, words, replies, answered.judgements, side)


def side_effects(
    study: Steering,
    of_name: Mapping[str, Sequence[Direction]],
    chats: Sequence[Chat],
    replies: Sequence[Reply],
) -> dict[str, Any]:
    """Side effects by condition (name@dose): of the directions, one random control each, the words, and no edit.

    Reading every reply again costs about what writing it did, so the other controls are left out.
    """
    left_out = {
        one.name
        for family in of_name.values()
        for one in family[1:]
        if one.name != f"{family[0].dimension}.random0"
    }
    read = [reply for reply in replies if reply.direction not in left_out]
    key = config_hash([(row_hash(chat), chat.id) for chat in chats] + [plain(reply) for reply in read])

    def compute() -> dict[str, Any]:
        found = textures(read, surprises(study.model, chats, read))
        return {f"{name}@{dose:g}": plain(texture) for (name, dose), texture in found.items()}

    known: dict[str, Any] = study.run.json_stage(f"side_effects-{key}.json", compute)
    return known
