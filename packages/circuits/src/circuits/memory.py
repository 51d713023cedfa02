"""How much memory a run will take, stated before it starts, and refused where it is more than there is.

A count of the tensors that live at once, from shapes alone (digest 3.5): what one forward pass leaves at every site,
the frozen coefficients, logits, scores, and the few rows of attention patterns alive at a time. Patterns of H T^2
appear nowhere but in eager attention. Estimators that differentiate keep autograd's graph of one pass beside that.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from circuits.bases import basis_named
from circuits.frozen_attention import ROWS
from shared.errors import UserError

if TYPE_CHECKING:
    from shared.models import Model
    from shared.tokens import TokenBatch

GIB = 2**30
GRADIENTS = ("atp", "ig_activations", "ig_inputs", "conductance", "relp_qk_open", "relp_norm_open")
SAVED = (
    2.0  # tensors that autograd keeps for each one that a capture sees: products keep both of their factors
)


class NotEnoughMemoryError(UserError):
    """A run would take more memory than its limit."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what takes them; the model's own weights are not counted, since they are there already."""

    sites: int
    coefficients: int
    logits: int
    scores: int
    patterns: int
    gradients: int
    experts: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = {name: size for name, size in vars(self).items() if size}
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        return f"{self.total / GIB:.2f} GiB ({listed})"


def estimate(
    model: "Model",
    n_rows: int,
    n_tokens: int,
    n_targets: int = 1,
    estimator: str = "relp",
    basis: str = "neurons",
) -> MemoryEstimate:
    """Return the memory that scoring a batch of n_rows prompts of n_tokens takes, by what takes it."""
    a, tokens = model.architecture, n_rows * n_tokens
    working = torch.finfo(model.dtype).bits // 8 if model.dtype == torch.float64 else 4
    copies = working if model.dtype in (torch.float32, torch.float64) else working + 2
    heads, values = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    streams = 6 * a.width + 2 * heads + 2 * values
    preactivations = (2 if a.gated else 1) * a.n_neurons
    site_bytes = tokens * a.n_layers * (streams + preactivations + a.n_neurons) * copies
    # Coefficients take the place of the pre-activations layer by layer; norm scales are as wide as the stream.
    coefficient_bytes = tokens * (a.n_layers * (2 * a.width + 2 * heads) + 2 * a.n_neurons) * working
    width = a.site_width(basis_named(basis).sites(a)[0])
    score_bytes = tokens * a.n_layers * width * (n_targets + 2) * working  # activations, differences, scores
    step_bytes = tokens * n_targets * (2 * a.n_neurons + 6 * a.width + 3 * heads) * working
    rows = n_tokens if model.hf.config._attn_implementation == "eager" else min(ROWS, n_tokens)
    pattern_bytes = n_rows * a.n_heads * rows * n_tokens * 3 * working
    sparse = any(a.experts(layer) for layer in range(a.n_layers))
    gradient_bytes = int(SAVED * site_bytes) if estimator in GRADIENTS else 0
    return MemoryEstimate(
        sites=site_bytes,
        coefficients=coefficient_bytes,
        logits=tokens * a.vocab_size * (copies + working),
        scores=score_bytes + step_bytes,
        patterns=pattern_bytes,
        gradients=gradient_bytes,
        # The matrices of all experts of one block side by side, and one more while that is made.
        experts=2 * a.n_neurons * a.width * working if sparse else 0,
    )


def available_bytes(device: torch.device) -> int:
    """Return the memory that is free where the model lies."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def require_memory(
    model: "Model",
    batch: "TokenBatch",
    limit: int | None = None,
    estimator: str = "relp",
    basis: str = "neurons",
    n_targets: int = 1,
) -> MemoryEstimate:
    """Return the estimate for a batch; NotEnoughMemoryError above `limit` bytes (default: what is available)."""
    n_rows, n_tokens = batch.input_ids_BT.shape
    wanted = estimate(model, n_rows, n_tokens, n_targets, estimator, basis)
    limit = available_bytes(model.device) if limit is None else limit
    if wanted.total > limit:
        raise NotEnoughMemoryError(
            f"scoring {n_rows} prompts of {n_tokens} tokens (targets: {n_targets}) takes about {wanted}, and "
            f"{limit / GIB:.2f} GiB are allowed or available: take fewer prompts at once, shorter ones, or another "
            "device"
        )
    return wanted
