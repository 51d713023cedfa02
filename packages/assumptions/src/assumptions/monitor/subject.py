"""The model under observation: what its activations say of a message, how it is steered, what it says when asked.

1. `read`: the probes' calibrated scores of the last user message, from one forward pass, under edits or without.
2. `edits`: settings of the page as interventions. "push" adds a dose of the dimension's direction, in SD of the
   projection over the probes' training rows; "hold" clamps what the dimension's probe reads to a score, whatever the
   message is. Pushes come first, so that what is held is held.
3. `ask`: the scores the model states when an instrument asks for them, under the same edits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

from assumptions.chats import Chat
from assumptions.features import Span, capture_features
from assumptions.instruments import Instrument
from assumptions.probes import ProbeSet
from assumptions.steering import clamp, probe_direction
from shared.errors import UserError
from shared.generation import Request, Sampling, stream
from shared.hooks import edit
from shared.interventions import Add, Intervention, LowRank
from shared.models import Model
from shared.tokens import Message

Mode = Literal["push", "hold"]
RANGES: dict[Mode, tuple[float, float]] = {"push": (-6.0, 6.0), "hold": (0.0, 1.0)}


@dataclass(frozen=True)
class Setting:
    """How one dimension is steered: pushed by `value` SD of its projection, or held at the score `value`."""

    dimension: str
    mode: Mode
    value: float


@dataclass(frozen=True)
class Stated:
    """What the model said when asked: scores by dimension, how the answer could be read, and its text."""

    scores: dict[str, float]
    status: str
    text: str
    instrument: str


@dataclass(frozen=True)
class Subject:
    """A model with the probes that read it, the edits of one SD by dimension, and the instrument that asks it."""

    model: Model
    probes: ProbeSet
    instrument: Instrument
    directions: Mapping[str, Sequence[Add]]

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """The sites that the probes read."""
        return tuple(sorted({probe.site for probe in self.probes.probes.values()}))

    @cached_property
    def pushes(self) -> dict[str, Sequence[Add]]:
        """The edits of one SD: those given, else the probe's own direction at the block where it reads."""
        own = {name: probe_direction(probe).interventions(1.0) for name, probe in self.probes.probes.items()}
        return own | dict(self.directions)

    def check(self, settings: Sequence[Setting]) -> None:
        """UserError for a dimension without a probe, one set twice, or a value out of range."""
        names = [setting.dimension for setting in settings]
        for setting in settings:
            if setting.dimension not in self.pushes:
                raise UserError(f"no probe reads {setting.dimension!r}; there are {', '.join(self.pushes)}")
            if names.count(setting.dimension) > 1:
                raise UserError(f"{setting.dimension} is set twice")
            low, high = RANGES[setting.mode]
            if not low <= setting.value <= high:
                raise UserError(
                    f"{setting.dimension}: {setting.value:g} is out of range, {low:g} to {high:g} for {setting.mode}"
                )

    def edits(self, settings: Sequence[Setting]) -> list[Intervention]:
        """The interventions of the settings; none for a push of 0."""
        self.check(settings)
        pushes = [
            Add(one.site, one.vector_D, one.strength * setting.value, phase=one.phase)
            for setting in settings
            if setting.mode == "push" and setting.value
            for one in self.pushes[setting.dimension]
        ]
        return [*pushes, *self._clamps([setting for setting in settings if setting.mode == "hold"])]

    def _clamps(self, held: Sequence[Setting]) -> list[LowRank]:
        """One clamp a block, of all that is held there."""
        probes = [self.probes.probes[setting.dimension] for setting in held]
        by_block: dict[int, list[int]] = {}
        for place, probe in enumerate(probes):
            by_block.setdefault(probe.block, []).append(place)
        return [
            clamp([probes[i] for i in places], [held[i].value for i in places])
            for _, places in sorted(by_block.items())
        ]

    def read(self, messages: Sequence[Message], edits: Sequence[Intervention] = ()) -> dict[str, float]:
        """Scores in [0, 1] by dimension, read from a chat's last user message as the edits leave it."""
        chat = Chat("conversation", messages[-1]["content"], tuple(messages[:-1]))
        with edit(self.model, edits):
            features = capture_features(self.model, [chat], cast(Span, self.probes.span), self.sites)
        self.probes.check(features, held_out=False)
        return {name: float(probe.score(features)[0]) for name, probe in self.probes.probes.items()}

    def ask(self, messages: Sequence[Message], edits: Sequence[Intervention] = ()) -> Stated:
        """What the model states about the last user message of a chat, asked by the instrument, greedy."""
        asked = self.instrument.messages(messages[-1]["content"], messages[:-1])
        sampling = Sampling(max_tokens=384, logprobs=None)
        pieces = stream(self.model, Request(asked, seed=0), sampling, edits)
        text = "".join(piece.text for piece in pieces)
        elicited = self.instrument.parse(text)
        return Stated(elicited.scores, elicited.answer.status.value, text, self.instrument.id)
