"""Generation in process: one forward pass a step over a key/value cache, each under the active captures and edits.

Step 0 reads the prompt (left-padded); step s reads the token generated at step s - 1, which sits at the position after
the last one, so the masks of its phase are those of the definition in `shared.tokens`. Running the steps here, one
nnsight trace each, keeps every edit exact: nothing depends on how often a library calls the model.

Log-probabilities are of the model's own distribution (after final soft cap and edits, before temperature and top-p).
Shape letters: B batch, T token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shared.errors import UserError
from shared.hooks import run
from shared.tokens import TokenBatch

if TYPE_CHECKING:
    from shared.models import Model


@dataclass(frozen=True)
class Generated:
    """New tokens of each row (the stop token included), their log-probabilities, and those of the likeliest tokens.

    `top_logprobs`: token id to log-probability, likeliest first, at every new token (empty where not asked for).
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    top_logprobs: list[list[dict[int, float]]]


class NewTokens(NamedTuple):
    """One more token of every row, its log-probability, and the likeliest tokens (no rows where not asked for)."""

    tokens_B: Int[Tensor, " B"]
    logprobs_B: Float[Tensor, " B"]
    likeliest: list[dict[int, float]]


def generate(
    model: Model,
    batch: TokenBatch,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop_token_ids: Sequence[int] | None = None,
    top_logprobs: int = 0,
) -> Generated:
    """Continue every row of a left-padded batch; greedy at temperature 0.

    A row stops at a stop token (default: the model's end-of-sequence tokens; an empty list never stops). Sampling
    draws row i from its own generator seeded with `seed + i`, or with `seed[i]`, so rows do not depend on the batch.
    """
    stops = set(model.eos_token_ids if stop_token_ids is None else stop_token_ids)
    tokens: list[list[int]] = [[] for _ in range(len(batch))]
    logprobs: list[list[float]] = [[] for _ in range(len(batch))]
    tops: list[list[dict[int, float]]] = [[] for _ in range(len(batch))]
    alive = [True] * len(batch)
    for new in steps(model, batch, max_new_tokens, temperature, top_p, seed, top_logprobs):
        for row, (token, logprob) in enumerate(zip(new.tokens_B.tolist(), new.logprobs_B.tolist())):
            if alive[row]:
                tokens[row].append(token)
                logprobs[row].append(logprob)
                tops[row] += new.likeliest[row : row + 1]
                alive[row] = token not in stops
        if not any(alive):
            break
    return Generated(tokens, logprobs, tops)


@torch.no_grad()
def steps(
    model: Model,
    batch: TokenBatch,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    top_logprobs: int = 0,
) -> Iterator[NewTokens]:
    """The steps of a generation as they are computed, at most `max_new_tokens`; whoever iterates stops it.

    The edits active while a step is computed are those of that step.
    """
    _check(batch, max_new_tokens, temperature, top_p, seed)
    if model.config.remote:
        raise UserError("Generation runs in process only: load the model with remote=False.")
    batch = batch.to(model.device)
    seeds = [seed + i for i in range(len(batch))] if isinstance(seed, int) else list(seed)
    generators = [torch.Generator(device="cpu").manual_seed(s) for s in seeds]
    model.active.begin()
    cache = _new_cache(model)
    for _ in range(max_new_tokens):
        logits_BV = _step(model, batch, cache)
        chosen_B, logprobs_B = choose(logits_BV, temperature, top_p, generators)
        yield NewTokens(chosen_B, logprobs_B, _likeliest(logits_BV, top_logprobs))
        batch = _next(batch, chosen_B)


def choose(
    logits_BV: Float[Tensor, "B V"], temperature: float, top_p: float, generators: list[torch.Generator]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """One token a row, and its log-probability under the untempered distribution."""
    logits_BV = logits_BV.float()
    logprobs_BV = logits_BV.log_softmax(-1)
    if temperature == 0:
        chosen_B = logits_BV.argmax(-1)
    else:
        probs_BV = nucleus((logits_BV / temperature).softmax(-1), top_p).cpu()
        draws = [torch.multinomial(probs_V, 1, generator=g) for probs_V, g in zip(probs_BV, generators)]
        chosen_B = torch.cat(draws).to(logits_BV.device)
    return chosen_B, logprobs_BV.gather(-1, chosen_B[:, None]).squeeze(-1)


def _likeliest(logits_BV: Float[Tensor, "B V"], top: int) -> list[dict[int, float]]:
    """The `top` likeliest tokens of each row with their log-probabilities, likeliest first; no rows when top is 0."""
    if not top:
        return []
    values_BK, ids_BK = logits_BV.float().log_softmax(-1).topk(min(top, logits_BV.shape[-1]), dim=-1)
    return [dict(zip(ids, values)) for ids, values in zip(ids_BK.tolist(), values_BK.tolist())]


def nucleus(probs_BV: Float[Tensor, "B V"], top_p: float) -> Float[Tensor, "B V"]:
    """Keep the smallest set of most likely tokens with at least `top_p` of the mass, renormalised."""
    if top_p >= 1:
        return probs_BV
    sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
    kept_BV = sorted_BV.cumsum(-1) - sorted_BV < top_p
    masked_BV = torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV * kept_BV)
    return masked_BV / masked_BV.sum(-1, keepdim=True)


def _step(model: Model, batch: TokenBatch, cache: Any) -> Float[Tensor, "B V"]:
    """Run the columns that are not in the cache yet; returns the logits of the last column."""
    seen = cache.get_seq_length()
    fresh = replace(
        batch,
        input_ids_BT=batch.input_ids_BT[:, seen:],
        attention_mask_BT=batch.attention_mask_BT[:, seen:],
        position_ids_BT=batch.position_ids_BT[:, seen:],
        generated_BT=None if batch.generated_BT is None else batch.generated_BT[:, seen:],
        labels_BT=None,
    )
    # The unembedding of a long prompt is only needed where a hook looks at it.
    hooked = {"final_norm", "logits"} & model.active.sites()
    output = run(
        model,
        fresh,
        logits_to_keep=0 if hooked else 1,
        input_ids=fresh.input_ids_BT,
        attention_mask=batch.attention_mask_BT,
        position_ids=fresh.position_ids_BT,
        past_key_values=cache,
        use_cache=True,
    )
    return output.logits[:, -1]


def _next(batch: TokenBatch, chosen_B: Int[Tensor, " B"]) -> TokenBatch:
    """The batch with one more real token a row."""
    one_B1 = torch.ones_like(chosen_B[:, None])
    return replace(
        batch,
        input_ids_BT=torch.cat([batch.input_ids_BT, chosen_B[:, None]], 1),
        attention_mask_BT=torch.cat([batch.attention_mask_BT, one_B1], 1),
        position_ids_BT=torch.cat([batch.position_ids_BT, batch.position_ids_BT[:, -1:] + 1], 1),
        generated_BT=None
        if batch.generated_BT is None
        else torch.cat([batch.generated_BT, torch.zeros_like(one_B1, dtype=torch.bool)], 1),
        labels_BT=None,
    )


def _new_cache(model: Model) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.hf.config)


def _check(
    batch: TokenBatch, max_new_tokens: int, temperature: float, top_p: float, seed: int | Sequence[int]
) -> None:
    if batch.packed:
        raise UserError("Packed rows cannot be continued: encode one document a row.")
    if not batch.attention_mask_BT[:, -1].all():
        raise UserError("Generation needs left padding: use model.encode(rows, padding_side='left').")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature must be >= 0 and top_p in (0, 1], not {temperature} and {top_p}.")
    if not isinstance(seed, int) and len(seed) != len(batch):
        raise UserError(f"{len(seed)} seeds for {len(batch)} rows.")
