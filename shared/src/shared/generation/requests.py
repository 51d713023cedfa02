"""What every engine is asked and what it answers: requests, sampling, completions, and the protocol itself.

A request with n samples is n independent draws, each with its own seed, so that the sampled text of a draw is a
function of (prompt, sampling, seed) alone: not of its neighbours in the batch, of their number or of their order.
1. `expand` lays the requests out as draws. Sample 0 uses the request's seed, sample i > 0 a hash of (seed, i);
   hashing keeps sample 1 of seed 0 apart from sample 0 of seed 1. A request without a seed takes one from torch's
   global generator, so `seed_everything` makes a whole run repeatable.
2. The engine completes the draws in the order it likes.
3. `regroup` hands them back request by request.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

from shared.errors import UserError
from shared.tokens import Message

Prompt: TypeAlias = str | list[Message] | list[int]
Engine = TypeVar("Engine", bound="EngineBase")  # not Self: beartype checks methods one by one


@dataclass(frozen=True)
class Request:
    """One prompt: plain text, chat messages (rendered with the generation prompt) or token ids taken as they are."""

    prompt: Prompt
    adapter: str | None = None
    json_schema: dict[str, Any] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("a request needs a prompt of at least one character, message or token id")
        if self.seed is not None and not 0 <= self.seed < 2**31:
            raise UserError(f"a request's seed lies in [0, 2**31), got {self.seed}")


@dataclass(frozen=True)
class Sampling:
    """How to sample; temperature 0 is greedy, and `n` samples are drawn for each request.

    `logprobs`: None computes none, 0 gives the chosen tokens', k > 0 also the k likeliest tokens at each position.
    They are log-probabilities of the model itself, before temperature and top-p, in nats; under a JSON schema vLLM
    gives those among the allowed tokens.
    `stop`: strings that end a completion and are cut from its text.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    logprobs: int | None = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        for wrong, message in (
            (self.max_tokens < 1, f"max_tokens must be at least 1, got {self.max_tokens}"),
            (self.temperature < 0, f"temperature must be at least 0 (0 is greedy), got {self.temperature}"),
            (not 0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}"),
            (self.n < 1, f"n must be at least 1, got {self.n}"),
            (self.n > 1 and self.temperature == 0, "n > 1 greedy samples are all alike: set a temperature"),
            ((self.logprobs or 0) < 0, f"logprobs must be None or at least 0, got {self.logprobs}"),
            (isinstance(self.stop, str), f"stop is a sequence of strings: write ({self.stop!r},)"),
            ("" in self.stop, "a stop string must not be empty"),
        ):
            if wrong:
                raise UserError(message)


@dataclass(frozen=True)
class Completion:
    """One sample: text without special tokens or stop string, and all its new token ids, the closing one included.

    `finish_reason` is "stop" (end token or stop string) or "length". `token_ids` is empty where a server does not
    tell them; `logprobs` is empty where not asked for; `top_logprobs` maps token id to log-probability, by position.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    top_logprobs: list[dict[int, float]] = field(default_factory=list)


@runtime_checkable
class Generator(Protocol):
    """Anything that completes requests."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Complete `requests`: one list a request, in order, of `sampling.n` completions."""
        ...

    def close(self) -> None:
        """Free what the engine holds; a closed generator is not used again."""
        ...


class Draw(NamedTuple):
    """One sample of one request, with the seed that is its own."""

    request: Request
    seed: int


def sample_seed(seed: int, sample: int) -> int:
    """Seed in [0, 2**31) of sample number `sample` of a request seeded `seed`; sample 0 keeps the seed."""
    if sample == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def expand(requests: Iterable[Request], sampling: Sampling) -> list[Draw]:
    """Lay `requests` out as draws, the samples of a request side by side."""
    draws = []
    for request in requests:
        seed = fresh_seed(sampling) if request.seed is None else request.seed
        draws += [Draw(request, sample_seed(seed, sample)) for sample in range(sampling.n)]
    return draws


def fresh_seed(sampling: Sampling) -> int:
    """A seed from torch's global generator, which greedy sampling leaves untouched."""
    import torch

    return int(torch.randint(2**31, ())) if sampling.temperature > 0 else 0


def regroup(completions: Sequence[Completion], n: int) -> list[list[Completion]]:
    """Undo `expand`: one list of `n` completions a request."""
    return [list(completions[start : start + n]) for start in range(0, len(completions), n)]


class PartFailedError(UserError):
    """Some requests of a batch have no answer. `answers` holds, by request, its completions or what went wrong."""

    def __init__(self, answers: Sequence[list[Completion] | UserError]) -> None:
        self.answers = list(answers)
        super().__init__(str(next(one for one in self.answers if isinstance(one, UserError))))


class EngineBase:
    """Adds expansion into draws and the `with` statement to an engine that implements `_complete` and `close`."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Complete `requests`: one list a request, in order, of `sampling.n` completions."""
        draws = expand(requests, sampling)
        return regroup(self._complete(draws, sampling), sampling.n) if draws else []

    def _complete(self, draws: list[Draw], sampling: Sampling) -> list[Completion]:
        raise NotImplementedError

    def close(self) -> None:
        """Free what the engine holds; a closed generator is not used again."""

    def __enter__(self: Engine) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
