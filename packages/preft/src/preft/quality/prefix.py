"""Prefix tuning (Li and Liang 2021) with peft, trained as adapters are: keys and values in front of every prompt.

peft holds and shapes the parameters (`PrefixTuningConfig`); the forward pass is the model's own over a cache that
already holds the prefix, tokens at positions from `tokens` on, which is what peft's own forward computes (a test).
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preft.forward import targets
from preft.train import TrainConfig
from preft.train.module import frozen
from preft.train.rows import Layout, padding_id, schedule
from shared.tokens import TokenBatch, TrainingRow


class Prefix(nn.Module):
    """`tokens` virtual tokens in front of every row of a Hugging Face model, which is left as it was."""

    def __init__(self, hf: Any, tokens: int, seed: int = 0) -> None:
        from peft import PrefixTuningConfig, get_peft_model

        super().__init__()
        self.tokens = tokens
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
        with frozen(hf), torch.random.fork_rng():
            torch.manual_seed(seed)
            self.peft = get_peft_model(hf, config)

    def n_parameters(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.peft.prompt_encoder.parameters())

    def cache(self, batch_size: int) -> Any:
        """A cache that holds the prefix in every row."""
        return self.peft.get_prompt(batch_size)

    def logits(self, batch: TokenBatch) -> Float[Tensor, "B T V"]:
        """Logits of a padded batch behind the prefix."""
        hf: Any = self.peft.get_base_model()
        batch = batch.to(hf.device)
        mask_BT = batch.attention_mask_BT
        return hf(
            input_ids=batch.input_ids_BT,
            attention_mask=torch.cat([mask_BT.new_ones(len(batch), self.tokens), mask_BT], 1),
            position_ids=batch.position_ids_BT + self.tokens,
            past_key_values=self.cache(len(batch)),
            use_cache=True,
        ).logits


def train_prefix(
    hf: Any, tokenizer: Any, rows: Sequence[TrainingRow], tokens: int, config: TrainConfig
) -> Prefix:
    """Train a prefix on the loss, steps, batches and schedule that adapters are trained with (`train_adapter`)."""
    prefix = Prefix(hf, tokens, config.seed)
    parameters = list(prefix.peft.prompt_encoder.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=False
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, config.rate)
    layout = Layout(padding_id(tokenizer))
    with frozen(hf):
        for numbers in schedule(rows, config.batch_size, config.steps, config.seed):
            batch = layout.batch([rows[i] for i in numbers])
            labels_BT = targets(batch)[:, 1:].to(hf.device)
            loss = torch.nn.functional.cross_entropy(
                prefix.logits(batch)[:, :-1].float().transpose(1, 2), labels_BT, ignore_index=-100
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            rate.step()
    return prefix
