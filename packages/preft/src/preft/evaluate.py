"""Held-out loss of an adapter: negative log-likelihood a response token, in nats."""

from collections.abc import Sequence
from typing import Any

import torch

from preft.composition import AnyAdapter
from preft.forward import masked_loss
from preft.train.rows import padding_id, training_rows
from shared.history import History
from shared.tokens import Message, collate


@torch.no_grad()
def heldout_loss(
    hf: Any,
    tokenizer: Any,
    adapter: AnyAdapter | None,
    chats: Sequence[Sequence[Message]],
    batch_size: int = 32,
) -> float:
    """Mean loss over all response tokens of the chats, in nats; `adapter` None is the base model."""
    history = adapter.history if adapter else History.RECOMPUTE
    rows = sorted(training_rows(tokenizer, chats, history), key=lambda row: len(row.input_ids))
    if not rows:
        raise ValueError("held-out loss needs at least one chat with an assistant message")
    losses = [
        masked_loss(hf, adapter, collate(rows[i : i + batch_size], padding_id(tokenizer)))
        for i in range(0, len(rows), batch_size)
    ]
    return sum(float(loss.total) for loss in losses) / sum(loss.tokens for loss in losses)
