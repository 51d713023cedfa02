"""Reinforcement learning of adapters with verifiable rewards."""

from preft.rl.config import GRPOConfig
from preft.rl.rewards import REWARDS, Row, reward
from preft.rl.sampler import HFSampler, VLLMSampler
from preft.rl.trainer import GRPOTrainer, evaluate

__all__ = ["REWARDS", "GRPOConfig", "GRPOTrainer", "HFSampler", "Row", "VLLMSampler", "evaluate", "reward"]
