"""Requests of all kinds in one batch of the engine, each compared with its own masked reference, token for token.

In float32 every token must be the reference's. In half precision engine and reference round differently, so where the
two best logits are nearly equal either may win, and what follows is another text. A request whose first other token
stands at such a near tie (`near_tie` logits, or less) is counted as one, not as a mismatch.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preft.adapters import Adapter
from preft.reference import Reference, greedy_reference
from shared.generation import Generator, Request, Sampling
from shared.models import Model
from shared.tokens import Message, encode_chat


@dataclass(frozen=True)
class MixedRequest:
    """One request: who asks, under which kind of adapter (None: the base model), and the chat up to the answer."""

    user: str
    kind: str
    adapter: str | None
    chat: list[Message]
    wanted: str


@dataclass(frozen=True)
class Outcome:
    """What the engine answered and what the reference says; `other_at_gap`: its gap at the first token that differs.

    The gap is in logits; None where all tokens are equal, infinite where one answer only ends before the other.
    """

    request: MixedRequest
    prompt_tokens: int
    text: str
    served: list[int]
    reference: list[int]
    smallest_gap: float
    other_at_gap: float | None

    @property
    def matches(self) -> bool:
        """Whether every token is the reference's."""
        return self.served == self.reference

    def near_tie(self, tolerance: float) -> bool:
        """Whether the answer differs, but first at a token that the reference chose by `tolerance` logits or less."""
        return self.other_at_gap is not None and self.other_at_gap <= tolerance


def run_mixed(
    generator: Generator,
    model: Model,
    adapters: Mapping[str, Adapter],
    requests: Sequence[MixedRequest],
    max_tokens: int,
    seed: int = 0,
) -> list[Outcome]:
    """Serve all requests at once, in a shuffled order, and compute each one's reference; in the order given."""
    prompts = [
        encode_chat(model.tokenizer, request.chat, add_generation_prompt=True).ids for request in requests
    ]
    order = random.Random(seed).sample(range(len(requests)), len(requests))
    sampling = Sampling(max_tokens=max_tokens, logprobs=None)
    answers: Any = generator.generate(
        [Request(prompts[i], adapter=requests[i].adapter) for i in order], sampling
    )
    answer_of = {i: answer[0] for i, answer in zip(order, answers)}
    outcomes = []
    for i, request in enumerate(requests):
        adapter = adapters[request.adapter] if request.adapter else None
        expected = greedy_reference(model.hf, adapter, prompts[i], max_tokens, tuple(model.eos_token_ids))
        outcomes.append(
            Outcome(
                request,
                len(prompts[i]),
                answer_of[i].text,
                answer_of[i].token_ids,
                expected.tokens,
                expected.smallest_gap,
                gap_at_difference(answer_of[i].token_ids, expected),
            )
        )
    return outcomes


def gap_at_difference(served: Sequence[int], expected: Reference) -> float | None:
    """The reference's gap (logits) where the served tokens first differ; None: nowhere; inf: one ends too early."""
    for token, wanted, gap in zip(served, expected.tokens, expected.gaps, strict=False):
        if token != wanted:
            return gap
    return None if len(served) == len(expected.tokens) else float("inf")


def match_rate(outcomes: Sequence[Outcome], tolerance: float = 0.0) -> float:
    """Share of requests whose tokens all equal the reference's, or differ first at a near tie (see `near_tie`)."""
    return sum(one.matches or one.near_tie(tolerance) for one in outcomes) / len(outcomes)
