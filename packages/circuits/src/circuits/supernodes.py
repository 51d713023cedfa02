"""Supernodes as a file beside the graph: labelled groups of nodes, and how far they can be trusted.

    {"supernodes": [{"label": str, "nodes": [[layer, position or null, neuron, sign], ...]}, ...],
     "number": ..., "stability": [...], "coverage": ..., "support": [...], "contexts": ...}

A position of null means every position; the sign is that of the activation (0: either). Everything but the supernodes
says how a clustering found them and stays as it is when they are edited; the support of one that was edited is null.
The label of a found cluster is what it hears and what it says: the words of the contexts that its attribution is
largest on, and the words that its neurons together raise.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from circuits.clusters import Clustering, Stability
from circuits.describe import vocabulary_effects
from circuits.profiles import Profile, Signed
from shared.config import ConfigError, to_dataclass
from shared.errors import UserError
from shared.serialize import plain, read_json, write_json

if TYPE_CHECKING:
    from shared.models import Model


@dataclass(frozen=True)
class Supernode:
    """A labelled group of nodes (layer, position or None, neuron, sign)."""

    label: str
    nodes: list[tuple[int, int | None, int, int]]


@dataclass(frozen=True)
class Supernodes:
    """The supernodes of a graph or a data set; what does not come from clustering has the defaults."""

    supernodes: list[Supernode]
    number: int = 0
    stability: list[Stability] = field(default_factory=list)
    support: list[float | None] = field(default_factory=list)
    coverage: float | None = None
    contexts: int = 0


def write_supernodes(path: Path | str, content: Supernodes) -> Path:
    """Write the file; returns its path."""
    write_json(Path(path), plain(content))
    return Path(path)


def read_supernodes(path: Path | str) -> Supernodes:
    """Read the file; UserError names what is wrong with it."""
    try:
        content = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds no supernodes: {error}") from error
    try:
        return to_dataclass(Supernodes, content if isinstance(content, dict) else {})
    except ConfigError as error:
        raise UserError(f"{path} holds no supernodes: {error}") from error


def from_clusters(
    model: "Model", clustering: Clustering, profiles: Sequence[Profile], coverage: float | None = None
) -> Supernodes:
    """Return the clusters as supernodes at every position, labelled, with their stability."""
    supernodes = [
        Supernode(label(model, members, profiles), [(n.layer, None, n.neuron, n.sign) for n in members])
        for members in clustering.members()
    ]
    return Supernodes(
        supernodes=supernodes,
        number=clustering.number,
        stability=list(clustering.stability),
        support=list(clustering.support()),
        coverage=coverage,
        contexts=len(profiles),
    )


def label(model: "Model", members: Sequence[Signed], profiles: Sequence[Profile], k: int = 2) -> str:
    """Return "heard -> said": the k words that the members are attributed to most, and the k that they raise most."""
    decode = model.tokenizer.decode
    said = vocabulary_effects(model, members).mean(0).topk(k).indices.tolist()
    heard = " ".join(decode([token]).strip() for token in _heard(members, profiles, k))
    return f"{heard} -> {' '.join(decode([token]).strip() for token in said)}"


def _heard(members: Sequence[Signed], profiles: Sequence[Profile], k: int) -> list[int]:
    """Return the tokens of most absolute attribution to the members, a context's first token left aside."""
    wanted, masses = set(members), Counter[int]()
    for one in profiles:
        rows = [row for row, neuron in enumerate(one.neurons) if neuron in wanted]
        if rows:
            mass_T = one.attribution_nT[rows].abs().sum(0).tolist()
            for token, mass in list(zip(one.token_ids, mass_T, strict=True))[1:]:
                masses[token] += mass
    return [token for token, _ in masses.most_common(k)]
