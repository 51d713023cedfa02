"""The masked forward pass: a Hugging Face model under an adapter of one phase (PreFT, digest section 1.3).

Training sees prompt and response at once: the adapter acts where the phase mask of the batch is true, the loss is taken
on the labels. Gradient reaches a prefill-only adapter through the response's attention to the prompt's keys and values,
and through the logits of the last prompt token. Positions count real tokens, so padding changes nothing; packed
documents attend to themselves only.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preft.composition import AnyAdapter
from shared.tokens import TokenBatch


class Loss(NamedTuple):
    """Summed negative log-likelihood (nats) of the labelled tokens and their number."""

    total: Tensor
    tokens: int


def adapted(hf: Any, adapter: AnyAdapter | None, batch: TokenBatch) -> AbstractContextManager[None]:
    """The scope in which the model carries the adapter on the batch's tokens of its phase (None: the bare model)."""
    return nullcontext() if adapter is None else adapter.applied_to(hf, batch.phase_mask)


def masked_logits(
    hf: Any, adapter: AnyAdapter | None, batch: TokenBatch, columns_K: Int[Tensor, " K"] | None = None
) -> Float[Tensor, "B T V"]:
    """Logits of the model with the adapter on the tokens of its phase; of the bare model where `adapter` is None.

    With `columns_K` the logits of these columns only (B K V): the unembedding is the widest layer of a small model.
    """
    batch = batch.to(hf.device)
    # Packed rows: without a padding mask transformers derives the documents from the restarting positions.
    attention_mask = None if batch.packed else batch.attention_mask_BT
    with adapted(hf, adapter, batch):
        return hf(
            input_ids=batch.input_ids_BT,
            attention_mask=attention_mask,
            position_ids=batch.position_ids_BT,
            use_cache=False,
            logits_to_keep=0 if columns_K is None else columns_K,
        ).logits


def targets(batch: TokenBatch) -> Int[Tensor, "B T"]:
    """The labels that a token in front predicts: -100 at the first token of every document too."""
    if batch.labels_BT is None:
        raise ValueError("the batch has no labels: build it with shared.tokens.collate or pack")
    return batch.labels_BT.masked_fill(batch.position_ids_BT == 0, -100)


def masked_loss(hf: Any, adapter: AnyAdapter | None, batch: TokenBatch) -> Loss:
    """Negative log-likelihood of the batch's labels (token t is predicted from the logits at t - 1)."""
    labels_BT = targets(batch).to(hf.device)[:, 1:]
    columns_K = (labels_BT != -100).any(0).nonzero()[:, 0]
    labels_BK = labels_BT[:, columns_K]
    keep_BK = labels_BK != -100
    logits_BKV = masked_logits(hf, adapter, batch, columns_K)
    total = torch.nn.functional.cross_entropy(
        logits_BKV[keep_BK].float(), labels_BK[keep_BK], reduction="sum"
    )
    return Loss(total, int(keep_BK.sum()))
