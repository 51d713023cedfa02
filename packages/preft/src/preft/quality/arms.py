"""The arms of the study: what is trained, at which size, and what then computes losses and answers.

An arm's size is the rank of an adapter, or the number of virtual tokens of a prefix. LoRA acts on every linear layer of
the blocks, DiReFT on every block's output; each on all tokens, or on the prompt's alone (-P).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from preft.adapters import Adapter, AdapterConfig
from preft.forward import masked_logits
from preft.quality.measures import Logits, Prefilled, greedy_answers, rows_of
from preft.quality.prefix import train_prefix
from preft.train import TrainConfig, train_adapter
from shared.models import Model
from shared.tokens import Message, Phase, TokenBatch

ADAPTERS = {
    "lora": AdapterConfig("lora", phase=Phase.ALL),
    "lora_p": AdapterConfig("lora"),
    "reft": AdapterConfig("direft", phase=Phase.ALL),
    "reft_p": AdapterConfig("direft"),
}
PREFIX = "prefix"
LABELS = {
    "base": "base",
    "lora": "LoRA, all tokens",
    "lora_p": "LoRA-P",
    "reft": "DiReFT, all tokens",
    "reft_p": "DiReFT-P",
    PREFIX: "prefix tuning",
}


class Trained(NamedTuple):
    """What training left: the model under it, and the number of trained values."""

    model: Model
    adapter: Adapter | None
    prefix: Prefilled | None
    logits: Logits
    parameters: int

    def answers(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Greedy tokens of each prompt."""
        return greedy_answers(self.model, self.adapter, prompts, max_tokens, self.prefix)


def bare(model: Model) -> Trained:
    """The model itself."""
    return Trained(model, None, None, lambda batch: masked_logits(model.hf, None, batch), 0)


def train(
    model: Model, arm: str, size: int, chats: Sequence[Sequence[Message]], config: TrainConfig
) -> Trained:
    """Train an arm of a size on chats."""
    if arm == PREFIX:
        prefix = train_prefix(model.hf, model.tokenizer, rows_of(model.tokenizer, chats), size, config)
        return Trained(model, None, prefix, prefix.logits, prefix.n_parameters())
    adapter_config = replace(ADAPTERS[arm], rank=size)
    adapter = train_adapter(model.hf, model.tokenizer, chats, adapter_config, config).adapter

    def logits(batch: TokenBatch) -> Float[Tensor, "B T V"]:
        return masked_logits(model.hf, adapter, batch)

    return Trained(model, adapter, None, logits, adapter.n_parameters())
