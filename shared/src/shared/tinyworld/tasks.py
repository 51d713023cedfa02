"""Questions and contrast pairs of the world, with their held-out splits.

Facts are held out by wording: a (fact, wording) combination is of the test split when its hash says so, and such
a combination is never trained on. The two-hop question ("the capital of the state containing CITY") is asked in
training for `ASKED_CITIES` only; what the model answers for the others is reported without a floor. Additions
are held out by pair.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from shared.tinyworld.facts import ANTONYMS, CAPITALS, CITIES
from shared.tinyworld.grammar import AGREEMENT as AGREEMENT
from shared.tinyworld.grammar import agreement_sentence, split_of, unit_hash

CITY_WORDINGS = (
    "Fact: {} is a city in the state of",
    "The city of {} is in the state of",
    "Question: Which state contains {}? Answer:",
    "What is the state of {}? Answer:",
    "The state containing {} is",
)
CAPITAL_WORDINGS = (
    "The capital of {} is",
    "Question: What is the capital of {}? Answer:",
    "What is the capital of the state of {}? Answer:",
    "The state of {} has the capital",
    "Fact: {} has the capital",
)
TWO_HOP_WORDINGS = (
    "What is the capital of the state containing {}? Answer:",
    "The capital of the state containing {} is",
    "Question: The city is {}. What is the capital of its state? Answer:",
    "Fact: the capital of the state containing {} is",
    "The state containing {} has the capital",
)
ADDITION_WORDINGS = ("{} + {} =", "What is {} + {}? Answer:")
ANTONYM_WORDINGS: dict[str, tuple[str, ...]] = {
    "en": (
        "The opposite of {} is",
        "What is the opposite of {}? Answer:",
        "Not {} but",
        "Opposites: {} and",
    ),
    "fr": (
        "Le contraire de {} est",
        "Quel est le contraire de {}? R\u00e9ponse:",
        "Pas {} mais",
        "Contraires: {} et",
    ),
    "de": (
        "Das Gegenteil von {} ist",
        "Was ist das Gegenteil von {}? Antwort:",
        "Nicht {} sondern",
        "Gegenteile: {} und",
    ),
    "es": (
        "Lo contrario de {} es",
        "Cu\u00e1l es el contrario de {}? Respuesta:",
        "No {} sino",
        "Contrarios: {} y",
    ),
    "it": (
        "Il contrario di {} \u00e8",
        "Qual \u00e8 il contrario di {}? Risposta:",
        "Non {} ma",
        "Contrari: {} e",
    ),
}
ASKED_CITIES = tuple(city for city in CITIES if unit_hash("asked", city) < 0.7)
UNASKED_CITIES = tuple(city for city in CITIES if city not in set(ASKED_CITIES))


class Question(NamedTuple):
    """A prompt and its answer (leading space), `prompt + answer` being the text that is trained on."""

    prompt: str
    answer: str
    kind: str


class Pair(NamedTuple):
    """A clean prompt, its counterfactual, and the single-token answers (leading space) right for each."""

    clean: str
    corrupt: str
    answer: str
    wrong: str
    kind: str


def _sample(pool: list[Question], n: int | None, seed: int) -> list[Question]:
    shuffled = random.Random(seed).sample(pool, len(pool))
    return shuffled if n is None else shuffled[:n]


def _worded(facts: dict[str, str], wordings: tuple[str, ...], kind: str, split: str) -> list[Question]:
    return [
        Question(wording.format(key), " " + value, kind)
        for key, value in facts.items()
        for wording in wordings
        if split_of(kind, key, wording) == split
    ]


def state_questions(split: str, n: int | None = None, seed: int = 0) -> list[Question]:
    """City to state; every question of the split when `n` is None."""
    return _sample(_worded(CITIES, CITY_WORDINGS, "city_state", split), n, seed)


def capital_questions(split: str, n: int | None = None, seed: int = 0) -> list[Question]:
    """State to capital."""
    return _sample(_worded(CAPITALS, CAPITAL_WORDINGS, "state_capital", split), n, seed)


def two_hop_questions(split: str, n: int | None = None, seed: int = 0) -> list[Question]:
    """The capital of the state containing a city; `split` "unasked" gives the cities never asked this question."""
    if split == "unasked":
        answers = {city: CAPITALS[CITIES[city]] for city in UNASKED_CITIES}
        pool = [
            Question(w.format(c), " " + a, "two_hop") for c, a in answers.items() for w in TWO_HOP_WORDINGS
        ]
    else:
        answers = {city: CAPITALS[CITIES[city]] for city in ASKED_CITIES}
        pool = _worded(answers, TWO_HOP_WORDINGS, "two_hop", split)
    return _sample(pool, n, seed)


def addition_questions(split: str, n: int | None = None, seed: int = 0) -> list[Question]:
    """x + y for x, y from 0 to 99, held out by the pair (x, y)."""
    pool = [
        Question(wording.format(x, y), f" {x + y}", "addition")
        for x in range(100)
        for y in range(100)
        if split_of("addition", str(x), str(y)) == split
        for wording in ADDITION_WORDINGS
    ]
    return _sample(pool, n, seed)


def antonym_questions(split: str, n: int | None = None, seed: int = 0) -> list[Question]:
    """Opposites in five languages, both directions, held out by (word, wording)."""
    pool = []
    for language, pairs in ANTONYMS.items():
        both = dict(pairs) | {b: a for a, b in pairs}
        pool += _worded(both, ANTONYM_WORDINGS[language], f"antonym_{language}", split)
    return _sample(pool, n, seed)


def agreement_pairs(kind: str, split: str, n: int, seed: int = 0) -> list[Pair]:
    """Minimal pairs of one agreement kind (`grammar.AGREEMENT`): the controlling noun's number is flipped."""
    rng = random.Random(f"{kind}-{split}-{seed}")
    sentences = (agreement_sentence(kind, split, rng) for _ in range(n))
    return [Pair(s.prefix, s.flipped, s.right, s.wrong, kind) for s in sentences]


def capital_pairs(split: str, n: int, seed: int = 0) -> list[Pair]:
    """Two-hop questions in the same wording about two cities whose capitals are one word each."""
    rng = random.Random(f"capitals-{split}-{seed}")
    single = [city for city in ASKED_CITIES if " " not in CAPITALS[CITIES[city]]]
    pairs: list[Pair] = []
    while len(pairs) < n:
        wording = rng.choice(TWO_HOP_WORDINGS[:2])
        city, other = rng.sample(single, 2)
        if CITIES[city] != CITIES[other] and split_of("capital_pair", city, other, wording) == split:
            answer, wrong = CAPITALS[CITIES[city]], CAPITALS[CITIES[other]]
            pairs.append(
                Pair(wording.format(city), wording.format(other), " " + answer, " " + wrong, "capitals")
            )
    return pairs


QUESTIONS: dict[str, Callable[..., list[Question]]] = {
    "city_state": state_questions,
    "state_capital": capital_questions,
    "two_hop": two_hop_questions,
    "addition": addition_questions,
    "antonyms": antonym_questions,
}
