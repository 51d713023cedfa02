"""Data of the capitals study: three questions about the same states, cities held out within every state."""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from circuits.study import Study, make_study
from circuits.tasks import Example, TaskError
from circuits.tasks.draw import fitted_length
from shared.tinyworld.facts import CAPITALS, CITIES
from shared.tinyworld.tasks import ASKED_CITIES, CAPITAL_WORDINGS, CITY_WORDINGS, TWO_HOP_WORDINGS, Pair

if TYPE_CHECKING:
    from shared.models import Model


class Question(NamedTuple):
    """What is asked: wordings for training and for test, whether about a city or its state, and what is answered."""

    train: str
    test: str
    about_city: bool
    answer_state: bool


QUESTIONS: Mapping[str, Question] = {
    "state": Question(CITY_WORDINGS[2], CITY_WORDINGS[2], about_city=True, answer_state=True),
    "capital": Question(CAPITAL_WORDINGS[2], CAPITAL_WORDINGS[0], about_city=False, answer_state=False),
    "both": Question(TWO_HOP_WORDINGS[0], TWO_HOP_WORDINGS[0], about_city=True, answer_state=False),
}


@dataclass(frozen=True)
class StepData:
    """The states that can be studied, their cities by part, and one study for each question."""

    states: tuple[str, ...]
    cities: Mapping[str, Mapping[str, Sequence[str]]]
    studies: Mapping[str, Study]


def make_step_data(model: "Model", seed: int = 0, at_least: int = 3) -> StepData:
    """Return the three questions for all states with enough cities that fit the tokenizer; one city each is held out.

    TaskError where fewer than four states are left.
    """
    rng = random.Random(seed)
    cities = _usable_cities(model)
    by_state: dict[str, list[str]] = defaultdict(list)
    for city in cities:
        by_state[CITIES[city]].append(city)
    states = tuple(sorted(state for state, names in by_state.items() if len(names) >= at_least))
    if len(states) < 4:
        raise TaskError(
            f"{len(states)} states have {at_least} cities whose names, state and capital fit this tokenizer; the study "
            "needs four: use a model whose tokenizer has these words"
        )
    parts: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for state in states:
        names = rng.sample(by_state[state], len(by_state[state]))
        parts["test"][state], parts["train"][state] = names[:1], names[1:]
    studies = {}
    for name, question in QUESTIONS.items():
        train, test = (_examples(question, parts[part], part, rng) for part in ("train", "test"))
        studies[name] = make_study(model, name, train, test)
    return StepData(states, parts, studies)


def _usable_cities(model: "Model") -> list[str]:
    """Return the cities that fit in all three questions, of the most frequent length in tokens."""
    lengths: dict[str, tuple[int, ...]] = {}
    for city in ASKED_CITIES:
        found = [_length(model, question, wording, city) for question in QUESTIONS.values()
                 for wording in (question.train, question.test)]  # fmt: skip
        if None not in found:
            lengths[city] = tuple(n for n in found if n is not None)
    if not lengths:
        return []
    common = Counter(lengths.values()).most_common(1)[0][0]
    return [city for city, found in lengths.items() if found == common]


def _length(model: "Model", question: Question, wording: str, city: str) -> int | None:
    prompt, answer = _ask(question, wording, city)
    return fitted_length(model.tokenizer, prompt, answer)


def _ask(question: Question, wording: str, city: str) -> tuple[str, str]:
    state = CITIES[city]
    prompt = wording.format(city if question.about_city else state)
    return prompt, f" {state if question.answer_state else CAPITALS[state]}"


def _examples(
    question: Question, cities: Mapping[str, Sequence[str]], part: str, rng: random.Random
) -> list[Example]:
    """Return one example for each city of a part, its counterfactual a city of another state in the same part."""
    wording, states = getattr(question, part), list(cities)
    examples: dict[Pair, Example] = {}
    for state, names in cities.items():
        for city in names:
            other_state = rng.choice([one for one in states if one != state])
            other = rng.choice(list(cities[other_state]))
            (clean, right), (corrupt, wrong) = (_ask(question, wording, name) for name in (city, other))
            pair = Pair(clean, corrupt, right, wrong, "steps")
            examples[pair] = Example(pair, (city,), {"state": state, "other state": other_state})
    return list(examples.values())
