"""Side effects of an edit on the text itself: ended or cut, length, repetition, and surprise to the unedited model.

    repetition   share of word trigrams of a reply that stood in it before
    nll          mean negative log-likelihood of its tokens (nats) after the prompt, under the model without edits;
                 the perplexity of a set of replies is exp of the mean over all their tokens

A reply is coherent when it ends by itself, repeats at most `REPETITION` and surprises the unedited model by at most
`EXCESS` nats a token more than the 95% quantile of the unedited replies. A dose is judged by the share of coherent
replies over the unedited share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray

from assumptions.chats import Chat
from assumptions.conditions import UNEDITED, Reply
from shared.errors import UserError
from shared.models import Model
from shared.tokens import encode_chat, pad

REPETITION = 0.3
LOGITS = 2**25  # held at a time: 128 MiB in float32
EXCESS = 1.0


class Surprise(NamedTuple):
    """Summed negative log-likelihood (nats) of a reply's tokens, and their number."""

    nats: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats a token; nan for an empty reply."""
        return self.nats / self.tokens if self.tokens else float("nan")


@dataclass(frozen=True)
class Texture:
    """Side effects of one condition over its replies; perplexity under the unedited model."""

    ended: float
    words: float
    repetition: float
    perplexity: float
    coherent: float


def repetition(text: str, n: int = 3) -> float:
    """Share of the word n-grams of a text that stood in it before; 0 for a text of fewer than n + 1 words."""
    words = text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def surprises(
    model: Model, chats: Sequence[Chat], replies: Sequence[Reply], batch_size: int = 64
) -> list[Surprise]:
    """How surprising each reply is to the model as it is, after the chat it answers (as first put, not reworded)."""
    prompts = {
        chat.id: encode_chat(model.tokenizer, chat.messages, add_generation_prompt=True).ids for chat in chats
    }
    texts = [model.tokenizer.encode(reply.text, add_special_tokens=False) for reply in replies]
    found: list[Surprise] = [Surprise(0.0, 0)] * len(replies)
    order = sorted((i for i, ids in enumerate(texts) if ids), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        pairs = [(prompts[replies[i].chat], texts[i]) for i in rows]
        for i, surprise in zip(rows, _batch(model, pairs), strict=True):
            found[i] = surprise
    return found


@torch.no_grad()
def _batch(model: Model, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Surprise]:
    """Surprise of the second part of every row after its first.

    The prompts are read once, the texts in stretches over their cache, so that no more than `LOGITS` logits are held
    (one column's at least), however long the texts and large the vocabulary are.
    """
    from transformers import DynamicCache

    pad_id = model.tokenizer.pad_token_id or 0
    prompts, texts = zip(*pairs, strict=True)
    before = pad(prompts, [len(prompt) for prompt in prompts], pad_id, "left").to(model.device)
    after = pad(texts, [0] * len(texts), pad_id, "right").to(model.device)
    ids_BT = torch.cat([before.input_ids_BT, after.input_ids_BT], 1)
    mask_BT = torch.cat([before.attention_mask_BT, after.attention_mask_BT], 1)
    lengths_B1 = before.prompt_lengths_B[:, None]
    positions_BT = torch.cat([before.position_ids_BT, lengths_B1 + after.position_ids_BT], 1)
    cache, first = DynamicCache(config=model.hf.config), before.input_ids_BT.shape[1] - 1
    stretch = max(1, LOGITS // (len(pairs) * model.architecture.vocab_size))

    def logits(start: int, stop: int, keep: int) -> Float[torch.Tensor, "B T V"]:
        read: Float[torch.Tensor, "B T V"] = model.hf(
            input_ids=ids_BT[:, start:stop],
            attention_mask=mask_BT[:, :stop],
            position_ids=positions_BT[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return read

    if first:
        logits(0, first, keep=1)
    nats_B = torch.zeros(len(pairs), dtype=torch.float64)
    for start in range(first, ids_BT.shape[1] - 1, stretch):
        stop = min(start + stretch, ids_BT.shape[1] - 1)  # column t tells the token of column t + 1
        logits_BTV, wanted_BT = logits(start, stop, keep=0), ids_BT[:, start + 1 : stop + 1]
        each_BT = torch.nn.functional.cross_entropy(
            logits_BTV.float().flatten(0, 1), wanted_BT.flatten(), reduction="none"
        ).view_as(wanted_BT)
        nats_B += (each_BT.double() * mask_BT[:, start + 1 : stop + 1]).sum(1).cpu()
    return [Surprise(nats, len(text)) for nats, text in zip(nats_B.tolist(), texts, strict=True)]


def coherent(replies: Sequence[Reply], surprise: Sequence[Surprise]) -> Bool[ndarray, " B"]:
    """Which replies are coherent; UserError when none of them is unedited, which the others are measured by."""
    means = np.array([one.mean for one in surprise])
    unedited = np.array([reply.direction == UNEDITED for reply in replies])
    known = means[unedited & np.isfinite(means)]
    if not known.size:
        raise UserError(
            "coherence is measured by unedited replies, and there is none with text: answer dose 0 too"
        )
    most = np.quantile(known, 0.95) + EXCESS
    ended = np.array([reply.finish_reason != "length" for reply in replies])
    fresh = np.array([repetition(reply.text) <= REPETITION for reply in replies])
    with np.errstate(invalid="ignore"):
        return ended & fresh & (means <= most)


def textures(replies: Sequence[Reply], surprise: Sequence[Surprise]) -> dict[tuple[str, float], Texture]:
    """Side effects by (condition, dose)."""
    good = coherent(replies, surprise)
    rows: dict[tuple[str, float], list[int]] = {}
    for i, reply in enumerate(replies):
        rows.setdefault((reply.direction, reply.dose), []).append(i)
    return {
        key: _texture([replies[i] for i in of], [surprise[i] for i in of], good[of])
        for key, of in rows.items()
    }


def _texture(replies: Sequence[Reply], surprise: Sequence[Surprise], good: Bool[ndarray, " B"]) -> Texture:
    tokens = sum(one.tokens for one in surprise)
    return Texture(
        ended=float(np.mean([reply.finish_reason != "length" for reply in replies])),
        words=float(np.mean([len(reply.text.split()) for reply in replies])),
        repetition=float(np.mean([repetition(reply.text) for reply in replies])),
        perplexity=float(np.exp(sum(one.nats for one in surprise) / tokens)) if tokens else float("nan"),
        coherent=float(good.mean()),
    )
