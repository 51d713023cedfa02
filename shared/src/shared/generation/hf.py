"""Completions from the Hugging Face model in this process, under whatever interventions are active.

1. Draws are sorted by prompt length, longest first, and cut into batches, so that little padding is computed and
   a batch that does not fit in memory fails at once.
2. A batch is padded on the left and continued by `Model.generate`: one forward pass a token over a cache, each under
   the active edits, every row sampling from its own seed.
3. Text is what the new tokens add to the prompt's text; it is cut before the stop string that completes first.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import NamedTuple

from shared.errors import UserError
from shared.generation.prompts import check_lengths, prompt_ids
from shared.generation.requests import Completion, Draw, EngineBase, Sampling
from shared.generation.text import decode_new
from shared.hooks import edit
from shared.interventions import Intervention
from shared.models import Model, ModelConfig, load
from shared.tokens import pad


class Row(NamedTuple):
    """A draw with its prompt ids, its place in the answer, and the tokens that the context has room for."""

    place: int
    ids: list[int]
    seed: int
    room: int


class HFGenerator(EngineBase):
    """Batched generation through `model`; `interventions` are active in it beside those the caller has opened.

    Stop strings cut the answer but do not end the computation, which runs to an end token or `max_tokens`.
    It has neither adapters nor JSON schemas: UserError names the engines that do.
    """

    def __init__(
        self,
        model: Model | ModelConfig | str,
        interventions: Sequence[Intervention] = (),
        *,
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model if isinstance(model, Model) else load(model)
        if not self.model.tokenizer.is_fast:
            raise UserError(
                "text is decoded by the tokenizers library: convert this slow tokenizer to a fast one"
            )
        self.interventions = list(interventions)
        self.batch_size = batch_size

    def _complete(self, draws: list[Draw], sampling: Sampling) -> list[Completion]:
        rows = self._rows(draws, sampling)
        completions: dict[int, Completion] = {}
        with ExitStack() as stack:
            if self.interventions:
                stack.enter_context(edit(self.model, self.interventions))
            for batch in batches(rows, self.batch_size):
                answers = self._complete_batch(batch, sampling)
                completions.update(zip((row.place for row in batch), answers))
        return [completions[place] for place in range(len(draws))]

    def _rows(self, draws: list[Draw], sampling: Sampling) -> list[Row]:
        limit = context_length(self.model)
        rows = []
        for place, (request, seed) in enumerate(draws):
            _refuse_unsupported(request.adapter, request.json_schema)
            ids = prompt_ids(self.model.tokenizer, request.prompt)
            rows.append(Row(place, ids, seed, min(sampling.max_tokens, limit - len(ids))))
        check_lengths((len(row.ids) for row in rows), limit)
        return rows

    def _complete_batch(self, rows: list[Row], sampling: Sampling) -> list[Completion]:
        prompts = [row.ids for row in rows]
        generated = self.model.generate(
            pad(prompts, [len(ids) for ids in prompts], self._pad_id),
            max_new_tokens=rows[0].room,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=[row.seed for row in rows],
            top_logprobs=sampling.logprobs or 0,
        )
        return [
            self._completion(
                row, tokens, logprobs if sampling.logprobs is not None else [], likeliest, sampling
            )
            for row, tokens, logprobs, likeliest in zip(
                rows, generated.tokens, generated.logprobs, generated.top_logprobs
            )
        ]

    @property
    def _pad_id(self) -> int:
        pad_id = self.model.tokenizer.pad_token_id
        return 0 if pad_id is None else pad_id

    def _completion(
        self,
        row: Row,
        tokens: list[int],
        logprobs: list[float],
        likeliest: list[dict[int, float]],
        sampling: Sampling,
    ) -> Completion:
        ended = tokens[-1] in self.model.eos_token_ids
        shown = tokens[:-1] if ended else tokens
        text, n_tokens, stopped = decode_new(self.model.tokenizer, row.ids, shown, sampling.stop)
        if stopped:
            tokens, logprobs, likeliest = tokens[:n_tokens], logprobs[:n_tokens], likeliest[:n_tokens]
        return Completion(text, tokens, logprobs, "stop" if stopped or ended else "length", likeliest)


def batches(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Rows of like room, longest prompts first, at most `size` at a time."""
    ordered = sorted(rows, key=lambda row: len(row.ids), reverse=True)
    for _, group in groupby(ordered, key=lambda row: row.room):
        alike = list(group)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def context_length(model: Model) -> int:
    """Tokens the model can attend to, prompt and answer together."""
    return int(model.hf.config.get_text_config().max_position_embeddings)


def _refuse_unsupported(adapter: str | None, json_schema: object) -> None:
    if adapter is not None:
        raise UserError(
            f"adapter {adapter!r}: HFGenerator serves none by name; use VLLMGenerator or OpenAIGenerator"
        )
    if json_schema is not None:
        raise UserError("HFGenerator cannot enforce a json_schema; use VLLMGenerator or OpenAIGenerator")
