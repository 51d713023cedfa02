"""The reference that serving is checked against: decoding and log-probabilities in Hugging Face, one request at a time.

Greedy decoding reads the prompt in one pass with the adapter on the tokens of its phase; every generated token is one
more pass over the key/value cache, at position n, n + 1, ... and so with the adapter where the phase says.
Log-probabilities of a given text come from one pass over prompt and answer under the same mask. No batch, no padding,
no scheduler: each token's mask comes from its position alone.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preft.composition import AnyAdapter
from preft.vllm.sticky import Spans
from shared.tokens import Phase, phase_mask


class Reference(NamedTuple):
    """Greedy tokens (a stop token included), and at each the gap between the two best logits."""

    tokens: list[int]
    gaps: list[float]

    @property
    def smallest_gap(self) -> float:
        """The closest call on the way."""
        return min(self.gaps, default=float("inf"))


class Logprobs(NamedTuple):
    """Natural log-probabilities of the prompt's tokens from the second on, and of the answer's."""

    prompt: list[float]
    answer: list[float]


@torch.no_grad()
def greedy_reference(
    hf: Any,
    adapter: AnyAdapter | None,
    prompt_ids: list[int],
    max_tokens: int,
    stop_ids: tuple[int, ...] = (),
    generated: Spans = (),
) -> Reference:
    """Greedy continuation of one prompt of token ids under an adapter, or under the bare model.

    `generated` are the positions [start, end) of earlier answers in the prompt (sticky history).
    """
    from transformers import DynamicCache

    if not prompt_ids:
        raise ValueError("a prompt needs at least one token")
    cache = DynamicCache(config=hf.config)
    tokens: list[int] = []
    gaps: list[float] = []
    chunk, start = list(prompt_ids), 0
    while len(tokens) < max_tokens:
        logits_V = _read(hf, adapter, chunk, start, len(prompt_ids), cache, generated)[-1]
        best = logits_V.topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        if tokens[-1] in stop_ids:
            break
        start += len(chunk)
        chunk = [tokens[-1]]
    return Reference(tokens, gaps)


@torch.no_grad()
def logprob_reference(
    hf: Any, adapter: AnyAdapter | None, prompt_ids: list[int], answer_ids: list[int]
) -> Logprobs:
    """Log-probabilities of a prompt and of an answer to it under an adapter, or under the bare model.

    ValueError for an empty prompt.
    """
    if not prompt_ids:
        raise ValueError("a prompt needs at least one token")
    text = [*prompt_ids, *answer_ids]
    logits_TV = _read(hf, adapter, text, 0, len(prompt_ids), None)
    chosen_T = logits_TV[:-1].log_softmax(-1).gather(1, torch.tensor(text[1:], device=hf.device)[:, None])
    logprobs = chosen_T[:, 0].tolist()
    return Logprobs(logprobs[: len(prompt_ids) - 1], logprobs[len(prompt_ids) - 1 :])


def _read(
    hf: Any,
    adapter: AnyAdapter | None,
    chunk: list[int],
    start: int,
    prompt_length: int,
    cache: Any,
    generated: Spans = (),
) -> Float[Tensor, "T V"]:
    """Logits after every token of a chunk that begins at position `start`; `cache` None reads it by itself."""
    input_ids_1T = torch.tensor([chunk], device=hf.device)
    position_ids_1T = torch.arange(start, start + len(chunk), device=hf.device)[None]
    mask_of = partial(_mask, position_ids_1T, prompt_length, generated)
    scope = nullcontext() if adapter is None else adapter.applied_to(hf, mask_of)
    with scope:
        output = hf(
            input_ids=input_ids_1T,
            position_ids=position_ids_1T,
            past_key_values=cache,
            use_cache=cache is not None,
        )
    return output.logits[0].float()


def _mask(position_ids_1T: Tensor, prompt_length: int, generated: Spans, phase: Phase) -> Bool[Tensor, "B T"]:
    prompt_lengths_1 = torch.tensor([prompt_length], device=position_ids_1T.device)
    generated_1T = torch.zeros_like(position_ids_1T, dtype=torch.bool)
    for start, end in generated:
        generated_1T |= (start <= position_ids_1T) & (position_ids_1T < end)
    ones_1T = torch.ones_like(position_ids_1T)
    return phase_mask(phase, position_ids_1T, prompt_lengths_1, ones_1T, generated_1T)
