"""What an adapter is, before there is a model: method, rank, scale, tokens and places.

Names select modules by peft's rules, which vLLM shares:

    target_modules, a list      a module is meant if its path is a name of the list, or ends with "." + a name
    target_modules, a string    a regular expression that the whole path must match; "all-linear" is every linear layer
    rank_pattern, alpha_pattern the first key that matches the end of the path at a "." gives the module's rank or alpha

    LoRA's scale of a module is s = alpha / r (rsLoRA: alpha / sqrt(r)) with the module's own rank and alpha.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from shared.errors import UserError
from shared.history import History
from shared.tokens import Phase

Method = Literal["lora", "direft", "loreft", "nodireft", "noreft"]
METHODS: tuple[str, ...] = ("lora", "direft", "loreft", "nodireft", "noreft")
ALL_LINEAR = "all-linear"

Value = TypeVar("Value")


class AdapterError(UserError):
    """An adapter that does not fit the model, its file or the request; the message says why."""


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is: method, rank, tokens and places.

    `alpha` (LoRA; None means 2 * rank) and `rslora` set the scale. `target_modules` (LoRA) are names of modules, a
    regular expression, or None for every linear layer inside the blocks; `layers` are block numbers, None for all.
    `rank_pattern` and `alpha_pattern` give single modules (for ReFT: blocks) another rank or alpha. `history` says what
    earlier assistant turns count as, in training and in serving.
    """

    method: Method = "lora"
    rank: int = 8
    phase: Phase = Phase.PREFILL
    alpha: float | None = None
    rslora: bool = False
    target_modules: tuple[str, ...] | str | None = None
    layers: tuple[int, ...] | None = None
    history: History = History.RECOMPUTE
    rank_pattern: dict[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: dict[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise AdapterError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if wrong := [rank for rank in (self.rank, *self.rank_pattern.values()) if not _is_rank(rank)]:
            raise AdapterError(f"rank must be at least 1 and whole, not {wrong[0]!r}")
        alphas = [alpha for alpha in (self.alpha, *self.alpha_pattern.values()) if alpha is not None]
        if endless := [alpha for alpha in alphas if not math.isfinite(alpha)]:
            raise AdapterError(f"alpha must be a finite number, not {endless[0]!r}")
        if not self.is_lora and (
            self.alpha is not None or self.rslora or self.target_modules is not None or self.alpha_pattern
        ):
            raise AdapterError(
                f"alpha, alpha_pattern, rslora and target_modules belong to lora; {self.method} has none of them"
            )
        expression = isinstance(self.target_modules, str) and not self.targets_all
        if expression and self.layers is not None:
            raise AdapterError(
                "layers and a regular expression in target_modules exclude each other, as in peft: name the layers in "
                "the expression, or give target_modules as a list"
            )
        for pattern in (
            *self.rank_pattern,
            *self.alpha_pattern,
            *([self.target_modules] if expression else []),
        ):
            _check_expression(str(pattern))

    @property
    def is_lora(self) -> bool:
        """Whether it adapts linear layers; otherwise it edits the residual stream (ReFT)."""
        return self.method == "lora"

    @property
    def targets_all(self) -> bool:
        """Whether a LoRA acts on every linear layer inside the blocks."""
        chosen = self.target_modules
        return chosen is None or (isinstance(chosen, str) and chosen.lower() == ALL_LINEAR)

    @property
    def base_alpha(self) -> float:
        """Alpha of the modules that no `alpha_pattern` names; for ReFT the rank, so that the scale is 1."""
        if not self.is_lora:
            return float(self.rank)
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """Factor s of the modules that no pattern names; 1 for ReFT."""
        return self._scale(self.rank, self.base_alpha)

    def rank_of(self, path: str) -> int:
        """Rank at a module, by its path in the Hugging Face model."""
        found = first_match(self.rank_pattern, path)
        return self.rank if found is None else found

    def scale_of(self, path: str) -> float:
        """Factor s at a module, by its path in the Hugging Face model; 1 for ReFT."""
        found = first_match(self.alpha_pattern, path)
        return self._scale(self.rank_of(path), self.base_alpha if found is None else found)

    def _scale(self, rank: int, alpha: float) -> float:
        if not self.is_lora:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def is_target(self, path: str) -> bool:
        """Whether `target_modules` means the linear layer at this path."""
        chosen = self.target_modules
        if chosen is None or self.targets_all:
            return True
        if isinstance(chosen, str):
            return re.fullmatch(chosen, path) is not None
        return any(is_named(path, name) for name in chosen)


def is_named(path: str, name: str) -> bool:
    """peft's rule for one name of a list: the path itself, or its end at a dot."""
    return path == name or path.endswith(f".{name}")


def matches(pattern: str, path: str) -> bool:
    """peft's rule for one key of a pattern: an expression that matches the path's end at a dot."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def first_match(patterns: dict[str, Value], path: str) -> Value | None:
    """The value of the first key that matches, or None."""
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), None)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_expression(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"{pattern!r} is no regular expression: {error}") from None
