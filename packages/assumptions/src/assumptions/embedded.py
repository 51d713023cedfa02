"""What a study adds on an embedded model, whose world is known: costs, the truth beside figures, JSON without grammar.

All three are stages of the run: they are computed once for the directions, probes and messages that they are about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from assumptions.answer_file import answers_path
from assumptions.chats import Chat
from assumptions.elicitation import elicit, header
from assumptions.engines import HFEngine
from assumptions.instruments import instrument
from assumptions.preservation import preservation
from assumptions.steered import Grounds, Steering
from assumptions.steering import Direction
from assumptions.truth import truth_of
from shared.generation import HFGenerator
from shared.runs import config_hash


def preserved(study: Steering, directions: Mapping[str, Direction], doses: Sequence[float]) -> dict[str, Any]:
    """Moral pairs and claims of the embedded world under the outermost doses."""
    settings = study.config.steering
    key = config_hash([[one.digest for one in directions.values()], list(doses)])

    def compute() -> dict[str, Any]:
        return preservation(
            HFEngine(study.model),
            directions,
            doses,
            settings.messages,
            unit=settings.unit,
            scope=settings.scope,
            seed=study.run.seed,
        )

    found: dict[str, Any] = study.run.json_stage(f"preservation-{key}.json", compute)
    return found


def beside_truth(
    study: Steering,
    grounds: Grounds,
    stated_BK: Float[np.ndarray, "B K"],
    posterior_BK: Float[np.ndarray, "B K"],
) -> dict[str, Any]:
    """The figures of `assumptions.truth`; stated scores and posterior means are those of the rows of `grounds`."""
    model = study.model
    key = config_hash([probe.weight_D for probe in grounds.probes.probes.values()])

    def compute() -> dict[str, Any]:
        return truth_of(
            model,
            model.config.name,
            grounds,
            stated_BK,
            posterior_BK,
            study.config.truth,
            lambda some: study.run.progress(some, "elicited again under true directions"),
        )

    return {"truth": study.run.json_stage(f"truth-{key}.json", compute)}


def unguided(study: Steering, chats: Sequence[Chat]) -> float:
    """Share of valid JSON among free answers to the first messages, from Hugging Face without a grammar."""
    config, model = study.config, study.model
    asked, settings = instrument(config.instrument), replace(config.elicitation, guided=False)
    path = answers_path(study.run, "unguided", header(asked, settings, model.fingerprint))
    answers = elicit(
        HFGenerator(model), asked, chats[: config.unguided], path, settings, model=model.fingerprint
    )
    return answers.valid_share()
