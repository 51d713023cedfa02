"""Freeze one forward pass of any supported model into a linear network (paper section 3, RelP; digest 1.4 and 3.1).

1. `observe`: one ordinary forward pass with captures; the model is neither changed nor differentiated.
2. `freeze`: per block, norm scales from the streams they read, queries and keys (rotated as the model does) that
   rebuild the attention pattern, and neuron coefficients from the pre-activations by the rules.
3. Every frozen component is replayed on what it read and compared with the model (`circuits.selfcheck`).

Half-precision models run as they are; coefficients and everything after are float32.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.frozen import FrozenNetwork
from circuits.frozen_attention import FrozenAttention
from circuits.layers import BlockWeights, FrozenBlock, FrozenNorm, optional, working
from circuits.rules import Rules, RulesError, neuron_coefficients
from circuits.selfcheck import TOLERANCE, LinearizeError, affine, check_block, check_finite, check_logits
from shared.hooks import capture

if TYPE_CHECKING:
    from shared.blocks import BlockView, NormView
    from shared.models import Model
    from shared.tokens import TokenBatch

__all__ = ["TOLERANCE", "LinearizeError", "Observed", "freeze", "linearize", "observe"]

BLOCK_SITES = (
    "input",
    "attn_norm",
    "q",
    "k",
    "heads",
    "attn_out",
    "mlp_norm",
    "routing",
    "gate",
    "up",
    "neurons",
    "mlp_out",
)


@dataclass(frozen=True)
class Observed:
    """What one forward pass computed at every site that freezing needs, zero at padding, and its logits."""

    batch: "TokenBatch"
    acts: dict[str, Float[Tensor, "B T X"]]
    logits_BTV: Float[Tensor, "B T V"]

    def output(self, layer: int) -> Float[Tensor, "B T D"]:
        """The residual stream after a block."""
        following = f"blocks.{layer + 1}.input"
        return self.acts[following if following in self.acts else f"blocks.{layer}.output"]


def observe(model: "Model", batch: "TokenBatch") -> Observed:
    """Run the model once on the batch, under its active edits, and keep what freezing needs."""
    architecture, batch = model.architecture, batch.to(model.device)
    sites = [
        f"blocks.{layer}.{kind}"
        for layer in range(architecture.n_layers)
        for kind in architecture.block_sites(layer)
        if kind in BLOCK_SITES
    ]
    last = f"blocks.{architecture.n_layers - 1}.output"
    with torch.no_grad(), capture(model, ["embed", *sites, last, "final_norm"]) as seen:
        logits_BTV = model(batch)
    acts = {site: working(x) for site, x in seen.items()}
    real_BT = batch.attention_mask_BT.bool()
    if not real_BT.all():
        acts = {site: x.masked_fill(~real_BT[..., None], 0.0) for site, x in acts.items()}
    return Observed(batch, acts, working(logits_BTV))


def linearize(
    model: "Model", batch: "TokenBatch", rules: Rules | None = None, checked: bool = True
) -> FrozenNetwork:
    """Run the model once on the batch and return its frozen network; raises LinearizeError where it does not close."""
    return freeze(model, observe(model, batch), rules, checked)


def freeze(
    model: "Model", observed: Observed, rules: Rules | None = None, checked: bool = True
) -> FrozenNetwork:
    """Return the frozen network of an observed pass, whose pre-activations it takes out.

    Raises LinearizeError where the network does not reproduce the pass.
    """
    rules = rules or Rules()
    if not rules.linear:
        raise RulesError(
            "with attention patterns or norms open there is no frozen network, so no ledger and no edges; node scores "
            "by these rules are the estimators relp_qk_open and relp_norm_open"
        )
    architecture, batch, acts = model.architecture, observed.batch, observed.acts
    real_BT = batch.attention_mask_BT.bool()
    if checked:
        check_finite(observed.logits_BTV, real_BT)
    with torch.no_grad():
        blocks = []
        for layer in range(architecture.n_layers):
            block = _block(model, observed, layer, rules)
            if checked:
                check_block(block, acts, layer, rules, TOLERANCE[model.dtype])
            blocks.append(block)
        network = FrozenNetwork(
            blocks=tuple(blocks),
            final_norm=frozen_norm(architecture.final_norm, blocks[-1].output_BTD, acts["final_norm"]),
            unembed_VD=working(architecture.W_U),
            unembed_bias_V=_unembed_bias(model),
            final_BTD=acts["final_norm"],
            soft_cap=architecture.final_softcap,
            embed_BTD=acts["embed"],
            position_BTD=_positions(model, batch),
            logits_BTV=observed.logits_BTV,
            input_ids_BT=batch.input_ids_BT,
            real_BT=real_BT,
            rules=rules,
        )
        if checked:
            check_logits(network, TOLERANCE[model.dtype])
    return network


def _unembed_bias(model: "Model") -> Tensor | None:
    return optional(getattr(model.hf.get_submodule(model.architecture.row.unembed), "bias", None))


def _positions(model: "Model", batch: "TokenBatch") -> Float[Tensor, "B T D"] | None:
    """Learned position embeddings as the model adds them (None where positions are rotary)."""
    table = model.architecture.W_P
    return None if table is None else working(table)[batch.position_ids_BT]


def frozen_norm(view: "NormView | None", x_BTD: Tensor, y_BTD: Tensor) -> FrozenNorm:
    """Freeze a norm that turned x into y; None is the identity.

    Norms compute in float32 even inside a float64 model, so there the scale is read off y / x wherever that agrees with
    the formula: the rounding then belongs to the coefficient, and sums close to full precision.
    """
    if view is None:
        return FrozenNorm.identity(x_BTD)
    centred, shift_D = view.kind == "layer", optional(view.bias)
    formula_BTD = working(view.scale(x_BTD)).to(x_BTD.dtype) * working(view.gain)
    if x_BTD.dtype != torch.float64:
        return FrozenNorm(formula_BTD, shift_D, centred)
    base_BTD = x_BTD - x_BTD.mean(-1, keepdim=True) if centred else x_BTD
    observed_BTD = (y_BTD if shift_D is None else y_BTD - shift_D) / base_BTD
    agrees_BTD = (observed_BTD - formula_BTD).abs() <= 1e-5 * formula_BTD.abs()
    return FrozenNorm(torch.where(agrees_BTD, observed_BTD, formula_BTD), shift_D, centred)


def _block(model: "Model", observed: Observed, layer: int, rules: Rules) -> FrozenBlock:
    view, acts, at = model.architecture.block(layer), observed.acts, f"blocks.{layer}."
    weights = BlockWeights(view)
    input_BTD, attn_BTD = acts[at + "input"], acts[at + "attn_out"]
    middle_BTD = input_BTD if view.parallel else input_BTD + attn_BTD
    # Taken out: in a long prompt the pre-activations of all layers beside their coefficients would be the peak.
    coefficients = neuron_coefficients(
        view.activation, acts.pop(at + "gate", None), acts.pop(at + "up"), rules
    )
    if at + "routing" in acts:
        routing_BTN = model.architecture.spread(layer, acts[at + "routing"])
        coefficients = coefficients.routed(routing_BTN)
    attn_post, mlp_post = FrozenNorm.identity(input_BTD), FrozenNorm.identity(input_BTD)
    if view.attn_post_norm is not None:
        raw_BTD = affine(acts[at + "heads"], weights.out_DY, weights.out_bias_D)
        attn_post = frozen_norm(view.attn_post_norm, raw_BTD, attn_BTD)
    if view.mlp_post_norm is not None:
        raw_BTD = affine(acts[at + "neurons"], weights.down_DN, weights.down_bias_D)
        mlp_post = frozen_norm(view.mlp_post_norm, raw_BTD, acts[at + "mlp_out"])
    return FrozenBlock(
        weights=weights,
        attention=_attention(model, observed.batch, view, acts[at + "q"], acts[at + "k"]),
        attn_norm=frozen_norm(view.attn_norm, input_BTD, acts.get(at + "attn_norm", input_BTD)),
        attn_post=attn_post,
        mlp_norm=frozen_norm(view.mlp_norm, middle_BTD, acts.get(at + "mlp_norm", middle_BTD)),
        mlp_post=mlp_post,
        gate_BTN=coefficients.gate,
        up_BTN=coefficients.up,
        neurons_BTN=acts[at + "neurons"],
        output_BTD=observed.output(layer),
        parallel=view.parallel,
    )


def _attention(
    model: "Model", batch: "TokenBatch", view: "BlockView", q_BTX: Tensor, k_BTX: Tensor
) -> FrozenAttention:
    """Rotate queries and keys as the model does, and say which positions may look at which."""
    heads = (heads_of(model, view.layer, kind, x_BTX) for kind, x_BTX in (("q", q_BTX), ("k", k_BTX)))
    query_BHTd, key_BGTd = rotated(model, batch, view.layer, *heads)
    # The pattern is what the model computed: sdpa has no soft cap and leaves it out, eager attention (but for GPT-2)
    # takes the softmax in float32 even in a float64 model.
    implementation = model.hf.config._attn_implementation
    single = implementation == "eager" and model.architecture.family != "gpt2"
    return FrozenAttention(
        query_BHTd=query_BHTd,
        key_BGTd=key_BGTd,
        scaling=view.attention_scale,
        soft_cap=None if implementation == "sdpa" else view.attention_softcap,
        window=view.sliding_window,
        real_BT=batch.attention_mask_BT.bool(),
        softmax_dtype=torch.float32 if single else query_BHTd.dtype,
    )


def heads_of(
    model: "Model", layer: int, kind: str, x_BTX: Float[Tensor, "B T X"]
) -> Float[Tensor, "B T H d"]:
    """Cut projected queries (kind q) or keys (k) into heads, after their norm where the family has one."""
    architecture = model.architecture
    heads = x_BTX.unflatten(-1, (-1, architecture.head_dim))
    path = architecture.row.q_norm if kind == "q" else architecture.row.k_norm
    if path is None:
        return heads
    norm = model.hf.get_submodule(architecture.block_path(layer, path))
    per_head = norm.weight.numel() == architecture.head_dim
    return norm.forward(heads) if per_head else norm.forward(x_BTX).reshape(heads.shape)


def rotated(
    model: "Model",
    batch: "TokenBatch",
    layer: int,
    q_BTHd: Float[Tensor, "B T H d"],
    k_BTGd: Float[Tensor, "B T G d"],
) -> tuple[Float[Tensor, "B H T d"], Float[Tensor, "B G T d"]]:
    """Turn queries and keys by their positions with the model's own rotary embedding (unchanged where it has none)."""
    architecture = model.architecture
    q_BHTd, k_BGTd = q_BTHd.transpose(1, 2), k_BTGd.transpose(1, 2)
    rotary = getattr(model.hf.base_model, "rotary_emb", None)
    if rotary is None:
        return q_BHTd, k_BGTd
    attention = model.hf.get_submodule(architecture.block_path(layer, architecture.row.attn))
    types = [attention.layer_type] if hasattr(rotary, "layer_types") else []
    cos, sin = rotary.forward(q_BHTd, batch.position_ids_BT, *types)
    turn = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    query_BHTd, key_BGTd = turn(q_BHTd, k_BGTd, cos, sin)
    return query_BHTd, key_BGTd
