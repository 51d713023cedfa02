"""Settings of training."""

from dataclasses import dataclass

from preft.adapters import AdapterError


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and in what layout.

    `batch_size` rows make a step, over all processes and turns of `gradient_accumulation` together. `packing` packs
    them into rows of at most so many tokens instead of padding. `max_grad_norm` 0 does not clip. `bf16` computes the
    base model under autocast; the adapter stays in float32. `save_every` and `eval_every` count steps, 0 is never.
    """

    steps: int = 40
    batch_size: int = 16
    learning_rate: float = 1e-2
    warmup_steps: int = 5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1
    packing: int | None = None
    gradient_checkpointing: bool = False
    bf16: bool = False
    save_every: int = 0
    eval_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1:
            raise AdapterError(
                f"steps and batch_size must be at least 1, got {self.steps} and {self.batch_size}"
            )
        if self.gradient_accumulation < 1 or (self.packing is not None and self.packing < 1):
            raise AdapterError("gradient_accumulation and packing must be at least 1")
        if min(self.save_every, self.eval_every, self.warmup_steps) < 0:
            raise AdapterError("save_every, eval_every and warmup_steps must not be negative")

    def rate(self, step: int) -> float:
        """Learning-rate factor of a step: up over the warm-up, then down to zero behind the last step."""
        warmup = min(self.warmup_steps, self.steps)
        return min((step + 1) / max(warmup, 1), (self.steps - step) / max(self.steps - warmup + 1, 1))
