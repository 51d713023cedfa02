"""Supervised finetuning of one adapter: frozen base model, adapter on its phase, loss on the responses.

AdamW with linear warm-up and linear decay; after every step R is retracted to orthonormal rows (ReFT). The same seed
gives the same batches and the same start.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from preft.adapters import Adapter, AdapterConfig, AdapterError
from preft.forward import masked_loss
from preft.train.module import frozen
from preft.train.rows import batches, padding_id, training_rows
from shared.tokens import Message


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast; `max_grad_norm` 0 does not clip."""

    steps: int = 40
    batch_size: int = 16
    learning_rate: float = 1e-2
    warmup_steps: int = 5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1:
            raise AdapterError(
                f"steps and batch_size must be at least 1, got {self.steps} and {self.batch_size}"
            )


class Trained(NamedTuple):
    """A trained adapter and its loss per response token at every step (nats)."""

    adapter: Adapter
    losses: list[float]


def train_adapter(
    hf: Any,
    tokenizer: Any,
    chats: Sequence[Sequence[Message]],
    adapter_config: AdapterConfig,
    config: TrainConfig | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train one adapter on chats that end with an assistant message; the model is left as it was.

    `on_step(step, loss)` is called after every step. AdapterError where the chats hold nothing to learn from.
    """
    config = config or TrainConfig()
    rows = training_rows(tokenizer, chats, adapter_config.history)
    if not rows:
        raise AdapterError("there is no assistant message to learn from in the training chats")
    adapter = Adapter.create(hf, adapter_config, config.seed)
    optimizer = torch.optim.AdamW(
        adapter.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(config))
    losses: list[float] = []
    with frozen(hf):
        feed = batches(rows, config.batch_size, padding_id(tokenizer), config.steps, config.seed)
        for step, batch in enumerate(feed):
            loss = masked_loss(hf, adapter, batch)
            mean = loss.total / loss.tokens
            optimizer.zero_grad(set_to_none=True)
            mean.backward()
            if config.max_grad_norm:
                nn.utils.clip_grad_norm_(adapter.parameters(), config.max_grad_norm)
            optimizer.step()
            schedule.step()
            adapter.retract_()
            losses.append(float(mean.detach()))
            if on_step:
                on_step(step, losses[-1])
    return Trained(adapter.requires_grad_(False), losses)


def _rate(config: TrainConfig) -> Callable[[int], float]:
    """Learning-rate factor of a step: up over the warm-up, then down to zero behind the last step."""
    warmup = min(config.warmup_steps, config.steps)
    return lambda step: min(
        (step + 1) / max(warmup, 1), (config.steps - step) / max(config.steps - warmup + 1, 1)
    )
