"""Rung B of the planted organism: an engine of known function, for everything that happens between model and scores.

It answers an elicitation prompt with the JSON the shape asks for, filled from `scores_of(prompt)`, or with one of the
known malformations, each at its own rate; which draw is malformed depends on the draw's seed alone. It can also raise
on given prompts, or die after a number of completions, as a process killed in the middle of its work would.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from assumptions.shapes import Shape, example
from shared.generation import Completion, Request, Sampling

MALFORMED: dict[str, Callable[[str, str], str]] = {
    "fenced": lambda answer, form: f"```json\n{answer}\n```",
    "prose": lambda answer, form: f"Here is what I assume.\n\n{answer}\n\nI hope this helps.",
    "trailing_comma": lambda answer, form: answer[:-1] + ", }",
    "single_quotes": lambda answer, form: answer.replace('"', "'"),
    "echo": lambda answer, form: form,
    "echo_then_answer": lambda answer, form: f"{form}\n\n{answer}",
    "truncated": lambda answer, form: answer[: len(answer) // 2],
    "prose_only": lambda answer, form: "I would rather not guess what this person wants.",
    "empty": lambda answer, form: "",
}


class EngineStopped(RuntimeError):
    """The scripted engine died, as asked."""


@dataclass
class ScriptedGenerator:
    """An engine whose answers are known; see the module's text. `asked` counts the requests it completed."""

    shape: Shape
    scores_of: Callable[[str], Mapping[str, float]]
    rates: Mapping[str, float] = field(default_factory=dict)
    refuses: Callable[[str], bool] = lambda prompt: False
    dies_after: int | None = None
    asked: int = 0

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Complete `requests` by the script: one list a request, of `sampling.n` completions."""
        if any(self.refuses(_prompt(request)) for request in requests):
            raise ValueError("a prompt of this batch is too long")
        return [[self._complete(request) for _ in range(sampling.n)] for request in requests]

    def close(self) -> None:
        """Nothing is held."""

    def _complete(self, request: Request) -> Completion:
        if self.dies_after is not None and self.asked >= self.dies_after:
            raise EngineStopped(f"stopped after {self.asked} completions")
        self.asked += 1
        answer = json.dumps(dict(self.scores_of(_prompt(request))))
        kind = self.kind_of(request)
        text = MALFORMED[kind](answer, example(self.shape)) if kind else answer
        return Completion(text, [], [], "stop")

    def kind_of(self, request: Request) -> str | None:
        """The malformation that this request's seed draws, or None."""
        digest = hashlib.sha256(f"{request.seed}".encode()).digest()
        point = int.from_bytes(digest[:4], "big") / 2**32
        for kind, rate in self.rates.items():
            if point < rate:
                return kind
            point -= rate
        return None


def _prompt(request: Request) -> str:
    """The text of a request's last message."""
    if isinstance(request.prompt, str):
        return request.prompt
    last = request.prompt[-1]
    if isinstance(last, int):
        raise TypeError("the scripted engine reads text, not token ids")
    return last["content"]
