"""Training of adapters on the masked forward pass."""

from preft.train.config import TrainConfig
from preft.train.rows import training_rows
from preft.train.sft import Trained, train_adapter

__all__ = ["TrainConfig", "Trained", "train_adapter", "training_rows"]
