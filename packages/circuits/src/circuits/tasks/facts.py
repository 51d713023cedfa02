"""Capitals in two steps (city, state, capital), and antonyms across languages (the paper's case studies).

Both use the wordings of the embedded model's world, which are the paper's: "What is the capital of the state
containing Dallas? Answer:". The counterfactual asks the same about another city, or about another word of the same
language. No city is in both parts, and no word that is asked for in one language. The paper's further languages (ru,
zh, hi, ar; its three pairs) are offered too: what a tokenizer has not as one token is left out.
"""

import random
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from circuits.tasks.items import Item, Task
from shared.tinyworld.facts import ANTONYMS, CAPITALS, CITIES
from shared.tinyworld.tasks import ANTONYM_WORDINGS, ASKED_CITIES, TWO_HOP_WORDINGS, Pair


def _capitals(part: str, rng: random.Random) -> Iterator[Item]:
    cities = [city for city in ASKED_CITIES if " " not in CAPITALS[CITIES[city]]]
    while True:
        wording = rng.choice(TWO_HOP_WORDINGS[:2])
        city, other = rng.sample(cities, 2)
        if CITIES[city] != CITIES[other]:
            yield capital_item(wording, city, other)


def capital_item(wording: str, city: str, other: str) -> Item:
    """Return the two-step question about one city, with another city's as its counterfactual."""
    answer, wrong = CAPITALS[CITIES[city]], CAPITALS[CITIES[other]]
    pair = Pair(wording.format(city), wording.format(other), f" {answer}", f" {wrong}", "capitals")
    labels = {"city": city, "state": CITIES[city], "capital": answer}
    return Item((pair,), (city, other), labels, "Answer:" if wording.endswith("Answer:") else "")


class Language(NamedTuple):
    """Opposites of one language in the order of CONCEPTS, how they are asked, and what stands before an answer."""

    pairs: tuple[tuple[str, str], ...]
    wordings: tuple[str, ...]
    space: str = " "


CONCEPTS = ANTONYMS["en"]  # the n-th pair of every language is a translation of the n-th English one
LANGUAGES: Mapping[str, Language] = {
    **{language: Language(pairs, ANTONYM_WORDINGS[language]) for language, pairs in ANTONYMS.items()},
    "ru": Language(
        (
            (
                "\u0431\u043e\u043b\u044c\u0448\u043e\u0439",
                "\u043c\u0430\u043b\u0435\u043d\u044c\u043a\u0438\u0439",
            ),
            (
                "\u0431\u044b\u0441\u0442\u0440\u044b\u0439",
                "\u043c\u0435\u0434\u043b\u0435\u043d\u043d\u044b\u0439",
            ),
            (
                "\u0433\u043e\u0440\u044f\u0447\u0438\u0439",
                "\u0445\u043e\u043b\u043e\u0434\u043d\u044b\u0439",
            ),
        ),
        (
            "\u041a\u0430\u043a\u043e\u0435 "
            "\u0441\u043b\u043e\u0432\u043e "
            "\u043f\u0440\u043e\u0442\u0438\u0432\u043e\u043f\u043e\u043b\u043e\u0436\u043d\u043e "
            "\u0441\u043b\u043e\u0432\u0443 {}? \u041e\u0442\u0432\u0435\u0442:",
        ),
    ),
    "zh": Language(
        (
            ("\u5927", "\u5c0f"),
            ("\u5feb", "\u6162"),
            ("\u70ed", "\u51b7"),
        ),
        ("{}\u7684\u53cd\u4e49\u8bcd\u662f\u4ec0\u4e48\uff1f\u7b54\u6848\uff1a",),
        space="",
    ),
    "hi": Language(
        (
            ("\u092c\u0921\u093c\u093e", "\u091b\u094b\u091f\u093e"),
            ("\u0924\u0947\u091c", "\u0927\u0940\u092e\u093e"),
            ("\u0917\u0930\u094d\u092e", "\u0920\u0902\u0921\u093e"),
        ),
        (
            "{} \u0915\u093e \u0935\u093f\u092a\u0930\u0940\u0924 "
            "\u0936\u092c\u094d\u0926 \u0915\u094d\u092f\u093e \u0939\u0948? \u0909\u0924\u094d\u0924\u0930:",
        ),
    ),
    "ar": Language(
        (
            ("\u0643\u0628\u064a\u0631", "\u0635\u063a\u064a\u0631"),
            ("\u0633\u0631\u064a\u0639", "\u0628\u0637\u064a\u0621"),
            ("\u0633\u0627\u062e\u0646", "\u0628\u0627\u0631\u062f"),
        ),
        (
            "\u0645\u0627 \u0639\u0643\u0633 \u0643\u0644\u0645\u0629 {}\u061f \u0627\u0644\u062c\u0648\u0627\u0628:",
        ),
    ),
}


def _antonyms(part: str, rng: random.Random) -> Iterator[Item]:
    names = list(LANGUAGES)
    while True:
        language = rng.choice(names)
        pairs, wordings, space = LANGUAGES[language]
        (index, clean), (_, other) = rng.sample(list(enumerate(pairs)), 2)
        side, other_side, wording = rng.randrange(2), rng.randrange(2), rng.choice(wordings)
        asked, counter = clean[side], other[other_side]
        answers = (space + clean[1 - side], space + other[1 - other_side])
        pair = Pair(wording.format(asked), wording.format(counter), *answers, "antonyms")
        labels = {
            "language": language,
            "axis": "/".join(CONCEPTS[index]),
            "concept": CONCEPTS[index][side],
        }
        yield Item((pair,), (f"{language} {asked}",), labels, wording.rpartition("{}")[2].rpartition(" ")[2])


TASKS = {"capitals": Task("capitals", _capitals), "antonyms": Task("antonyms", _antonyms)}
