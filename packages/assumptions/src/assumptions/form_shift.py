"""How far a probe's reading moves between the two forms of a prompt (fault T11 of the released code).

Probes of the released code read raw text and steer replies under a chat template: what is read is not what is steered.
Here both are one form. The shift says what the other form would have done to the reading of the very same messages:

    shift    mean of the reading in the other form less that in the probe's own, in SD of its projection
    spread   SD of that difference, in the same unit: a shift alone could be taken off, a spread cannot
    r2       of the labels, as read in the other form
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from assumptions.chats import Chat
from assumptions.features import Features, capture_features
from assumptions.probes import ProbeSet
from assumptions.rendering import Form
from assumptions.ridge import r2
from shared.models import Model

OTHER: Mapping[Form, Form] = {"chat": "raw", "raw": "chat"}


@dataclass(frozen=True)
class FormShift:
    """What the reading of messages in `form` differs by from that in the probe's own form."""

    form: Form
    shift: float
    spread: float
    r2: float


def form_shifts(
    model: Model,
    probes: ProbeSet,
    features: Features,
    chats: Sequence[Chat],
    labels_BK: Float[torch.Tensor, "B K"],
) -> dict[str, FormShift]:
    """The shift of every probe over chats (B) whose `features` were read in the probes' form, with their labels (B K).

    Raises UserError where the features are of another form, or of rows that the probes were fitted on.
    """
    probes.check(features)
    form = OTHER[probes.form]
    other = capture_features(model, chats, features.span, features.sites, form=form)
    found = {}
    for k, (name, probe) in enumerate(probes.probes.items()):
        there_B = probe.predict(other)
        moved_B = (probe.value(other) - probe.value(features)) / (probe.weight_D.norm() * probe.projection_sd)
        [explained] = r2(there_B[:, None], labels_BK[:, k : k + 1].double())
        found[name] = FormShift(form, float(moved_B.mean()), float(moved_B.std()), float(explained))
    return found
