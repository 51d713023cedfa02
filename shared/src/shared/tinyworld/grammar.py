"""Grammar of the world: nouns, verbs and the sentences built from them, with their agreement held out by combination.

A sentence is held out when the hash of its (noun, distractor, verb) lemmas falls in the test share: the words
are all known, their combination is not. The four agreement kinds follow Marks et al. (arXiv 2403.19647).
"""

import hashlib
import random
from typing import NamedTuple

# (singular, plural)
NOUNS: tuple[tuple[str, str], ...] = tuple(
    (noun, noun + "s")
    for noun in (
        *(
            "uncle",
            "dog",
            "teacher",
            "doctor",
            "farmer",
            "king",
            "queen",
            "sister",
            "brother",
            "friend",
            "girl",
            "boy",
        ),
        *(
            "cat",
            "bird",
            "horse",
            "artist",
            "painter",
            "singer",
            "driver",
            "pilot",
            "guard",
            "lawyer",
            "actor",
            "cook",
        ),
        *(
            "poet",
            "author",
            "student",
            "manager",
            "neighbor",
            "visitor",
            "sailor",
            "soldier",
            "nurse",
            "baker",
            "judge",
        ),
        *("chef", "cousin", "athlete", "dancer", "writer"),
    )
)
# (singular form, plural form, what may follow)
VERBS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("is", "are", ("happy", "tired", "very kind", "at home", "in the garden")),
    ("was", "were", ("happy", "late", "very quiet", "at the market", "in the park")),
    ("has", "have", ("a red hat", "a small boat", "a new book", "a good idea", "some bread")),
    ("does", "do", ("the work", "the cooking", "a good job")),
    ("goes", "go", ("home", "to the market", "to the park", "to school")),
    ("runs", "run", ("to the park", "very fast", "in the garden")),
    ("walks", "walk", ("to the market", "to school", "in the park")),
    ("sings", "sing", ("a song", "in the garden", "very well")),
    ("reads", "read", ("a book", "a letter", "in the park")),
    ("writes", "write", ("a letter", "a song", "a story")),
    ("eats", "eat", ("some bread", "an apple", "at home")),
    ("sleeps", "sleep", ("at home", "in the garden", "very well")),
    ("waits", "wait", ("at the market", "at home", "in the park")),
    ("laughs", "laugh", ("in the garden", "very loudly")),
    ("plays", "play", ("in the park", "a game", "at school")),
    ("works", "work", ("at school", "at the market", "very hard")),
    ("dances", "dance", ("in the park", "very well")),
    ("swims", "swim", ("in the lake", "very fast")),
    ("smiles", "smile", ("at home", "in the park")),
    ("travels", "travel", ("to the lake", "to the market")),
)
# transitive verbs of relative clauses: (singular form, plural form)
CLAUSE_VERBS: tuple[tuple[str, str], ...] = tuple(
    (verb + "s", verb)
    for verb in ("like", "know", "see", "help", "love", "admire", "visit", "thank", "trust", "follow")
)
PREPOSITIONS = ("behind", "near", "beside", "with", "above", "below", "before", "opposite")
AGREEMENT = ("simple", "nounpp", "rc", "within_rc")
TEST_SHARE = 0.15


class Sentence(NamedTuple):
    """A sentence up to its verb (`prefix`), the verb in both numbers, and the words that may follow the right form."""

    prefix: str
    flipped: str  # the same prefix with the controlling noun in the other number
    right: str  # leading space; agrees with `prefix`
    wrong: str  # leading space; agrees with `flipped`
    tail: str
    kind: str


def unit_hash(*parts: str) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(*parts: str) -> str:
    """The split, train or test, of a combination."""
    return "test" if unit_hash("split", *parts) < TEST_SHARE else "train"


def _inflect(lemma: tuple[str, str], plural: bool) -> str:
    return lemma[1] if plural else lemma[0]


def agreement_sentence(kind: str, split: str, rng: random.Random) -> Sentence:
    """One agreement sentence of a kind, its word combination drawn from the split."""
    if kind not in AGREEMENT:
        raise ValueError(f"agreement kind {kind!r} is unknown; choose from {', '.join(AGREEMENT)}")
    while True:
        first, second = rng.sample(NOUNS, 2)
        verb, clause = rng.choice(VERBS), rng.choice(CLAUSE_VERBS)
        if _belongs(kind, first[0], second[0], verb[0], clause[0], split):
            break
    plural, other = rng.random() < 0.5, rng.random() < 0.5
    preposition = rng.choice(PREPOSITIONS)

    def prefix(first_plural: bool, second_plural: bool) -> str:
        head, distractor = f"The {_inflect(first, first_plural)}", f"the {_inflect(second, second_plural)}"
        return {
            "simple": head,
            "nounpp": f"{head} {preposition} {distractor}",
            "rc": f"{head} that {distractor} {_inflect(clause, second_plural)}",
            "within_rc": f"{head} that {distractor}",
        }[kind]

    controlled: tuple[str, str]
    if kind == "within_rc":
        clean, flipped, controlled = prefix(other, plural), prefix(other, not plural), clause
        tail = f" {_inflect(verb[:2], other)} {rng.choice(verb[2])}."
    else:
        clean, flipped, controlled = prefix(plural, other), prefix(not plural, other), verb[:2]
        tail = f" {rng.choice(verb[2])}."
    right, wrong = _inflect(controlled, plural), _inflect(controlled, not plural)
    return Sentence(clean, flipped, " " + right, " " + wrong, tail, kind)


def _belongs(kind: str, first: str, second: str, verb: str, clause: str, split: str) -> bool:
    """Whether a combination is of the split; a training sentence holds no held-out combination of its kind."""
    keys = {
        "simple": ("simple", first, verb),
        "nounpp": ("nounpp", first, second, verb),
        "rc": ("rc", first, second, verb),
        "within_rc": ("within_rc", first, second, clause),
    }
    if split == "test":
        return split_of(*keys[kind]) == "test"
    held = ("rc", "within_rc") if kind in ("rc", "within_rc") else (kind,)
    return all(split_of(*keys[k]) == "train" for k in held)
