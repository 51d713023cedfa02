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
from jaxtyping import Bool
from numpy import ndarray

from assumptions.chats import Chat
from assumptions.conditions import UNEDITED, Reply
from shared.errors import UserError
from shared.models import Model
from shared.tokens import encode_chat, pad

REPETITION = 0.3
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


def _batch(model: Model, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Surprise]:
    """Surprise of the second part of every row after its first."""
    rows = [prompt + text for prompt, text in pairs]
    lengths = [len(prompt) for prompt, _ in pairs]
    batch = pad(rows, lengths, model.tokenizer.pad_token_id or 0, "right")
    with torch.no_grad():
        logits_BTV = model(batch)
    found = []
    for row, (prompt, text) in enumerate(pairs):
        logits_TV = logits_BTV[row, len(prompt) - 1 : len(prompt) + len(text) - 1].float()
        ids_T = torch.tensor(text, device=logits_TV.device)
        found.append(
            Surprise(float(torch.nn.functional.cross_entropy(logits_TV, ids_T, reduction="sum")), len(text))
        )
    return found


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
