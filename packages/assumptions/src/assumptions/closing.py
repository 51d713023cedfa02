"""Causal closure of a study: test messages elicited again under every direction and dose; and the mediation.

On an embedded model the scores are forced (`assumptions.forced`), elsewhere elicited with the study's own instrument
and kind of score from Hugging Face, one append-only file for every edit. A random control of each direction goes
through the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from assumptions.answer_file import answers_path
from assumptions.chats import Chat
from assumptions.closure import Closure, ScoresUnder, close, closure_figures
from assumptions.conditions import UNEDITED, Condition
from assumptions.dimensions import NAMES
from assumptions.elicitation import header
from assumptions.forced import forced_scores
from assumptions.instruments import instrument
from assumptions.mediation import Mediation, mediate
from assumptions.outcomes import sycophancy
from assumptions.scoring import asked_with, score_chats
from assumptions.sources import moved_outcomes
from assumptions.steered import Steered, Steering
from assumptions.steering import Direction
from shared.errors import UserError
from shared.generation import HFGenerator
from shared.interventions import Intervention
from shared.tinyworld import EMBEDDED


def scores_under(study: Steering, chats: Sequence[Chat]) -> ScoresUnder:
    """What asks the chats again under edits; answers of a former run are kept."""
    asked, model = instrument(study.config.instrument), study.model
    if model.config.name in EMBEDDED and asked.name == "tinyworld_nine":
        return lambda edits: forced_scores(model, asked, chats, edits)
    score, settings = study.config.score, replace(study.config.elicitation, guided=False)
    ids = [chat.id for chat in chats]

    def elicited(edits: Sequence[Intervention]) -> Float[ndarray, "B 9"]:
        made = header(
            asked,
            asked_with(score, settings),
            f"{model.fingerprint} under {Condition('edits', edits=tuple(edits)).digest}",
        )
        path = answers_path(study.run, "again", made)
        generator = HFGenerator(model, edits, batch_size=settings.batch_size)
        scoring = score_chats(
            generator, model.tokenizer, asked, chats, path, settings, score, model=made["model"]
        )
        return scoring.scored.scores(ids, NAMES)

    return elicited


def elicit_again(
    study: Steering,
    families: Mapping[str, Sequence[Direction]],
    chats: Sequence[Chat],
    doses: Sequence[float],
) -> Closure:
    """The closure of every direction and of its first random control, in this order."""
    directions = [
        one
        for family in families.values()
        for one in (family[0], *[other for other in family if other.kind == "random"][:1])
    ]
    settings = study.config.steering
    return close(
        directions,
        doses,
        scores_under(study, chats),
        NAMES,
        unit=settings.unit,
        scope=settings.scope,
        progress=lambda some: study.run.progress(some, "elicited again"),
    )


def mediations(
    study: Steering, closure: Closure, chats: Sequence[Chat], steered: Steered
) -> dict[str, Mediation | str]:
    """How much of each effect on sycophancy the re-elicited score carries, by direction; else why it cannot be said."""
    found: dict[str, Mediation | str] = {}
    for c, name in enumerate(closure.directions):
        target = closure.targets[c]
        judged = sycophancy(steered.judgements, moved_outcomes(study.config.data, target))
        known: dict[tuple[str, float], list[float]] = {}
        for reply, score in zip(steered.replies, judged, strict=True):
            if reply.direction in (name, UNEDITED) and np.isfinite(score):
                known.setdefault((reply.chat, reply.dose), []).append(float(score))
        rows = [(chat.id, m, b) for b, chat in enumerate(chats) for m in range(len(closure.doses))]
        k = closure.dimensions.index(target)
        outcome = [known.get((chat, closure.doses[m]), [np.nan]) for chat, m, _ in rows]
        try:
            found[name] = mediate(
                [chat for chat, _, _ in rows],
                np.array([closure.doses[m] for _, m, _ in rows]),
                np.array([closure.scores_CMBK[c, m, b, k] for _, m, b in rows]),
                np.array([np.mean(scores) for scores in outcome]),
                seed=study.run.seed,
            )
        except UserError as error:
            found[name] = str(error)
    return found


def closing_metrics(closure: Closure, found: Mapping[str, Mediation | str]) -> dict[str, Any]:
    """What metrics.json keeps: the closure by direction, controls apart, and the mediation of each."""
    own = [c for c, name in enumerate(closure.directions) if ".random" not in name]
    figures = {
        kind: closure_figures(
            replace(
                closure,
                directions=[closure.directions[c] for c in rows],
                targets=[closure.targets[c] for c in rows],
                scores_CMBK=closure.scores_CMBK[rows],
            )
        )
        for kind, rows in (
            ("own", own),
            ("random", [c for c in range(len(closure.directions)) if c not in own]),
        )
        if rows
    }
    return {"closure": figures, "mediation": dict(found)}
