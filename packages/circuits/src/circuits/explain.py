"""Descriptions by a language model, scored on contexts that it did not see (digest 1.9).

Through any `shared.generation.Generator` (a Hugging Face model, vLLM, a server):

1. explain   the explainer sees a neuron's strongest training contexts, the tokens at which it fires marked, and what it
             writes to the vocabulary; it answers with one phrase.
2. simulate  the judge sees the phrase and a held-out text, unmarked, and answers yes or no: does the neuron fire here?
3. score     AUROC of the answers against whether the neuron fires (half of its strongest held-out activation, or more).
             Half is chance; the same phrase scored on another neuron's contexts is the control to look at.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from circuits.describe import Context
from shared.errors import UserError
from shared.generation import Request, Sampling
from shared.stats import auroc
from shared.tokens import Message

if TYPE_CHECKING:
    from shared.generation import Generator

EXPLAIN = (
    "A neuron of a language model fires at the tokens between << and >> in these texts:\n\n{contexts}\n\n"
    "{words}In one short phrase, what does it fire at?"
)
JUDGE = (
    'A neuron of a language model fires at: "{phrase}". Does it fire anywhere in this text?\n\n{text}\n\n'
    "Answer yes or no."
)


def explain(
    generator: "Generator",
    contexts: Sequence[Sequence[Context]],
    words: Sequence[str] = (),
    max_tokens: int = 40,
) -> list[str]:
    """Return one phrase a neuron from its strongest contexts, and from what it writes where that is given."""
    if words and len(words) != len(contexts):
        raise UserError(f"{len(words)} lines of words for {len(contexts)} neurons")
    lines = [f"It {line}.\n" for line in words] or [""] * len(contexts)
    requests = [
        _ask(EXPLAIN.format(contexts="\n".join(f"- {one.marked()}" for one in some), words=line))
        for some, line in zip(contexts, lines, strict=True)
    ]
    answers = generator.generate(requests, Sampling(max_tokens=max_tokens))
    return [answer[0].text.strip().splitlines()[0] if answer[0].text.strip() else "" for answer in answers]


def simulate(generator: "Generator", phrase: str, texts: Sequence[str]) -> list[float]:
    """Return 1 for each text in which the judge says that a neuron of this description fires, else 0."""
    requests = [_ask(JUDGE.format(phrase=phrase, text=text)) for text in texts]
    return [
        1.0 if answer[0].text.strip().lower().startswith("yes") else 0.0
        for answer in generator.generate(requests, Sampling(max_tokens=3))
    ]


def score(generator: "Generator", phrase: str, contexts: Sequence[Context], share: float = 0.5) -> float:
    """Return the AUROC of a description on held-out contexts; UserError where all fire or none does."""
    peak = max((one.peak for one in contexts), default=0.0)
    fires = [one.peak > 0 and one.peak >= share * peak for one in contexts]
    if len(set(fires)) < 2:
        raise UserError("held-out contexts need some in which the neuron fires and some in which it does not")
    guesses = simulate(generator, phrase, ["".join(one.tokens) for one in contexts])
    return float(auroc(np.array(guesses), np.array(fires)))


def _ask(text: str) -> Request:
    return Request([Message(role="user", content=text)])
