"""Does the frozen network reproduce the model at hand? By component, and as one number: the conservation error.

`check_block` and `check_logits` replay each frozen component on what it read and compare it with what the model
computed, at up to `COLUMNS` positions of every example spread over its length (a window or a mask that is wrong shows
at the far ones), so that the check costs a small part of the pass it checks. A model whose structure differs from its
family's row is refused by the name of the part that fails.

`check(model)` does so on a short random prompt and returns by how much relevance misses the metric (digest I1).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.layers import FrozenBlock
from circuits.rules import Rules
from shared.errors import UserError

if TYPE_CHECKING:
    from circuits.frozen import FrozenNetwork
    from shared.models import Model

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
COLUMNS = 8


class LinearizeError(UserError):
    """A frozen component does not reproduce the model; the message names it."""


@dataclass(frozen=True)
class SelfCheck:
    """What `check` found: the conservation error of the model at hand, and what its precision allows."""

    conservation_error: float
    allowed: float
    family: str
    dtype: str


def check(model: "Model", seed: int = 0, length: int = 12) -> SelfCheck:
    """Freeze the model on a random prompt and return its conservation error; LinearizeError where it does not close."""
    from circuits.linearize import linearize
    from circuits.metric import top_logits
    from circuits.relp import relp
    from shared.tokens import pad

    vocabulary = model.architecture.vocab_size
    ids = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    network = linearize(model, pad([ids], [length], 0))
    metric = top_logits(network.logits_BTV, torch.tensor([length - 1], device=model.device))
    error, allowed = relp(network, metric).ledger.error(), TOLERANCE[model.dtype]
    require_conservation(error, allowed)
    return SelfCheck(error, allowed, model.architecture.family, str(model.dtype).removeprefix("torch."))


def require_conservation(error: float, allowed: float) -> None:
    """Raise LinearizeError where relevance misses the metric by more than the model's precision explains."""
    if not error <= allowed:
        raise LinearizeError(
            f"relevance is not conserved: the sum over all sources misses the metric by {error:.1e} of its value (of "
            f"the absolute relevance, where the value is below a tenth of that); allowed is {allowed:.0e}. Run the "
            "model in float32, and without adapters or active edits."
        )


def sampled_columns(n_columns: int, device: torch.device) -> Int[Tensor, " S"]:
    """Return up to COLUMNS columns, evenly spread, the first and the last among them."""
    if n_columns <= COLUMNS:
        return torch.arange(n_columns, device=device)
    return torch.linspace(0, n_columns - 1, COLUMNS, device=device).round().long()


def check_finite(logits_BTV: Float[Tensor, "B T V"], real_BT: Bool[Tensor, "B T"]) -> None:
    """Raise LinearizeError where the model's own logits are not finite."""
    if not logits_BTV[real_BT].isfinite().all():
        raise LinearizeError(
            "the model's own logits are not finite on this batch. Transformers' eager attention does this in float64 "
            "under left padding: pad on the right, or load the model in float32."
        )


def check_block(
    block: FrozenBlock, acts: dict[str, Tensor], layer: int, rules: Rules, tolerance: float
) -> None:
    """Compare one block's attention, neurons and MLP with the model; LinearizeError names the first miss."""
    at, real_BT = f"blocks.{layer}.", block.attention.real_BT
    columns_S = sampled_columns(real_BT.shape[1], real_BT.device)
    input_BTD, attn_BTD, neurons_BTN = acts[at + "input"], acts[at + "attn_out"], acts[at + "neurons"]
    read_BTD = input_BTD if block.parallel else input_BTD + attn_BTD
    few = block.select(slice(None), columns_S)
    found = {
        "attn_out": (block.attention_at(input_BTD[:, None], columns_S), attn_BTD),
        "mlp_out": (few.write_forward(neurons_BTN[:, columns_S][:, None]), acts[at + "mlp_out"]),
    }
    if rules == Rules():
        found["neurons"] = (few.neurons_forward(read_BTD[:, columns_S][:, None]), neurons_BTN)
    for name, (mine, theirs) in found.items():
        _compare(at + name, mine[:, 0], theirs[:, columns_S], real_BT[:, columns_S], tolerance)


def check_logits(network: "FrozenNetwork", tolerance: float) -> None:
    """Compare the unembedding with the model; LinearizeError where they differ."""
    real_BT = network.real_BT
    columns_S = sampled_columns(real_BT.shape[1], real_BT.device)
    mine_BSV = affine(network.final_BTD[:, columns_S], network.unembed_VD, network.unembed_bias_V)
    if network.soft_cap is not None:
        mine_BSV = network.soft_cap * torch.tanh(mine_BSV / network.soft_cap)
    _compare("logits", mine_BSV, network.logits_BTV[:, columns_S], real_BT[:, columns_S], tolerance)


def affine(
    x: Float[Tensor, "*B X"], weight: Float[Tensor, "Y X"], bias: Float[Tensor, " Y"] | None
) -> Tensor:
    """Return W x + b of every row."""
    return torch.nn.functional.linear(x, weight, bias)


def _compare(name: str, mine: Tensor, theirs: Tensor, real_BT: Tensor, tolerance: float) -> None:
    difference = (mine - theirs)[real_BT].abs().max()
    scale = theirs[real_BT].abs().max().clamp_min(torch.finfo(theirs.dtype).tiny)
    if not difference <= tolerance * scale:
        raise LinearizeError(
            f"the frozen network does not reproduce {name}: off by {float(difference / scale):.1e} of its largest "
            f"value (allowed {tolerance:.0e}). This model computes something its family's row in shared.architecture "
            "does not state (another attention implementation, an adapter, an active edit?); "
            "remove it or trace another model."
        )
