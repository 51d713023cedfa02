"""Users with stable personal preferences: the personalisation data for adapters.

A response carries the content that the base model knows and a style that it cannot know: greeting, level of
detail, units, a word of choice and a sign-off. In its own training the base model sees every style equally often,
so only an adapter that has seen a user's rows can tell which one this user wants.
"""

import random
from typing import NamedTuple

from shared.tinyworld.facts import CAPITALS, CITIES
from shared.tinyworld.grammar import split_of
from shared.tinyworld.stories import BOYS, GIRLS

GREETINGS = ("Hello!", "Good day.", "Hey there!", "Dear friend,")
SIGN_OFFS = ("Cheers!", "Best wishes.", "Take care.", "Yours truly.", "See you soon.", "Bye now.")
DRINKS = ("soda", "pop", "coke")
UNITS = ("metric", "imperial")
DETAILS = ("brief", "full")
TEMPERATURES = ((0, 32), (10, 50), (20, 68), (30, 86))  # Celsius, Fahrenheit
WALKS = ((3, 2), (5, 3), (8, 5), (16, 10))  # kilometers, miles
ADVERBS = ("", "today ", "now ", "please ")
FOODS = ("bread", "soup", "pizza", "rice", "fish", "cake")


class Preferences(NamedTuple):
    """What one user likes: 4 x 6 x 3 x 2 x 2 = 288 combinations."""

    greeting: str
    sign_off: str
    drink: str
    units: str
    detail: str


class User(NamedTuple):
    """A user; `rows` gives chats whose responses follow the preferences."""

    name: str
    preferences: Preferences

    def rows(self, split: str, n: int | None = None, seed: int = 0) -> list[list[dict[str, str]]]:
        """Seeded instruction-response chats of a split ("train" or "test"); instructions of the splits never meet."""
        pool = [i for i in INSTRUCTIONS if split_of("instruction", i.prompt) == split]
        chosen = random.Random(f"{self.name}-{split}-{seed}").sample(pool, len(pool))[:n]
        return [chat(instruction, self.preferences) for instruction in chosen]


class Instruction(NamedTuple):
    """A request with the parts that its answer is made of."""

    prompt: str
    answers: dict[str, str]  # by unit or drink where it depends on one, else under ""
    more: str  # the extra sentence of a full answer


def _instructions() -> list[Instruction]:
    found = []
    for state, capital in CAPITALS.items():
        found.append(
            Instruction(
                f"Tell me the capital of {state}.",
                {"": f"The capital of {state} is {capital}."},
                f"{capital} is a city in the state of {state}.",
            )
        )
    for city, state in CITIES.items():
        found.append(
            Instruction(
                f"Where is {city}?",
                {"": f"{city} is a city in the state of {state}."},
                f"The capital of {state} is {CAPITALS[state]}.",
            )
        )
    cities = sorted(CITIES)[::4]
    for i, city in enumerate(cities):
        celsius, fahrenheit = TEMPERATURES[i % 4]
        mood = ("cold", "cool", "warm", "hot")[i % 4]
        both = {
            "metric": f"It is {mood}, about {celsius} degrees Celsius.",
            "imperial": f"It is {mood}, about {fahrenheit} degrees Fahrenheit.",
        }
        found += [
            Instruction(
                f"How {mood} is it {adverb}in {city}?", both, f"{city} is in the state of {CITIES[city]}."
            )
            for adverb in ADVERBS[:3]
        ]
    for i, name in enumerate(GIRLS + BOYS):
        kilometers, miles = WALKS[i % 4]
        long = ("short", "nice", "long", "very long")[i % 4]
        both = {"metric": f"It is {kilometers} kilometers.", "imperial": f"It is {miles} miles."}
        found += [
            Instruction(
                f"{name} takes a {long} walk {adverb}to the {place}. How far is it?",
                both,
                f"It is a {long} walk for {name}.",
            )
            for adverb in ADVERBS[:3]
            for place in ("lake", "park")
        ]
    for food in FOODS:
        for name in GIRLS + BOYS:
            drinks = {drink: f"Have a {drink} with the {food}." for drink in DRINKS}
            found.append(
                Instruction(
                    f"{name} has {food}. What should {name} drink?", drinks, f"A {{}} is good with {food}."
                )
            )
    return found


INSTRUCTIONS = _instructions()
BY_PROMPT = {instruction.prompt: instruction for instruction in INSTRUCTIONS}


class Kept(NamedTuple):
    """Which of a user's preferences a response keeps; `answer`: the right content, in the user's units and words."""

    greeting: bool
    sign_off: bool
    detail: bool
    answer: bool


def kept(text: str, prompt: str, preferences: Preferences) -> Kept:
    """What a response to the prompt of one of the `INSTRUCTIONS` keeps; KeyError for another prompt."""
    instruction, text = BY_PROMPT[prompt], text.strip()
    full = any(instruction.more.format(drink) in text for drink in DRINKS)
    return Kept(
        text.startswith(preferences.greeting),
        text.endswith(preferences.sign_off),
        full == (preferences.detail == "full"),
        wanted_answer(instruction, preferences) in text,
    )


def wanted_answer(instruction: Instruction, preferences: Preferences) -> str:
    """The sentence that answers an instruction in the user's units and words."""
    answers = instruction.answers
    return answers.get("") or answers.get(preferences.units) or answers[preferences.drink]


def chat(instruction: Instruction, preferences: Preferences) -> list[dict[str, str]]:
    """The two messages of an instruction answered in a user's style."""
    parts = [preferences.greeting, wanted_answer(instruction, preferences)]
    if preferences.detail == "full":
        parts.append(instruction.more.format(preferences.drink))
    parts.append(preferences.sign_off)
    return [
        {"role": "user", "content": instruction.prompt},
        {"role": "assistant", "content": " ".join(parts)},
    ]


def random_preferences(rng: random.Random) -> Preferences:
    """One of the 288 combinations."""
    return Preferences(*(rng.choice(choices) for choices in (GREETINGS, SIGN_OFFS, DRINKS, UNITS, DETAILS)))


def make_users(n: int, seed: int = 0) -> list[User]:
    """`n` named users with preferences drawn from a seed."""
    rng = random.Random(f"users-{seed}")
    return [User(f"user{i:03d}", random_preferences(rng)) for i in range(n)]
