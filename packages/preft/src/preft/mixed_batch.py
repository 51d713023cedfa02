"""Requests of all kinds in one batch of the engine, each compared with its own masked reference, token for token."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preft.adapters import Adapter
from preft.reference import greedy_reference
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
    """What the engine answered and what the reference says."""

    request: MixedRequest
    prompt_tokens: int
    text: str
    served: list[int]
    reference: list[int]
    smallest_gap: float

    @property
    def matches(self) -> bool:
        """Whether every token is the reference's."""
        return self.served == self.reference


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
            )
        )
    return outcomes


def match_rate(outcomes: Sequence[Outcome]) -> float:
    """Share of requests whose tokens all equal the reference's."""
    return sum(outcome.matches for outcome in outcomes) / len(outcomes)
