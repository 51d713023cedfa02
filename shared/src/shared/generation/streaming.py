"""One reply of the Hugging Face model, piece by piece as it is computed, under whatever interventions are given.

The pieces of a stream add up to the text, and its tokens to the tokens, that `HFGenerator` gives for the same request,
sampling and interventions. The interventions are active only while a step is computed, so streams under different
interventions can be read in turn, a piece of one and a piece of another.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shared.decoding import steps
from shared.errors import UserError
from shared.generation.hf import context_length
from shared.generation.prompts import check_lengths, prompt_ids
from shared.generation.requests import Request, Sampling, fresh_seed
from shared.generation.text import TextStream
from shared.hooks import edit
from shared.interventions import Intervention
from shared.models import Model
from shared.tokens import pad


class Piece(NamedTuple):
    """What one token adds: its text (may be empty), its id, and at the last token why the reply ends."""

    text: str
    token_id: int
    finish_reason: str | None  # None while it goes on, then "stop" or "length"


def stream(
    model: Model, request: Request, sampling: Sampling, interventions: Sequence[Intervention] = ()
) -> Iterator[Piece]:
    """The pieces of one sampled reply; UserError for what a stream lacks: adapters, schemas, stop strings, n > 1."""
    if request.adapter is not None or request.json_schema is not None or sampling.stop or sampling.n != 1:
        raise UserError("a stream has no adapter, no json_schema, no stop strings and one sample (n=1)")
    ids = prompt_ids(model.tokenizer, request.prompt)
    check_lengths([len(ids)], context_length(model))
    room = min(sampling.max_tokens, context_length(model) - len(ids))
    seed = fresh_seed(sampling) if request.seed is None else request.seed
    tokens = steps(model, pad([ids], [len(ids)], 0), room, sampling.temperature, sampling.top_p, [seed])
    text = TextStream(model.tokenizer, ids)
    for count in range(1, room + 1):
        with edit(model, interventions):
            [token] = next(tokens).tokens_B.tolist()
        if token in model.eos_token_ids:
            yield Piece("", token, "stop")
            return
        yield Piece(text.add(token), token, "length" if count == room else None)
