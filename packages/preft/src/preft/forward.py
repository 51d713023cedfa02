"""The masked forward pass: a Hugging Face model under an adapter of one phase (PreFT, digest section 1.3).

Training sees prompt and response at once: the adapter acts where the phase mask of the batch is true, the loss is taken
on the labels. Gradient reaches a prefill-only adapter through the response's attention to the prompt's keys and values,
and through the logits of the last prompt token. Positions count real tokens, so padding changes nothing; packed
documents attend to themselves only.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from preft.adapters import Adapter
from shared.tokens import TokenBatch


class Loss(NamedTuple):
    """Summed negative log-likelihood (nats) of the labelled tokens and their number."""

    total: Tensor
    tokens: int


def masked_logits(hf: Any, adapter: Adapter | None, batch: TokenBatch) -> Float[Tensor, "B T V"]:
    """Logits of the model with the adapter on the tokens of its phase; of the bare model where `adapter` is None."""
    batch = batch.to(hf.device)
    scope = nullcontext() if adapter is None else adapter.applied(hf, batch.phase_mask(adapter.config.phase))
    # Packed rows: without a padding mask transformers derives the documents from the restarting positions.
    attention_mask = None if batch.packed else batch.attention_mask_BT
    with scope:
        return hf(
            input_ids=batch.input_ids_BT,
            attention_mask=attention_mask,
            position_ids=batch.position_ids_BT,
            use_cache=False,
        ).logits


def masked_loss(hf: Any, adapter: Adapter | None, batch: TokenBatch) -> Loss:
    """Negative log-likelihood of the batch's labels (token t is predicted from the logits at t - 1)."""
    if batch.labels_BT is None:
        raise ValueError("the batch has no labels: build it with shared.tokens.collate or pack")
    labels_BT = batch.labels_BT.to(hf.device)[:, 1:]
    logits_BTV = masked_logits(hf, adapter, batch)[:, :-1]
    keep_BT = labels_BT != -100
    total = torch.nn.functional.cross_entropy(
        logits_BTV[keep_BT].float(), labels_BT[keep_BT], reduction="sum"
    )
    return Loss(total, int(keep_BT.sum()))
