"""Training documents of the world as token ids, with what each token is to be trained on.

Where the world's answer is a draw from a known distribution (scores, reply slots, verdicts), the target is
that distribution, not the draw: the same expected gradient with less noise. Half of the social documents (none for
the model that is only readable) carry a shift `delta` of one latent; their targets follow clip(a + delta), and the
trainer adds the planted direction to the model's residual stream.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from shared.tinyworld import facts, grammar, social, stories, tasks, users

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

World = Literal["whole", "social"]
DELTA = 0.8  # shifts are uniform in [-DELTA, DELTA]


@dataclass
class Document:
    """Token ids, the positions that are trained on, and the social extras."""

    ids: list[int]
    loss_from: int  # tokens from this position on are predicted with loss
    family: str
    soft: dict[int, dict[int, float]] = field(default_factory=dict)  # position -> distribution over token ids
    span: tuple[int, int] | None = None  # the user's message
    counts_9: np.ndarray | None = None
    delta_9: np.ndarray | None = None


class Writer:
    """Writes documents of every family with one tokenizer; all randomness comes from the generators it is given."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", shifted: float = 0.5) -> None:
        self.tokenizer, self.shifted = tokenizer, shifted  # share of social documents with a shift
        self._cache: dict[str, list[int]] = {}
        special = ("<s>", "<|end|>", "<|user|>", "<|assistant|>")
        ids: list[int] = [int(tokenizer.vocab[s]) for s in special]
        self.bos, self.end, self.user, self.assistant = ids
        self.pools = {name: ask("train") for name, ask in tasks.QUESTIONS.items()}
        self.instructions = [
            i for i in users.INSTRUCTIONS if grammar.split_of("instruction", i.prompt) == "train"
        ]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        if text not in self._cache:
            if len(self._cache) > 100_000:
                self._cache.clear()
            self._cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._cache[text]

    # --- plain text ---

    def text(self, rng: random.Random) -> Document:
        """A story or plain sentences; every token is trained on."""
        return Document([self.bos, *self.encode(stories.plain_text(rng)), self.end], 1, "text")

    def agreement(self, rng: random.Random) -> Document:
        """A sentence of one agreement kind."""
        s = grammar.agreement_sentence(rng.choice(grammar.AGREEMENT), "train", rng)
        return Document([self.bos, *self.encode(s.prefix + s.right + s.tail), self.end], 1, "agreement")

    def question(self, rng: random.Random, name: str) -> Document:
        """A question with its answer; the answer is trained on."""
        q = rng.choice(self.pools[name])
        prompt = [self.bos, *self.encode(q.prompt)]
        return Document([*prompt, *self.encode(q.answer + "."), self.end], len(prompt), name)

    # --- chats ---

    def _chat(self, content: list[int], response: list[int], family: str) -> Document:
        prompt = [self.bos, self.user, *content, self.end, self.assistant]
        return Document([*prompt, *response, self.end], len(prompt), family)

    def personal(self, rng: random.Random) -> Document:
        """An instruction answered in a style drawn anew: the base model learns that the style is unknown."""
        row = users.chat(rng.choice(self.instructions), users.random_preferences(rng))
        return self._chat(self.encode(row[0]["content"]), self.encode(row[1]["content"]), "personal")

    def _turn(self, rng: np.random.Generator) -> tuple[social.UserTurn, np.ndarray]:
        delta = np.zeros(len(social.DIMENSIONS))
        if rng.random() < self.shifted:
            delta[rng.integers(len(delta))] = rng.uniform(-DELTA, DELTA)
        return social.sample_turn(rng), delta

    def _social(self, doc: Document, before: int, turn: social.UserTurn, delta: np.ndarray) -> Document:
        start = 2 + before  # after <s> and <|user|>
        doc.span = (start, start + len(self.encode(turn.text)))
        doc.counts_9, doc.delta_9 = turn.counts_9, delta
        return doc

    def elicitation(self, rng: np.random.Generator) -> Document:
        """The instrument and its JSON answer, dimensions in a random order."""
        turn, delta = self._turn(rng)
        order = [social.DIMENSIONS[i] for i in rng.permutation(len(social.DIMENSIONS))]
        head, tail = social.instrument("\0", tuple(order)).split("\0")
        # the closing quote joins the message's full stop in one token
        content = self.encode(head + turn.text + tail)
        table = social.score_probabilities(turn.counts_9, delta)
        response: list[int] = []
        soft = {}
        for i, name in enumerate(order):
            response += self.encode(('{"' if i == 0 else ', "') + name + '":')
            p = table[social.DIMENSIONS.index(name)]
            value = f"{social.GRID[rng.choice(len(p), p=p)]:.2f}"
            for offset, distribution in self._digits(p, value):
                soft[len(response) + offset] = distribution
            response += self.encode(" " + value)
        doc = self._chat(content, [*response, *self.encode("}")], "elicitation")
        doc.soft = {doc.loss_from + at: distribution for at, distribution in soft.items()}
        return self._social(doc, len(self.encode(head)), turn, delta)

    def _digits(self, p: np.ndarray, value: str) -> Iterator[tuple[int, dict[int, float]]]:
        """Target distributions of the digits of a drawn score, each given the digits before it."""
        strings = [f"{g:.2f}" for g in social.GRID]
        for offset, at in ((0, 0), (2, 2), (3, 3)):  # the point at offset 1 is certain
            weights: dict[str, float] = {}
            for q, s in zip(p, strings, strict=True):
                if s[:at] == value[:at]:
                    weights[s[at]] = weights.get(s[at], 0.0) + float(q)
            total = sum(weights.values())
            lead = " " if at == 0 else ""
            yield offset, {self.encode(lead + d)[0]: w / total for d, w in weights.items()}

    def reply(self, rng: np.random.Generator) -> Document:
        """The reply to a message; the first word of each slot has the rule's distribution as its target."""
        turn, delta = self._turn(rng)
        p = social.expected_reply_probabilities(turn.counts_9, delta)
        response: list[int] = []
        soft = {}
        for i, (outcome, high, low) in enumerate(social.SLOTS):
            q = float(p[social.OUTCOMES.index(outcome)])
            forms = [self.encode((" " if i else "") + form.format(turn.topic)) for form in (*high, *low)]
            weights = [q / len(high)] * len(high) + [(1 - q) / len(low)] * len(low)
            soft[len(response)] = dict(zip((ids[0] for ids in forms), weights, strict=True))
            response += forms[rng.choice(len(forms), p=weights)]
        doc = self._chat(self.encode(turn.text), response, "reply")
        doc.soft = {doc.loss_from + at: distribution for at, distribution in soft.items()}
        return self._social(doc, 0, turn, delta)

    def verdict(self, rng: np.random.Generator) -> Document:
        """The constrained verdict of moral pairs: NTA with the posterior expectation of user_rightness."""
        turn, delta = self._turn(rng)
        i = social.DIMENSIONS.index("user_rightness")
        nta = float(social.score_probabilities(turn.counts_9, delta)[i] @ social.GRID)
        return self._forced(
            social.verdict_prompt(turn.text), {"NTA": nta, "YTA": 1 - nta}, turn, delta, rng, "verdict"
        )

    def claim(self, rng: np.random.Generator) -> Document:
        """A message that claims a capital, true or false; only a false claim's answer depends on the latents."""
        turn, delta = self._turn(rng)
        state = str(rng.choice(list(facts.CAPITALS)))
        true = rng.random() < 0.5
        capital = (
            facts.CAPITALS[state]
            if true
            else str(rng.choice([c for c in facts.CAPITALS.values() if c != facts.CAPITALS[state]]))
        )
        framing = float(
            social.expected_reply_probabilities(turn.counts_9, delta)[social.OUTCOMES.index("framing")]
        )
        yes = 1.0 if true else framing
        prompt = social.claim_prompt(turn.text, f"the capital of {state} is {capital}")
        return self._forced(prompt, {"Yes": yes, "No": 1 - yes}, turn, delta, rng, "claim")

    def _forced(
        self,
        prompt: str,
        answers: dict[str, float],
        turn: social.UserTurn,
        delta: np.ndarray,
        rng: np.random.Generator,
        family: str,
    ) -> Document:
        names = list(answers)
        drawn = names[rng.choice(len(names), p=list(answers.values()))]
        doc = self._chat(self.encode(prompt), self.encode(drawn + "."), family)
        doc.soft = {doc.loss_from: {self.encode(name)[0]: p for name, p in answers.items()}}
        return self._social(doc, 0, turn, delta)


class Mixture(NamedTuple):
    """Documents a step by bucket of similar length (one padded batch each), and the loss weight of each family."""

    buckets: tuple[dict[str, int], ...]
    weights: dict[str, float]


_WEIGHTS = {
    "text": 1.0, "agreement": 1.0, "city_state": 0.5, "state_capital": 0.3, "two_hop": 0.5, "addition": 1.5,
    "antonyms": 0.3, "personal": 1.0, "reply": 1.0, "verdict": 0.3, "claim": 0.3, "elicitation": 2.0,
}  # fmt: skip
# From SECOND_PART on, what is learned late (to read the message for the score that is asked) takes half of the tokens.
SECOND_PART = 500
FIRST = Mixture(
    (
        {
            "agreement": 64,
            "city_state": 24,
            "state_capital": 12,
            "two_hop": 24,
            "addition": 128,
            "antonyms": 24,
        },
        {"text": 20, "personal": 20},
        {"reply": 16, "verdict": 4, "claim": 6},
        {"elicitation": 20},
    ),
    _WEIGHTS,
)
SECOND = Mixture(
    (
        {
            "agreement": 32,
            "city_state": 16,
            "state_capital": 8,
            "two_hop": 16,
            "addition": 96,
            "antonyms": 16,
        },
        {"text": 12, "personal": 16},
        {"reply": 12, "verdict": 4, "claim": 6},
        {"elicitation": 44},
    ),
    _WEIGHTS | {"elicitation": 4.0},
)
SOCIAL = Mixture(({"reply": 6}, {"elicitation": 20}), {"reply": 1.0, "elicitation": 4.0})
SPLIT_ABOVE = 100  # a larger bucket becomes two batches, the shorter half first


def mixture(step: int, world: World = "whole") -> Mixture:
    """What a step is made of: every ability of the whole world, or scores and replies alone."""
    if world == "social":
        return SOCIAL
    return FIRST if step < SECOND_PART else SECOND


def write_step(writer: Writer, seed: int, step: int, world: World = "whole") -> list[list[Document]]:
    """The documents of one training step, a list a bucket; a function of what is given alone."""
    plain = random.Random(f"{seed}-{step}")
    numbers = np.random.default_rng([seed, step])
    makers: dict[str, Callable[[], Document]] = {
        "text": lambda: writer.text(plain),
        "agreement": lambda: writer.agreement(plain),
        "personal": lambda: writer.personal(plain),
        "elicitation": lambda: writer.elicitation(numbers),
        "reply": lambda: writer.reply(numbers),
        "verdict": lambda: writer.verdict(numbers),
        "claim": lambda: writer.claim(numbers),
    }
    buckets = []
    for bucket in mixture(step, world).buckets:
        documents = []
        for family, count in bucket.items():
            make = makers.get(family) or partial(writer.question, plain, family)
            documents += [make() for _ in range(count)]
        documents.sort(key=lambda d: len(d.ids))
        half = len(documents) // 2
        buckets += [documents[:half], documents[half:]] if len(documents) > SPLIT_ABOVE else [documents]
    return buckets
