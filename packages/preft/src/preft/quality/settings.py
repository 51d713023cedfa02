"""Settings of the adapter_quality pipeline, refused when they do not fit each other, before a model is loaded."""

from dataclasses import dataclass, field

from preft.adapters import AdapterError
from preft.throughput import ThroughputConfig
from preft.train import TrainConfig

NONE, MEASURED = "none", "measured"


@dataclass(frozen=True)
class AdapterQualityConfig:
    """Users, arms, tuning and measurements; chats are counted per user.

    `data`: "tinyworld", or a folder with one USER.jsonl of chats a user. `rates`: the grid of learning rates. The
    `steps` of `train` hold for every arm; its learning rate is not used. `answer_ranks`: where greedy answers are
    judged too. `throughput`: "measured", "none", or the JSON file of a serving benchmark.
    """

    data: str = "tinyworld"
    users: int = 3
    tuning_users: int = 1
    seeds: int = 3
    train_chats: int = 200
    validation_chats: int = 48
    heldout_chats: int = 48
    arms: tuple[str, ...] = ("lora", "lora_p", "reft", "reft_p")
    ranks: tuple[int, ...] = (1, 8, 32, 64)
    prefix_tokens: tuple[int, ...] = (2, 16, 64)
    shown_chats: tuple[int, ...] = (2, 4)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=8))
    answers: int = 24
    answer_ranks: tuple[int, ...] = (8, 64)
    answer_tokens: int = 48
    throughput: str = NONE
    trace: ThroughputConfig = field(default_factory=lambda: ThroughputConfig(adapters=32))
    trace_ranks: tuple[int, ...] = (1, 8, 64)

    def __post_init__(self) -> None:
        from preft.quality.arms import ADAPTERS

        if unknown := sorted(set(self.arms) - set(ADAPTERS)):
            raise AdapterError(f"arms {', '.join(unknown)} are not among {', '.join(ADAPTERS)}")
        if "lora" not in self.arms:
            raise AdapterError("arms needs lora, on all tokens: the others are compared with it")
        counts = ("users", "tuning_users", "seeds", "train_chats", "validation_chats", "heldout_chats")
        if small := [name for name in counts if getattr(self, name) < 1]:
            raise AdapterError(f"{', '.join(small)} must be at least 1")
        for name in ("ranks", "rates"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)) or values[0] <= 0:
                raise AdapterError(f"{name} must be positive and ascending, got {list(values)}")
        for name in ("answer_ranks", "trace_ranks"):
            if missing := sorted(set(getattr(self, name)) - set(self.ranks)):
                raise AdapterError(f"{name}: no adapters of ranks {missing} are trained; add them to ranks")
