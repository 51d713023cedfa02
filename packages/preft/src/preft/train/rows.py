"""Chats to training rows under the adapter's history policy, and rows to the batches of every step.

Every step takes `batch_size` rows; every row comes once an epoch, in a new seeded order each, neighbours in length
together (an epoch's last group may be smaller). A step's rows are dealt to equal parts, one for every process and turn
of gradient accumulation. The parts' summed losses over the step's tokens are the step's mean, so that training is the
same on any number of processes. Packed or padded is a matter of layout only.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from preft.adapters import AdapterError
from preft.train.module import inputs_of
from shared.errors import UserError
from shared.history import History
from shared.tokens import Message, TokenBatch, TrainingRow, collate, pack, training_row


def training_rows(
    tokenizer: Any, chats: Sequence[Sequence[Message]], history: History = History.RECOMPUTE
) -> list[TrainingRow]:
    """Rows to train on.

    RECOMPUTE gives one row for every assistant turn, with all before it as prompt; STICKY one row a chat, whose earlier
    responses are neither adapted nor prompt. AdapterError names the chat that the template or its shape forbids.
    """
    rows = []
    for number, chat in enumerate(chats, 1):
        ends = [i + 1 for i, message in enumerate(chat) if message["role"] == "assistant"]
        if history == History.STICKY:
            ends = [len(chat)]
        try:
            rows += [training_row(tokenizer, chat[:end], history) for end in ends]
        except UserError as error:
            raise AdapterError(f"chat {number}: {error}") from error
    return rows


def schedule(rows: Sequence[TrainingRow], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Numbers of the rows of each of `steps` steps."""
    rng = random.Random(seed)
    found: list[list[int]] = []
    while len(found) < steps:
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].input_ids) // 8, rng.random()))
        groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(groups)
        found += groups
    return found[:steps]


@dataclass(frozen=True)
class Layout:
    """How rows become a batch: padded, or packed into rows of at most `packing` tokens."""

    pad_id: int
    packing: int | None = None

    def batch(self, rows: Sequence[TrainingRow]) -> TokenBatch:
        """The batch of some rows."""
        if self.packing is None:
            return collate(rows, self.pad_id)
        return pack(rows, self.pad_id, self.packing)

    def check(self, rows: Sequence[TrainingRow]) -> None:
        """AdapterError where a row is longer than the packed rows."""
        longest = max(len(row.input_ids) for row in rows)
        if self.packing is not None and longest > self.packing:
            raise AdapterError(
                f"a row has {longest} tokens, but packing={self.packing}: raise it, or shorten the chat"
            )


class Parts:
    """Item `step * parts + i` is part i of a step's batch, as arguments of `AdaptedModel`; a map-style data set."""

    def __init__(
        self, rows: Sequence[TrainingRow], steps: Sequence[Sequence[int]], layout: Layout, parts: int = 1
    ) -> None:
        layout.check(rows)
        self._rows, self._steps, self._layout, self._parts = rows, steps, layout, parts

    def __len__(self) -> int:
        return len(self._steps) * self._parts

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, part = divmod(index, self._parts)
        numbers = self._steps[step]
        chosen = [self._rows[i] for i in numbers[part :: self._parts]]
        # Every process needs a forward pass, also where a step has fewer rows than parts: one with nothing to learn.
        return inputs_of(self._layout.batch(chosen or [_unlabelled(self._rows[numbers[0]])]))


def _unlabelled(row: TrainingRow) -> TrainingRow:
    return replace(row, labels=[-100] * len(row.labels))


def padding_id(tokenizer: Any) -> int:
    """The token that fills rows; it is masked everywhere, so any will do where the tokenizer names none."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.eos_token_id or 0)
