"""All scores of a flat instrument from one forward pass: the answer is forced, the numbers are read off its tokens.

The answer {"d1": 0.50, "d2": 0.50, ...} is put after the prompt, and at the first digit, the tenths and the hundredths
of every number the model's probabilities over digits are taken:

    E = (P(1) + P(0) (sum_i i/10 P(tenth i | 0.) + sum_j j/100 P(hundredth j | 0.5))) / (P(0) + P(1))

The hundredths are those behind the forced tenth, so E is off by at most their spread, the same under every edit. That
makes it the measure for slopes under many edits; `token_scores` gives exact expected values, one tree a number.
It needs an instrument whose answer is {dimension: number} and a tokenizer that gives digits tokens of their own.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from assumptions.chats import Chat
from assumptions.instruments import Instrument
from assumptions.shapes import Number, Record
from shared.errors import UserError
from shared.hooks import edit
from shared.interventions import Intervention
from shared.models import Model
from shared.tokens import encode_chat, pad

FORCED = "0.50"


class Places(NamedTuple):
    """The forced answer's tokens, and for each dimension where its digits stand: first, tenths, hundredths (K 3)."""

    ids: list[int]
    at_K3: list[tuple[int, int, int]]


class Digits(NamedTuple):
    """Token ids of the digits 0 to 9 inside a number, and of 0 and 1 as its first character."""

    inside: list[int]
    first: list[int]


def forced_scores(
    model: Model,
    instrument: Instrument,
    chats: Sequence[Chat],
    edits: Sequence[Intervention] = (),
    batch_size: int = 32,
) -> Float[ndarray, "B K"]:
    """Expected score of every chat (B) and dimension (K) under edits; UserError where form or digits do not fit."""
    places, digits = _places(instrument, model.tokenizer)
    prompts = [
        encode_chat(
            model.tokenizer, instrument.messages(chat.turn, chat.history), add_generation_prompt=True
        ).ids
        for chat in chats
    ]
    scores = np.empty((len(chats), len(instrument.dimensions)))
    order = sorted(range(len(chats)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids = [prompts[i] + places.ids for i in rows]
        lengths = [len(prompts[i]) for i in rows]
        batch = pad(ids, lengths, model.tokenizer.pad_token_id or 0, "right")
        with torch.no_grad(), edit(model, list(edits)):
            logits_BTV = model(batch)
        for row, (i, length) in enumerate(zip(rows, lengths, strict=True)):
            scores[i] = _read(logits_BTV[row, length - 1 :].float().cpu(), places, digits)
    return scores


def _read(logits_TV: Float[Tensor, "T V"], places: Places, digits: Digits) -> list[float]:
    """Expected numbers (K) from the logits that predict the forced tokens: row t predicts token t."""
    found = []
    for first, tenth, hundredth in places.at_K3:
        p_first = torch.softmax(logits_TV[first, digits.first], -1)
        p_tenth = torch.softmax(logits_TV[tenth, digits.inside], -1)
        p_hundredth = torch.softmax(logits_TV[hundredth, digits.inside], -1)
        count = torch.arange(10, dtype=p_tenth.dtype)
        below = float(p_tenth @ count) / 10 + float(p_hundredth @ count) / 100
        found.append(float(p_first[1]) + float(p_first[0]) * below)
    return found


def _places(instrument: Instrument, tokenizer: Any) -> tuple[Places, Digits]:
    shape = instrument.shape()
    if not isinstance(shape, Record) or not all(isinstance(member, Number) for _, member in shape.members):
        raise UserError(
            f"instrument {instrument.id} does not answer with one number a dimension; elicit it instead"
        )
    text = json.dumps(dict.fromkeys(instrument.dimensions, 0.5)).replace("0.5", FORCED)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    at = []
    for name in instrument.dimensions:
        start = text.index(FORCED, text.index(f'"{name}"'))
        tokens = [t for t, (a, b) in enumerate(offsets) if b > start and a < start + len(FORCED)]
        alone = [text[slice(*offsets[t])].strip() for t in tokens]
        if alone != list(FORCED):
            raise UserError(
                f"this tokenizer writes {FORCED} as {alone}; forced scores need digits that are tokens of their own: "
                "use assumptions.token_scores"
            )
        at.append((tokens[0], tokens[2], tokens[3]))
    lead = text[slice(*offsets[at[0][0]])].removesuffix("0")
    return Places(ids, at), Digits(
        _ids(tokenizer, "0.", "0123456789"), _ids(tokenizer, ":", (lead + "0", lead + "1"))
    )


def _ids(tokenizer: Any, before: str, pieces: Sequence[str]) -> list[int]:
    """Token id of each piece behind `before`; UserError where it is not one token."""
    head = tokenizer.encode(before, add_special_tokens=False)
    found = []
    for piece in pieces:
        ids = tokenizer.encode(before + piece, add_special_tokens=False)
        if ids[: len(head)] != head or len(ids) != len(head) + 1:
            raise UserError(f"this tokenizer has no single token for {piece!r}: use assumptions.token_scores")
        found.append(ids[-1])
    return found
