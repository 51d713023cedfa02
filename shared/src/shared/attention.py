"""Attention patterns A of every block, exactly as the model's own eager attention computes them.

The pass is run once more with eager attention (the setting is put back whatever happens), under the active edits, and
nnsight hands over the weights that each attention module returns. Rotary embedding, query/key norms, sliding windows
and soft caps are therefore the model's own code and not a copy of it. With V the values of each head,

    attn_out = post_norm(W_O concat_h(A_h V_h) + b_O)        (tests/shared/test_attention.py)

Shape letters: B batch, T token (query, key), H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from shared.architecture import Slot
from shared.hooks import Step, forward_inputs, make_plan, traced

if TYPE_CHECKING:
    from shared.models import Model
    from shared.tokens import TokenBatch


def attention_patterns(model: Model, batch: TokenBatch) -> list[Float[Tensor, "B H T T"]]:
    """A of each block: row t holds the weights with which token t reads every token; rows of padding mean nothing.

    Under the active edits; captures are not touched. Part of autograd's graph when gradients are enabled.
    """
    batch = batch.to(model.device)
    architecture = model.architecture
    names = [f"blocks.{layer}.pattern" for layer in range(architecture.n_layers)]
    plan = make_plan(architecture, model.active, batch)
    for layer, name in enumerate(names):
        path = architecture.block_path(layer, architecture.row.attn)
        # The attention module returns after its output projection and in front of a post-norm.
        last_inside = "heads" if architecture.row.attn_post_norm else "attn_out"
        slot = Slot(path, "output", (*architecture.slot(f"blocks.{layer}.{last_inside}").rank, 1), item=1)
        plan.append([Step(name, slot, [], True)])
    plan.sort(key=lambda steps: steps[0].slot.rank)
    with eager_attention(model.hf):
        kept, _ = traced(model.lm, plan, forward_inputs(batch))
    return [kept[name] for name in names]


@contextmanager
def eager_attention(hf: Any) -> Iterator[None]:
    """Eager attention inside, the former setting afterwards."""
    before = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        yield
    finally:
        hf.set_attn_implementation(before)
