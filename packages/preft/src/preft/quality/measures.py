"""Loss of every response token, by its distance from the prompt, and greedy answers, under whatever acts on a model.

`Logits` is a forward pass of a labelled batch; the loss of a token is -log p (nats) of the logits in front of it. The
token at distance 0 is predicted by the prompt's last token, which a prefill-only adapter still acts on; from distance 1
on the bare model reads an adapted cache. Distances are counted in bins 0, 1, 2-3, 4-7, 8-15, ...
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from preft.adapters import Adapter
from preft.forward import adapted, targets
from preft.train.rows import padding_id, training_rows
from shared.tokens import Message, TokenBatch, TrainingRow, collate, pad

Logits: TypeAlias = Callable[[TokenBatch], Float[Tensor, "B T V"]]
Bins: TypeAlias = dict[str, list[float]]


@runtime_checkable
class Prefilled(Protocol):
    """Something that fills a cache in front of every prompt: a trained prefix."""

    tokens: int

    def cache(self, batch_size: int) -> Any:
        """A cache that holds `tokens` positions for each of `batch_size` rows."""
        ...


@torch.no_grad()
def response_losses(logits_of: Logits, rows: Sequence[TrainingRow], pad_id: int) -> list[list[float]]:
    """Loss (nats) of the response tokens of every row, first to last."""
    found: list[list[float]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    for start in range(0, len(order), 32):
        numbers = order[start : start + 32]
        batch = collate([rows[i] for i in numbers], pad_id)
        logits_BTV = logits_of(batch)[:, :-1].float()
        labels_BT = targets(batch)[:, 1:].to(logits_BTV.device)
        losses_BT = torch.nn.functional.cross_entropy(
            logits_BTV.transpose(1, 2), labels_BT, reduction="none", ignore_index=-100
        )
        for number, losses_T, labels_T in zip(numbers, losses_BT, labels_BT, strict=True):
            found[number] = losses_T[labels_T != -100].tolist()
    return found


def rows_of(
    tokenizer: Any, chats: Sequence[Sequence[Message]], shown: Sequence[Message] = ()
) -> list[TrainingRow]:
    """One row a response of the chats; `shown` are messages in front of every chat, responses in them do not count."""
    rows = []
    for chat in chats:
        whole = [*shown, *chat]
        before = sum(message["role"] == "assistant" for message in shown)
        rows += training_rows(tokenizer, [whole])[before:]
    return rows


def mean_loss(losses: Sequence[Sequence[float]]) -> float:
    """Mean over all tokens of all rows."""
    return sum(map(sum, losses)) / sum(map(len, losses))


def by_distance(losses: Sequence[Sequence[float]]) -> Bins:
    """Sum of losses and number of tokens in each bin of the distance from the prompt."""
    bins: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in losses:
        for distance, loss in enumerate(row):
            entry = bins[bin_name(distance)]
            entry[0] += loss
            entry[1] += 1
    return dict(sorted(bins.items(), key=lambda item: int(item[0].partition("-")[0])))


def bin_name(distance: int) -> str:
    """The bin of a distance: "0", "1", "2-3", "4-7", ..."""
    if distance < 2:
        return str(distance)
    low = 1 << (distance.bit_length() - 1)
    return f"{low}-{2 * low - 1}"


@torch.no_grad()
def greedy_answers(
    model: Any,
    adapter: Adapter | None,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    prefix: Prefilled | None = None,
) -> list[list[int]]:
    """Greedy tokens of each prompt (a stop token included) under an adapter or behind a prefix, in one batch.

    `model` is a `shared.models.Model`. The adapter acts on the tokens of its phase, as in `greedy_reference`.
    """
    from transformers import DynamicCache

    batch = pad(prompts, [len(ids) for ids in prompts], padding_id(model.tokenizer)).to(model.device)
    seen, cache = 0, DynamicCache(config=model.hf.config)
    if prefix:
        seen, cache = prefix.tokens, prefix.cache(len(prompts))
    mask_BT = torch.cat([batch.attention_mask_BT.new_ones(len(prompts), seen), batch.attention_mask_BT], 1)
    stops = torch.tensor(sorted(model.eos_token_ids), device=model.device)
    tokens: list[list[int]] = [[] for _ in prompts]
    alive_B = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    for _ in range(max_tokens):
        with adapted(model.hf, adapter, batch):
            logits_BTV = model.hf(
                input_ids=batch.input_ids_BT,
                attention_mask=mask_BT,
                position_ids=batch.position_ids_BT + seen,
                past_key_values=cache,
                use_cache=True,
            ).logits
        chosen_B = logits_BTV[:, -1].argmax(-1)
        for row in alive_B.nonzero()[:, 0].tolist():
            tokens[row].append(int(chosen_B[row]))
        alive_B = alive_B & ~torch.isin(chosen_B, stops)
        if not alive_B.any():
            break
        one_B1 = torch.ones_like(chosen_B[:, None])
        batch = replace(
            batch,
            input_ids_BT=chosen_B[:, None],
            attention_mask_BT=one_B1,
            position_ids_BT=batch.position_ids_BT[:, -1:] + 1,
        )
        mask_BT = torch.cat([mask_BT, one_B1], 1)
    return tokens
