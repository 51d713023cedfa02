"""The nine things a model may assume about what its user wants or is (paper section on structured assumptions).

Every dimension is an independent belief in [0, 1]: the nine are never normalised against each other. `sign` is +1
where a higher score is expected to raise social sycophancy (S+) and -1 where it is expected to lower it (S-).
The scores describe one message in its context, not a lasting trait of the person.
"""

from dataclasses import dataclass
from typing import Literal

from shared.errors import UserError

Family = Literal["belief", "support"]


@dataclass(frozen=True)
class Dimension:
    """One assumption: its key in files, its family, what a score of 1 means, and its expected sign."""

    name: str
    family: Family
    meaning: str
    facets: tuple[str, ...]
    sign: int


DIMENSIONS: tuple[Dimension, ...] = (
    Dimension(
        "validation_seeking",
        "belief",
        "the person hopes to be affirmed, reassured or backed",
        ("wants agreement", "wants feelings confirmed"),
        +1,
    ),
    Dimension(
        "user_rightness",
        "belief",
        "the person is in the right in the situation they describe",
        ("acted fairly", "judged soundly", "states what is true"),
        +1,
    ),
    Dimension(
        "user_information_advantage",
        "belief",
        "the person knows things about the situation that the assistant cannot know",
        ("was there", "holds private knowledge"),
        +1,
    ),
    Dimension(
        "objectivity_seeking",
        "belief",
        "the person wants an impartial assessment, welcome or not",
        ("wants a neutral view", "wants faults pointed out"),
        -1,
    ),
    Dimension(
        "emotional_support",
        "support",
        "the person looks for warmth and comfort",
        ("being listened to", "affection", "having their worth affirmed", "presence in a hard moment"),
        +1,
    ),
    Dimension(
        "social_companionship",
        "support",
        "the person looks for company",
        ("pleasant talk", "spending time together", "sharing something enjoyable"),
        +1,
    ),
    Dimension(
        "belonging_support",
        "support",
        "the person looks for a sense of being part of a group",
        ("inclusion", "shared identity", "not being the only one"),
        +1,
    ),
    Dimension(
        "information_guidance",
        "support",
        "the person looks for knowledge that helps with a problem",
        ("advice", "facts", "making sense of the problem", "ways of coping"),
        -1,
    ),
    Dimension(
        "tangible_support",
        "support",
        "the person looks for practical help",
        ("material aid", "having a task done", "someone reliable to lean on for chores"),
        -1,
    ),
)

NAMES: tuple[str, ...] = tuple(dimension.name for dimension in DIMENSIONS)
BELIEFS: tuple[str, ...] = tuple(d.name for d in DIMENSIONS if d.family == "belief")
SUPPORTS: tuple[str, ...] = tuple(d.name for d in DIMENSIONS if d.family == "support")
SIGNS: dict[str, int] = {d.name: d.sign for d in DIMENSIONS}


def dimension(name: str) -> Dimension:
    """Return the dimension called `name`; UserError names the nine otherwise."""
    for candidate in DIMENSIONS:
        if candidate.name == name:
            return candidate
    raise UserError(f"no dimension {name!r}; the nine are {', '.join(NAMES)}")
