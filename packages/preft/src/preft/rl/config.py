"""Settings of group-relative policy optimisation; names and meanings are trl's GRPOConfig's where it has them."""

from dataclasses import dataclass

from preft.adapters import AdapterError


@dataclass(frozen=True)
class GRPOConfig:
    """How samples are drawn, judged and learned from.

    A step draws `num_generations` samples for each of `prompts_per_step` prompts and takes `num_iterations` optimiser
    steps on them. `epsilon_high` None equals `epsilon`. `beta` weighs the KL divergence to the base model.
    `max_logprob_gap` (nats) is the most that trainer and sampler may differ on any generated token, None for no limit.
    In float32 they differ by 1e-7 on average, and by up to 2e-5 on the worst of thousands of tokens.
    `groups_per_forward` bounds the trainer's memory: groups in one forward and backward pass.
    CHOICES lists what the three settings in words may be.
    """

    steps: int = 30
    prompts_per_step: int = 4
    num_generations: int = 8
    max_completion_length: int = 48
    temperature: float = 1.0
    learning_rate: float = 1e-2
    warmup_steps: int = 3
    max_grad_norm: float = 1.0
    num_iterations: int = 1
    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.0
    scale_rewards: str = "group"
    importance_sampling_level: str = "token"
    loss_type: str = "dapo"
    share_prompt: bool = True
    groups_per_forward: int = 4
    max_logprob_gap: float | None = 1e-4
    checkpoint_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "prompts_per_step",
            "max_completion_length",
            "num_iterations",
            "groups_per_forward",
        ):
            if getattr(self, name) < 1:
                raise AdapterError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_generations < 2:
            raise AdapterError("num_generations must be at least 2: a sample is judged against its group")
        if self.temperature <= 0:
            raise AdapterError(
                f"temperature must be above 0 to draw different samples, not {self.temperature}"
            )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise AdapterError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")


COUNTS = (
    "steps",
    "prompts_per_step",
    "max_completion_length",
    "num_iterations",
    "groups_per_forward",
    "checkpoint_every",
)
CHOICES = {
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "loss_type": ("grpo", "dapo", "dr_grpo"),
}
