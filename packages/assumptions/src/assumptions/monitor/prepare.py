"""What the monitor starts with: the model, its probes, its directions, the instrument, and how it talks by default.

The embedded model needs nothing else: its world gives messages with the truth about them, so probes are fitted on them
at start. Any other model comes with the folder that `assumptions probe` (or a run of the study) has left, and may come
with directions of its own, one folder of saved interventions a dimension, each worth one SD.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from assumptions.dimensions import NAMES, dimension
from assumptions.features import capture_features
from assumptions.instruments import INSTRUMENTS, instrument
from assumptions.monitor.session import Draw
from assumptions.monitor.subject import Subject
from assumptions.probe_files import load_probes
from assumptions.probes import ProbeSet, fit_probes
from assumptions.sources import load_messages
from assumptions.splits import group_split
from shared.errors import UserError
from shared.interventions import Add, load_interventions
from shared.models import Model, ModelConfig, load

EMBEDDED = "tinyworld"
TURNS = 400  # of the embedded world, to fit on: R2 above 0.99 in a few seconds
SUGGESTIONS = 12


@dataclass(frozen=True)
class Talk:
    """How the page talks by default: sampling, whether earlier turns are read again, and messages to begin with."""

    draw: Draw = field(default_factory=Draw)
    remember: bool = True
    suggestions: tuple[str, ...] = ()


def prepare(
    config: ModelConfig, probes: Path | None, directions: Path | None, instrument_name: str | None
) -> tuple[Subject, Talk]:
    """Load everything; UserError, before the model is loaded where that can be, when something is missing."""
    embedded = config.name == EMBEDDED
    if probes is None and not embedded:
        raise UserError(
            "the monitor reads a model through its probes: give --probes FOLDER, which `assumptions probe` writes; "
            "only the embedded model (--model tinyworld) needs none"
        )
    asked = instrument(instrument_name) if instrument_name else None
    if probes is not None:
        load_probes(probes)
    if directions is not None:
        direction_folders(directions)
    model = load(config)
    fitted = load_probes(probes, model) if probes is not None else embedded_probes(model)
    asked = asked or instrument("tinyworld_nine" if embedded else labelling(fitted))
    if asked.shape_of is None or asked.sections:
        raise UserError(f"instrument {asked.id} does not ask for scores alone: take one such as nine_scores")
    own = load_directions(directions, model) if directions is not None else {}
    return Subject(model, fitted, asked, own), _embedded_talk() if embedded else Talk()


def labelling(probes: ProbeSet) -> str:
    """The instrument whose scores the probes were fitted on, where it asks for scores alone; else nine_scores."""
    name = probes.labeller.rpartition("-v")[0]
    return name if name in INSTRUMENTS and not INSTRUMENTS[name].sections else "nine_scores"


def embedded_probes(model: Model, turns: int = TURNS) -> ProbeSet:
    """Probes of the embedded model, fitted on its own world's messages and the posterior means of their latents."""
    messages = load_messages(EMBEDDED, turns, seed=1, columns={})
    features = capture_features(model, messages.chats)
    labels_BK = torch.from_numpy(messages.posterior_BK)
    return fit_probes(features, labels_BK, NAMES, group_split(messages.chats), "tinyworld-posterior")[0]


def load_directions(folder: Path, model: Model) -> dict[str, list[Add]]:
    """The edits of one SD by dimension, from `folder`/DIMENSION/interventions.json as the study writes them."""
    found: dict[str, list[Add]] = {}
    for name, path in direction_folders(folder).items():
        edits = load_interventions(path, model)
        adds = [one for one in edits if isinstance(one, Add)]
        if len(adds) != len(edits):
            raise UserError(f"{path}: only directions that are added can be scaled by a slider")
        found[name] = adds
    return found


def direction_folders(folder: Path) -> dict[str, Path]:
    """The folders of saved interventions by dimension; UserError when there are none."""
    paths = sorted(path.parent for path in folder.glob("*/interventions.json"))
    if not paths:
        raise UserError(
            f"{folder} holds no directions: one folder a dimension, with interventions.json, is wanted"
        )
    return {dimension(path.name).name: path for path in paths}


def _embedded_talk() -> Talk:
    """The embedded model answers single messages of its own world, at the temperature it was trained for."""
    from shared.tinyworld import social

    turns = social.sample_turns(SUGGESTIONS, seed=2, split="test")
    return Talk(Draw(max_tokens=80, temperature=1.0, top_p=1.0), False, tuple(turn.text for turn in turns))
