"""Settings of the assumption_probing pipeline, refused when they do not fit each other, before a model is loaded."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from assumptions.dimensions import NAMES, dimension
from assumptions.elicitation import ElicitationSettings, check
from assumptions.families import FamilyName
from assumptions.features import Span
from assumptions.instruments import instrument
from assumptions.scoring import Score, check_score
from assumptions.steering import Fitted, Scope, Unit
from shared.errors import UserError


@dataclass
class ProbeSettings:
    """How scores are read from activations: the family of probes, and a sentence encoder (name or folder) to beat.

    `left_out`: also figures on every source by probes fitted on the others.
    """

    kind: FamilyName = "ridge"
    embedding: str = ""
    left_out: bool = False


@dataclass
class ChoiceSettings:
    """How the block to steer at is chosen (`assumptions.control`): by dose-response on validation messages.

    `by` "reading" takes the block chosen for reading and answers nothing. `blocks`: those to try, none for at most
    eight over the depth. `largest_loss`: share of readable replies that steering may cost.
    """

    by: Literal["dose_response", "reading"] = "dose_response"
    blocks: list[int] = field(default_factory=list)
    doses: list[float] = field(default_factory=lambda: [-3.0, 0.0, 3.0])
    random: int = 2
    messages: int = 16
    largest_loss: float = 0.1


@dataclass
class RangeSettings:
    """How doses are searched where none are given (`assumptions.ranges`), on validation messages: from `start` on.

    `steps` doses a side are then taken, evenly up to the largest one that keeps `floor` of the coherence.
    """

    start: float = 1.0
    limit: float = 32.0
    floor: float = 0.9
    steps: int = 3
    messages: int = 16


Control = Literal["shuffled", "means", "sycophancy", "words"]


@dataclass
class SteeringSettings:
    """How replies are steered: which dimensions along which kind of direction, at which doses, with which controls.

    Without `doses` they are searched. Beside every direction stand `random` ones of its norm and the `controls`; the
    sycophancy control is fitted on the judged replies to `labelled` training messages.
    """

    dimensions: list[str] = field(default_factory=lambda: ["validation_seeking", "objectivity_seeking"])
    kind: Fitted = "probe"
    doses: list[float] = field(default_factory=lambda: [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0])
    unit: Unit = "proj_sd"
    scope: Scope = "all"
    random: int = 5
    controls: list[Control] = field(default_factory=lambda: ["shuffled", "means", "sycophancy", "words"])
    labelled: int = 60
    messages: int = 32
    max_tokens: int = 80
    temperature: float = 1.0
    top_p: float = 1.0
    engine: Literal["hf", "vllm"] = "hf"
    replicas: int = 1
    choice: ChoiceSettings = field(default_factory=ChoiceSettings)
    range: RangeSettings = field(default_factory=RangeSettings)


@dataclass
class JudgeSettings:
    """Who judges the replies: the embedded world's exact judge, or a model, in this process or on a server.

    `model` is its name or folder ("local"), or the name that the OpenAI-compatible server at `url` knows it by.
    `human`: a file of people's grades (message, reply, outcome, score) that its own are set beside.
    """

    kind: Literal["lexical", "local", "server"] = "lexical"
    url: str = ""
    model: str = ""
    repeats: int = 1
    temperature: float = 0.0
    human: str = ""


@dataclass
class AssumptionProbingConfig:
    """Settings of assumption_probing.

    `data`: "tinyworld" (held-out messages whose truth is known) or a file of chats, whose column names `columns` maps.
    `instrument`: a name of `assumptions.instruments` that scores all nine dimensions; `engine` answers it (vLLM in
    `replicas` processes that share the GPUs or cores), and `score` says which number is taken from the answers
    (`assumptions.scoring`). `again` test messages are elicited again under the study's directions and doses (0: none).
    On an embedded model `truth` test messages are elicited again along the planted directions, and `unguided` ones are
    asked without a grammar.
    """

    data: str = "tinyworld"
    columns: dict[str, str] = field(default_factory=dict)
    messages: int = 300
    instrument: str = "tinyworld_nine"
    engine: Literal["vllm", "hf"] = "vllm"
    replicas: int = 1
    score: Score = "stated"
    elicitation: ElicitationSettings = field(default_factory=lambda: ElicitationSettings(max_tokens=256))
    span: Span = "user"
    shuffles: int = 5
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    steering: SteeringSettings = field(default_factory=SteeringSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    again: int = 16
    truth: int = 24
    unguided: int = 100

    def __post_init__(self) -> None:
        for name in self.steering.dimensions:
            dimension(name)
        _check_choices(self)
        if instrument(self.instrument).dimensions != NAMES:
            raise UserError(
                f"instrument {self.instrument!r} does not score all nine dimensions; take nine_scores"
            )
        if self.engine == "hf" and self.elicitation.guided:
            raise UserError("engine hf has no grammar: set pipeline.elicitation.guided=false, or engine=vllm")
        for place, engine, replicas in (
            ("", self.engine, self.replicas),
            ("steering.", self.steering.engine, self.steering.replicas),
        ):
            if replicas < 1 or (replicas > 1 and engine == "hf"):
                raise UserError(f"{place}replicas is 1, or with {place}engine=vllm more, got {replicas}")
        for name, doses in (("doses", self.steering.doses), ("choice.doses", self.steering.choice.doses)):
            if (doses or name != "doses") and (0.0 not in doses or len(set(doses)) < 3):
                raise UserError(f"steering.{name} needs 0 and at least two other doses")
        if self.judge.kind == "server" and not (self.judge.url and self.judge.model):
            raise UserError(
                "judge.kind=server needs judge.url and judge.model; the key is read from OPENAI_API_KEY"
            )
        if self.judge.kind == "local" and not self.judge.model:
            raise UserError("judge.kind=local needs judge.model, the name or folder of the model that judges")
        if self.judge.repeats > 1 and self.judge.temperature == 0:
            raise UserError(
                "judge.repeats above 1 needs a judge.temperature: at 0 all grades of a reply are one"
            )
        check(instrument(self.instrument), self.elicitation)
        check_score(self.score, self.elicitation)


def _check_choices(config: AssumptionProbingConfig) -> None:
    """Refuse a word that no choice knows, before anything long has run."""
    steering = config.steering
    chosen: list[tuple[str, str, tuple[str, ...]]] = [
        ("engine", config.engine, ("vllm", "hf")),
        ("score", config.score, get_args(Score)),
        ("span", config.span, get_args(Span)),
        ("judge.kind", config.judge.kind, ("lexical", "local", "server")),
        ("steering.kind", steering.kind, get_args(Fitted)),
        ("steering.unit", steering.unit, get_args(Unit)),
        ("steering.scope", steering.scope, get_args(Scope)),
        ("steering.engine", steering.engine, ("hf", "vllm")),
        ("steering.choice.by", steering.choice.by, ("dose_response", "reading")),
        *(("steering.controls", control, get_args(Control)) for control in steering.controls),
    ]
    for name, value, known in chosen:
        if value not in known:
            raise UserError(f"{name} {value!r} is not one of {', '.join(known)}")
