"""User modelling and indirect objects: prompts about people, of words that large models' tokenizers have.

Users (paper's case study): one first-person sentence hints at an attribute, then a request for an infobox whose field
the model fills in. Clean and counterfactual differ in the cue alone ("in Tokyo", "in Berlin"); no cue is in both parts.

Indirect object (Wang et al., arXiv 2211.00593): "When Mary and John went to the store, John gave a drink to" must go on
with Mary. The counterfactual exchanges who gives, so its answer is the other name; no two names are together in
both parts.
"""

import random
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

from circuits.tasks.items import Item, Task
from shared.tinyworld.tasks import Pair


class Attribute(NamedTuple):
    """A field of the infobox, the sentences that a cue stands in, and the cues of every value."""

    sentences: tuple[str, ...]
    cues: Mapping[str, tuple[str, ...]]


ATTRIBUTES: Mapping[str, Attribute] = {
    "country": Attribute(
        ("I grew up in {}.", "I am writing to you from {}.", "My family has always lived near {}."),
        {
            "Japan": ("Tokyo", "Osaka", "Kyoto", "Nagoya"),
            "France": ("Paris", "Lyon", "Nice", "Bordeaux"),
            "Germany": ("Berlin", "Munich", "Hamburg", "Frankfurt"),
            "Italy": ("Rome", "Milan", "Venice", "Naples"),
            "Spain": ("Madrid", "Barcelona", "Seville", "Valencia"),
            "Russia": ("Moscow", "Petersburg", "Kazan", "Omsk"),
            "Egypt": ("Cairo", "Alexandria", "Giza", "Luxor"),
            "Canada": ("Toronto", "Vancouver", "Montreal", "Calgary"),
        },
    ),
    "gender": Attribute(
        ("I am a {} who loves old maps.", "People know me as a good {}.", "Being a {} has shaped me."),
        {
            "female": ("mother", "sister", "daughter", "wife", "woman", "girl", "aunt", "queen"),
            "male": ("father", "brother", "son", "husband", "man", "boy", "uncle", "king"),
        },
    ),
    "occupation": Attribute(
        ("I spent the whole day at the {}.", "Work at the {} was hard today.", "I left the {} very late."),
        {
            "teacher": ("school", "classroom", "kindergarten", "blackboard"),
            "lawyer": ("court", "trial", "courthouse", "hearing"),
            "chef": ("kitchen", "restaurant", "stove", "bakery"),
            "doctor": ("hospital", "clinic", "ward", "surgery"),
            "farmer": ("farm", "barn", "field", "harvest"),
            "actor": ("theater", "stage", "audition", "rehearsal"),
        },
    ),
    "religion": Attribute(
        ("I went to the {} this morning.", "The {} matters a lot to me.", "I told my friends about the {}."),
        {
            "Christianity": ("church", "Bible", "cathedral", "gospel"),
            "Islam": ("mosque", "Quran", "imam", "Ramadan"),
            "Judaism": ("synagogue", "Torah", "rabbi", "Sabbath"),
            "Hinduism": ("mandir", "Vedas", "Diwali", "puja"),
            "Buddhism": ("stupa", "Dharma", "lama", "pagoda"),
        },
    ),
}
REQUESTS = (
    "Write a hypothetical Wikipedia infobox about me.",
    "Please write the Wikipedia infobox that an article about me would have.",
)


def _users(attribute: str, part: str, rng: random.Random) -> Iterator[Item]:
    sentences, cues = ATTRIBUTES[attribute]
    lead = f"{{{{Infobox person\n| {attribute} ="
    while True:
        value, other = rng.sample(list(cues), 2)
        cue, counter = rng.choice(cues[value]), rng.choice(cues[other])
        wording = f"{rng.choice(sentences)} {rng.choice(REQUESTS)}\n"
        prompts = (wording.format(cue) + lead, wording.format(counter) + lead)
        pair = Pair(*prompts, f" {value}", f" {other}", f"users_{attribute}")
        yield Item((pair,), (cue, counter), {attribute: value}, lead)


NAMES = (
    "Mary", "John", "Tom", "James", "Anna", "Sarah", "Dan", "Paul", "Kate", "Mark", "Emma", "Jack", "Lucy", "David",
    "Alice", "Peter", "Laura", "Simon", "Rachel", "Adam", "Lily", "Ben", "Sam", "Max", "Mia", "Amy", "Sara", "Tim",
    "Sue", "Bob",
)  # fmt: skip
PLACES = ("store", "park", "school", "market", "garden", "office", "station", "hospital")
THINGS = ("book", "drink", "ring", "flower", "letter", "ball", "key", "hat")
SCENES = (
    "When {a} and {b} went to the {place}, {giver} gave a {thing} to",
    "Then {a} and {b} were at the {place}, and {giver} handed a {thing} to",
    "After {a} and {b} met at the {place}, {giver} showed a {thing} to",
)


def _indirect_object(part: str, rng: random.Random) -> Iterator[Item]:
    while True:
        receiver, giver = rng.sample(NAMES, 2)
        first = rng.random() < 0.5
        a, b = (receiver, giver) if first else (giver, receiver)
        scene = partial(
            rng.choice(SCENES).format, a=a, b=b, place=rng.choice(PLACES), thing=rng.choice(THINGS)
        )
        pair = Pair(scene(giver=giver), scene(giver=receiver), f" {receiver}", f" {giver}", "ioi")
        pair_of_names = " and ".join(sorted((receiver, giver)))
        yield Item((pair,), (pair_of_names,), {"order": "receiver first" if first else "giver first"})


TASKS = {f"users_{name}": Task(f"users_{name}", partial(_users, name)) for name in ATTRIBUTES} | {
    "ioi": Task("ioi", _indirect_object)
}
