"""Log-probabilities of sampled completions under the adapter, with gradients, in two ways that agree.

**Plain.** One row a sample: prompt and completion in one forward pass, the adapter on the tokens of its phase.

**Shared prompt** (digest, T13). The G samples of a prompt share n, and so the adapted prompt: it is read once and its
keys and values serve all samples (`preft.rl.prefix`). The first token's log-probability comes from the prompt's last
logits. A group then costs P + G C tokens instead of G (P + C), and an adapter of phase prefill works on P of them. The
gradients are those of the plain way up to rounding.

Letters: S sample, C completion token, T token of a row, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from preft.adapters import Adapter
from preft.forward import masked_logits
from preft.rl.prefix import SharedPrompts
from shared.tokens import pad


class Group(NamedTuple):
    """A prompt's token ids and those of its samples."""

    prompt: list[int]
    completions: list[list[int]]


class Completions(NamedTuple):
    """Completions of several groups, right-padded; `mask_SC` is true at real tokens."""

    tokens_SC: Int[Tensor, "S C"]
    mask_SC: Bool[Tensor, "S C"]


class TokenLogprobs(NamedTuple):
    """Of every completion token, in nats: under the model itself, and at the sampling temperature; 0 at padding."""

    raw_SC: Float[Tensor, "S C"]
    tempered_SC: Float[Tensor, "S C"]


def pad_completions(rows: Sequence[list[int]], pad_id: int, device: Any = "cpu") -> Completions:
    """The completions as one right-padded batch."""
    batch = pad(rows, [1] * len(rows), pad_id, "right").to(device)
    return Completions(batch.input_ids_BT, batch.attention_mask_BT.bool())


def completion_logprobs(
    hf: Any,
    adapter: Adapter | None,
    groups: Sequence[Group],
    pad_id: int,
    temperature: float = 1.0,
    share_prompt: bool = True,
) -> TokenLogprobs:
    """Log-probabilities of all samples of the groups, which hold equally many each.

    Only the tempered ones carry gradients; at temperature 1 the two are equal.
    """
    completions = pad_completions([c for group in groups for c in group.completions], pad_id, hf.device)
    logits = shared_prompt_logits if share_prompt else plain_logits
    logits_SCV = logits(hf, adapter, groups, completions, pad_id).float()
    tempered_SC = _chosen(logits_SCV / temperature, completions)
    if temperature == 1:
        return TokenLogprobs(tempered_SC.detach(), tempered_SC)
    return TokenLogprobs(_chosen(logits_SCV.detach(), completions), tempered_SC)


def shared_prompt_logits(
    hf: Any, adapter: Adapter | None, groups: Sequence[Group], completions: Completions, pad_id: int
) -> Float[Tensor, "S C V"]:
    """Logits that predict each completion token; every prompt is read once."""
    copies = len(groups[0].completions)
    prompts = SharedPrompts(hf, adapter, [group.prompt for group in groups], copies, pad_id)
    first_S1V = prompts.prompt_logits_SV[:, None]
    if completions.tokens_SC.shape[1] == 1:
        return first_S1V
    rest_SCV = prompts.read(completions.tokens_SC[:, :-1], completions.mask_SC[:, :-1])
    return torch.cat([first_S1V, rest_SCV], 1)


def plain_logits(
    hf: Any, adapter: Adapter | None, groups: Sequence[Group], completions: Completions, pad_id: int
) -> Float[Tensor, "S C V"]:
    """Logits that predict each completion token; one row a sample, its prompt included."""
    rows = [group.prompt + completion for group in groups for completion in group.completions]
    lengths = [len(group.prompt) for group in groups for _ in group.completions]
    logits_STV = masked_logits(hf, adapter, pad(rows, lengths, pad_id, "right"))
    starts_S1 = torch.tensor(lengths, device=logits_STV.device)[:, None] - 1
    columns_SC = starts_S1 + torch.arange(completions.tokens_SC.shape[1], device=logits_STV.device)
    columns_SC = columns_SC.clamp(max=logits_STV.shape[1] - 1)  # padding has no logits of its own
    return logits_STV.gather(1, columns_SC[..., None].expand(-1, -1, logits_STV.shape[2]))


def _chosen(logits_SCV: Float[Tensor, "S C V"], completions: Completions) -> Float[Tensor, "S C"]:
    tokens_SC, mask_SC = completions
    losses_K = cross_entropy(logits_SCV.flatten(0, 1), tokens_SC.flatten(), reduction="none")
    return -losses_K.view_as(tokens_SC) * mask_SC
