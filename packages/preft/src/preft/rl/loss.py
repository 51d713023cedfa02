"""The objective of GRPO (Shao et al. 2024, https://arxiv.org/abs/2402.03300), as trl computes it.

For a group of G samples o_i of one prompt with rewards r_i, and rho_it = pi(o_it) / pi_old(o_it):

    A_i  = (r_i - mean_j r_j) / (s + 1e-4)          s: standard deviation of the group, of the batch, or none
    l_it = -min(rho_it A_i, clip(rho_it, 1 - epsilon, 1 + epsilon_high) A_i) + beta k_it
    k_it = pi_ref / pi - log(pi_ref / pi) - 1        an unbiased estimate of KL(pi || base model), never negative

With `importance_sampling_level="sequence"` (GSPO) rho_i is the geometric mean over the sample's tokens. The loss is

    grpo      the mean over samples of the mean over tokens of l
    dapo      the mean over all tokens of the step
    dr_grpo   the sum over tokens divided by samples x max_completion_length

The normaliser belongs to the whole step, so the sum over its forward passes is the loss whatever their number.

Letters: N prompt, G sample of a prompt, S sample (S = N G), C completion token.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preft.rl.config import GRPOConfig


class PolicyLoss(NamedTuple):
    """The share of the step's loss, and sums over the tokens it was computed on: clipped ones, KL (nats)."""

    loss: Tensor
    clipped: Tensor
    kl: Tensor


def advantages(rewards_NG: Float[Tensor, "N G"], scale_rewards: str) -> Float[Tensor, "N G"]:
    """How much better each sample is than its group."""
    centred_NG = rewards_NG - rewards_NG.mean(1, keepdim=True)
    match scale_rewards:
        case "group":
            return centred_NG / (rewards_NG.std(1, keepdim=True) + 1e-4)
        case "batch":
            return centred_NG / (rewards_NG.std() + 1e-4)
        case _:
            return centred_NG


def sample_weights(lengths_S: Int[Tensor, " S"], config: GRPOConfig) -> Float[Tensor, " S"]:
    """The weight of the loss of every token of a sample, in a step of samples this long: `loss_type`."""
    lengths_S = lengths_S.float()
    match config.loss_type:
        case "grpo":
            return 1 / lengths_S / len(lengths_S)
        case "dapo":
            return torch.ones_like(lengths_S) / lengths_S.sum()
        case _:
            return torch.ones_like(lengths_S) / (len(lengths_S) * config.max_completion_length)


def policy_loss(
    logprobs_SC: Float[Tensor, "S C"],
    old_SC: Float[Tensor, "S C"],
    base_SC: Float[Tensor, "S C"] | None,
    advantages_S: Float[Tensor, " S"],
    weights_S: Float[Tensor, " S"],
    mask_SC: Bool[Tensor, "S C"],
    config: GRPOConfig,
) -> PolicyLoss:
    """Clipped objective of some samples of a step; `weights_S` are theirs among the step's `sample_weights`.

    Log-probabilities are of the sampling distribution (at the sampling temperature); `base_SC` those of the base model,
    None where beta is 0.
    """
    log_ratio_SC = logprobs_SC - old_SC
    if config.importance_sampling_level == "sequence":
        lengths_S = mask_SC.sum(1).clamp(min=1)
        log_ratio_SC = ((log_ratio_SC * mask_SC).sum(1) / lengths_S)[:, None].expand_as(log_ratio_SC)
    ratio_SC = log_ratio_SC.exp()
    low, high = (
        1 - config.epsilon,
        1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high),
    )
    advantages_S1 = advantages_S[:, None]
    token_SC = -torch.minimum(ratio_SC * advantages_S1, ratio_SC.clamp(low, high) * advantages_S1)
    clipped_SC = ((ratio_SC < low) & (advantages_S1 < 0)) | ((ratio_SC > high) & (advantages_S1 > 0))
    kl_SC = torch.zeros_like(logprobs_SC)
    if base_SC is not None:
        kl_SC = (base_SC - logprobs_SC).exp() - (base_SC - logprobs_SC) - 1
    loss = ((token_SC + config.beta * kl_SC) * mask_SC * weights_S[:, None]).sum()
    return PolicyLoss(loss, (clipped_SC & mask_SC).sum(), (kl_SC.detach() * mask_SC).sum())
