"""Prompts that are read once and continued several times.

The adapted prompt of N prompts is computed in one left-padded forward pass; its keys and values are repeated for the
G continuations of each. Where gradients are enabled the cache stays part of autograd's graph, and the backward pass
sums over the repetitions. Continuations are read in chunks of any width, with the adapter on the tokens of its phase:
the position of a token decides, as everywhere.

Letters: N prompt, G continuation of a prompt, S continuation (S = N G, those of a prompt side by side), P prompt token,
C token of a chunk, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preft.adapters import Adapter
from preft.forward import adapted
from shared.tokens import TokenBatch, pad


class SharedPrompts:
    """`copies` continuations of every prompt, over a cache that holds the prompts' adapted keys and values."""

    def __init__(
        self, hf: Any, adapter: Adapter | None, prompts: Sequence[list[int]], copies: int, pad_id: int
    ) -> None:
        from transformers import DynamicCache

        self.hf, self.adapter = hf, adapter
        self.cache = DynamicCache(config=hf.config)
        batch = pad(prompts, [len(prompt) for prompt in prompts], pad_id, "left").to(hf.device)
        with adapted(hf, adapter, batch):
            logits_N1V = self._run(batch.input_ids_BT, batch.attention_mask_BT, batch.position_ids_BT, keep=1)
        self.cache.batch_repeat_interleave(copies)
        self.mask_ST = batch.attention_mask_BT.repeat_interleave(copies, 0)
        self.prompt_lengths_S = batch.prompt_lengths_B.repeat_interleave(copies)
        self.next_position_S = self.prompt_lengths_S
        self.prompt_logits_SV: Float[Tensor, "S V"] = logits_N1V[:, -1].repeat_interleave(copies, 0)

    def read(self, tokens_SC: Int[Tensor, "S C"], mask_SC: Bool[Tensor, "S C"]) -> Float[Tensor, "S C V"]:
        """Logits of the next tokens of every continuation; what the mask leaves out is padding on the right."""
        offsets_C = torch.arange(tokens_SC.shape[1], device=tokens_SC.device)
        batch = TokenBatch(
            input_ids_BT=tokens_SC,
            attention_mask_BT=mask_SC.long(),
            position_ids_BT=(self.next_position_S[:, None] + offsets_C) * mask_SC,
            prompt_lengths_B=self.prompt_lengths_S,
        )
        self.mask_ST = torch.cat([self.mask_ST, batch.attention_mask_BT], 1)
        self.next_position_S = self.next_position_S + mask_SC.sum(1)
        with adapted(self.hf, self.adapter, batch):
            return self._run(tokens_SC, self.mask_ST, batch.position_ids_BT, keep=0)

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor, keep: int) -> Float[Tensor, "S C V"]:
        output = self.hf(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return output.logits
