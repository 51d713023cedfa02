"""Chats to training rows under the adapter's history policy, and rows to seeded batches of similar length."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from shared.history import History
from shared.tokens import Message, TokenBatch, TrainingRow, collate, training_row


def training_rows(
    tokenizer: Any, chats: Sequence[Sequence[Message]], history: History = History.RECOMPUTE
) -> list[TrainingRow]:
    """Rows to train on.

    RECOMPUTE gives one row for every assistant turn, with all before it as prompt; STICKY one row a chat, whose earlier
    responses are neither adapted nor prompt.
    """
    rows = []
    for chat in chats:
        if history == History.STICKY:
            rows.append(training_row(tokenizer, chat, history))
            continue
        ends = [i + 1 for i, message in enumerate(chat) if message["role"] == "assistant"]
        rows += [training_row(tokenizer, chat[:end], history) for end in ends]
    return rows


def batches(
    rows: Sequence[TrainingRow], batch_size: int, pad_id: int, steps: int, seed: int
) -> Iterator[TokenBatch]:
    """`steps` batches: every row once an epoch, in a new seeded order each, neighbours in length together."""
    rng = random.Random(seed)
    made = 0
    while True:
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].input_ids) // 8, rng.random()))
        groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            if made == steps:
                return
            yield collate([rows[i] for i in group], pad_id)
            made += 1


def padding_id(tokenizer: Any) -> int:
    """The token that fills rows; it is masked everywhere, so any will do where the tokenizer names none."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.eos_token_id or 0)
