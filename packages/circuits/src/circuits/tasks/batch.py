"""Examples of one length as a batch: clean and counterfactual prompts, and the token of each answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuits.tasks.draw import answer_token
from circuits.tasks.items import Example, TaskError
from shared.tinyworld.tasks import Pair

if TYPE_CHECKING:
    from shared.models import Model
    from shared.tokens import TokenBatch


@dataclass(frozen=True)
class PairBatch:
    """Pairs of one length, encoded: clean and counterfactual prompts, and the token of each answer."""

    examples: tuple[Example, ...]
    clean: "TokenBatch"
    corrupt: "TokenBatch"
    answers: tuple[int, ...]
    wrongs: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs in order."""
        return tuple(example.pair for example in self.examples)

    @property
    def clusters(self) -> tuple[str, ...]:
        """What each example is about first (its noun, its city): the unit that intervals resample."""
        return tuple(
            example.groups[0] if example.groups else str(row) for row, example in enumerate(self.examples)
        )

    def labels(self, name: str) -> tuple[str, ...]:
        """Return every example's class under one labelling."""
        return tuple(example.labels[name] for example in self.examples)


def collate(model: "Model", examples: Sequence[Example]) -> PairBatch:
    """Return the examples as batches; TaskError where their prompts differ in length or an answer is not one token."""
    pairs = [example.pair for example in examples]
    if not pairs:
        raise TaskError("no pairs: give at least one")
    clean, corrupt = model.encode([pair.clean for pair in pairs]), model.encode([p.corrupt for p in pairs])
    lengths = {*clean.lengths_B.tolist(), *corrupt.lengths_B.tolist()}
    if len(lengths) > 1:
        raise TaskError(f"prompts of one batch must be of one length, got {sorted(lengths)} tokens")
    return PairBatch(
        examples=tuple(examples),
        clean=clean,
        corrupt=corrupt,
        answers=tuple(answer_token(model.tokenizer, pair.answer) for pair in pairs),
        wrongs=tuple(answer_token(model.tokenizer, pair.wrong) for pair in pairs),
    )
