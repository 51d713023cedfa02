"""The rivals that train nothing: a user's preferences stated in the prompt, or shown by the user's own chats.

And how answers are judged: which of the user's preferences a greedy answer keeps (`shared.tinyworld.users.kept`).
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

from preft.quality.arms import Trained
from preft.quality.people import Person
from shared.tinyworld.users import Preferences, kept
from shared.tokens import Message, encode_chat


def stated(preferences: Preferences) -> str:
    """The preferences in words, as a user would write them in front of a question."""
    drink = f'Say "{preferences.drink}", not another word for it.'
    length = "Answer in full." if preferences.detail == "full" else "Be brief."
    return (
        f'Begin with "{preferences.greeting}" and end with "{preferences.sign_off}" '
        f"Use {preferences.units} units. {drink} {length}"
    )


def instructed(person: Person) -> Person:
    """The person with the preferences stated in the first message of every held-out chat."""
    assert person.preferences is not None
    words = stated(person.preferences)
    chats = [
        [Message(role=first["role"], content=f"{words} {first['content']}"), *rest]
        for first, *rest in person.heldout
    ]
    return replace(person, heldout=chats)


def answer_shares(
    trained: Trained, person: Person, asked: Person, shown: Sequence[Message], count: int, max_tokens: int
) -> dict[str, float]:
    """Share of greedy answers to held-out questions that keep each preference, and that keep them `all`."""
    assert person.preferences is not None
    model = trained.model
    prompts = [
        encode_chat(model.tokenizer, [*shown, *chat[:-1]], add_generation_prompt=True).ids
        for chat in person.heldout[:count]
    ]
    answers = trained.answers(prompts, max_tokens)
    stops = set(model.eos_token_ids)
    judged = []
    for tokens, chat in zip(answers, asked.heldout, strict=False):
        text = model.tokenizer.decode([token for token in tokens if token not in stops])
        judged.append(kept(text, chat[0]["content"], person.preferences)._asdict())
    shares = {name: mean(float(one[name]) for one in judged) for name in judged[0]}
    return shares | {"all": mean(float(all(one.values())) for one in judged)}
