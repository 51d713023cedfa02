"""Plain sentences and short stories of the world, so that its text is not only templates of tasks."""

import random

from shared.tinyworld.grammar import agreement_sentence

GIRLS = ("Lily", "Mia", "Anna", "Sara", "Lucy", "Emma", "Nora", "Ruth")
BOYS = ("Tom", "Tim", "Ben", "Max", "Sam", "Jack", "Paul", "Hugo")
THINGS = ("ball", "kite", "boat", "book", "drum", "lamp", "hat", "box", "cup", "coat", "ring", "map")
COLORS = ("red", "blue", "green", "yellow", "white", "black")
PLACES = ("garden", "park", "market", "lake", "school", "forest", "kitchen", "station")
MOODS = ("happy", "sad", "tired", "proud", "calm", "angry")
WEATHER = ("sunny", "cold", "windy", "warm", "rainy")


def story(rng: random.Random) -> str:
    """A story of three to six sentences about a girl or a boy, a thing and a place; pronouns follow the name."""
    girl = rng.random() < 0.5
    name, friend = rng.choice(GIRLS if girl else BOYS), rng.choice(BOYS if girl else GIRLS)
    he, his, him = ("She", "her", "her") if girl else ("He", "his", "him")
    color, thing, place, mood = rng.choice(COLORS), rng.choice(THINGS), rng.choice(PLACES), rng.choice(MOODS)
    middle = [
        f"{he} wanted to play with {his} {thing}.",
        f"It was a {rng.choice(WEATHER)} day in the {place}.",
        f"{name} lost the {thing} near the {rng.choice(PLACES)}.",
        f"{friend} saw {name} and said hello.",
        f"{friend} gave {him} a {rng.choice(COLORS)} {rng.choice(THINGS)}.",
        f"{he} looked for the {thing} in the {rng.choice(PLACES)}.",
        f"They walked home with the {color} {thing}.",
    ]
    chosen = sorted(rng.sample(range(len(middle)), rng.randint(1, 4)))
    opening = (
        rng.choice(("Once there was a girl named", "One day a girl named"))
        if girl
        else rng.choice(("Once there was a boy named", "One day a boy named"))
    )
    first = f"{opening} {name}" + (
        f" who had a {color} {thing}." if opening.startswith("Once") else f" found a {color} {thing}."
    )
    return " ".join([first, *(middle[i] for i in chosen), f"{name} was {mood}."])


def plain_text(rng: random.Random) -> str:
    """A story, or one to three plain sentences whose combinations are of the training split."""
    if rng.random() < 0.6:
        return story(rng)
    sentences = (agreement_sentence("simple", "train", rng) for _ in range(rng.randint(1, 3)))
    return " ".join(s.prefix + s.right + s.tail for s in sentences)
