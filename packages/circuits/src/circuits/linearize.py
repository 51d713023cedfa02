"""Freeze one forward pass of any supported model into a linear network (paper section 3, RelP; digest 1.4 and 3.1).

1. One ordinary forward pass with captures; the model is neither changed nor differentiated.
2. Per block: norm scales from the streams they read, attention patterns rebuilt from captured queries and keys with
   the model's own rotary embedding, scale, mask and soft cap, neuron coefficients from the pre-activations by the
   rules.
3. `check` replays every frozen component on what it read and compares it with what the model computed; a model whose
   structure differs from the table is refused by the name of the part that fails.

Half-precision models run as they are; coefficients and everything after are float32.
"""

import sys
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.frozen import FrozenNetwork
from circuits.layers import BlockWeights, FrozenAttention, FrozenBlock, FrozenNorm
from circuits.rules import Rules, neuron_coefficients
from shared.errors import UserError
from shared.hooks import capture

if TYPE_CHECKING:
    from shared.blocks import BlockView, NormView
    from shared.models import Model
    from shared.tokens import TokenBatch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
BLOCK_SITES = (
    "input",
    "attn_norm",
    "q",
    "k",
    "heads",
    "attn_out",
    "mlp_norm",
    "gate",
    "up",
    "neurons",
    "mlp_out",
)


class LinearizeError(UserError):
    """A frozen component does not reproduce the model; the message names it."""


def linearize(
    model: "Model", batch: "TokenBatch", rules: Rules | None = None, checked: bool = True
) -> FrozenNetwork:
    """Run the model once on the batch and return its frozen network; raises LinearizeError where it does not close."""
    architecture, batch = model.architecture, batch.to(model.device)
    kinds = [kind for kind in BLOCK_SITES if kind in architecture.block_sites()]
    sites = [f"blocks.{layer}.{kind}" for layer in range(architecture.n_layers) for kind in kinds]
    last = f"blocks.{architecture.n_layers - 1}.output"
    with torch.no_grad(), capture(model, ["embed", *sites, last, "final_norm"]) as seen:
        logits_BTV = model(batch)
    padding_BT1 = ~batch.attention_mask_BT.bool()[..., None]
    acts = {site: _working(x).masked_fill(padding_BT1, 0.0) for site, x in seen.items()}
    rules = rules or Rules()
    with torch.no_grad():
        blocks = tuple(_block(model, batch, acts, layer, rules) for layer in range(architecture.n_layers))
        network = FrozenNetwork(
            blocks=blocks,
            final_norm=_norm(architecture.final_norm, acts[last], acts["final_norm"]),
            unembed_VD=_working(architecture.W_U),
            unembed_bias_V=_unembed_bias(model),
            final_BTD=acts["final_norm"],
            soft_cap=architecture.final_softcap,
            embed_BTD=acts["embed"],
            position_BTD=_positions(model, batch),
            logits_BTV=_working(logits_BTV),
            input_ids_BT=batch.input_ids_BT,
            real_BT=batch.attention_mask_BT.bool(),
            rules=rules,
        )
        if checked:
            check(model, network, acts)
    return network


def _working(tensor: Any) -> Any:
    """A tensor in the precision coefficients are kept in: float32, or float64 for a float64 model."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _unembed_bias(model: "Model") -> Tensor | None:
    return _working(getattr(model.hf.get_submodule(model.architecture.row.unembed), "bias", None))


def _positions(model: "Model", batch: "TokenBatch") -> Float[Tensor, "B T D"] | None:
    """Learned position embeddings as the model adds them (None where positions are rotary)."""
    table = model.architecture.W_P
    return None if table is None else _working(table)[batch.position_ids_BT]


def _norm(view: "NormView | None", x_BTD: Tensor, y_BTD: Tensor) -> FrozenNorm:
    """Freeze a norm that turned x into y; None is the identity.

    Norms compute in float32 even inside a float64 model, so the scale is read off y / x wherever that agrees with the
    formula: the rounding then belongs to the coefficient, and sums close to full precision.
    """
    if view is None:
        return FrozenNorm(torch.ones_like(x_BTD[..., :1]))
    centred = view.kind == "layer"
    shift_D = _working(view.bias)
    formula_BTD = _working(view.scale(x_BTD)).to(x_BTD.dtype) * _working(view.gain)
    base_BTD = x_BTD - x_BTD.mean(-1, keepdim=True) if centred else x_BTD
    observed_BTD = (y_BTD if shift_D is None else y_BTD - shift_D) / base_BTD
    agrees_BTD = (observed_BTD - formula_BTD).abs() <= 1e-5 * formula_BTD.abs()
    return FrozenNorm(torch.where(agrees_BTD, observed_BTD, formula_BTD), shift_D, centred)


def _block(
    model: "Model", batch: "TokenBatch", acts: dict[str, Tensor], layer: int, rules: Rules
) -> FrozenBlock:
    view, at = model.architecture.block(layer), f"blocks.{layer}."
    weights = _weights(view)
    input_BTD, attn_BTD = acts[at + "input"], acts[at + "attn_out"]
    middle_BTD = input_BTD if view.parallel else input_BTD + attn_BTD
    attn_raw_BTD = _affine(acts[at + "heads"], weights.out_DY, weights.out_bias_D)
    mlp_raw_BTD = _affine(acts[at + "neurons"], weights.down_DN, weights.down_bias_D)
    gate_BTN, up_BTN = neuron_coefficients(view.activation, acts.get(at + "gate"), acts[at + "up"], rules)
    return FrozenBlock(
        weights=weights,
        attention=_attention(model, batch, view, acts[at + "q"], acts[at + "k"]),
        attn_norm=_norm(view.attn_norm, input_BTD, acts.get(at + "attn_norm", input_BTD)),
        attn_post=_norm(view.attn_post_norm, attn_raw_BTD, attn_BTD),
        mlp_norm=_norm(view.mlp_norm, middle_BTD, acts.get(at + "mlp_norm", middle_BTD)),
        mlp_post=_norm(view.mlp_post_norm, mlp_raw_BTD, acts[at + "mlp_out"]),
        gate_BTN=gate_BTN,
        up_BTN=up_BTN,
        neurons_BTN=acts[at + "neurons"],
        parallel=view.parallel,
    )


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.T if bias is None else x @ weight.T + bias


def _weights(view: "BlockView") -> BlockWeights:
    names = ("W_v", "b_v", "W_o", "b_o", "W_gate", "b_gate", "W_up", "b_up", "W_down", "b_down")
    return BlockWeights(*(_working(getattr(view, name)) for name in names))


def _attention(
    model: "Model", batch: "TokenBatch", view: "BlockView", q_BTX: Tensor, k_BTX: Tensor
) -> FrozenAttention:
    """Rotate queries and keys as the model does, and say which positions may look at which."""
    query_BHTd, key_BGTd = _rotated(model, batch, view.layer, q_BTX, k_BTX)
    # The pattern is what the model computed: sdpa has no soft cap and leaves it out, eager attention (but for GPT-2)
    # takes the softmax in float32 even in a float64 model.
    implementation = model.hf.config._attn_implementation
    single = implementation == "eager" and model.architecture.family != "gpt2"
    return FrozenAttention(
        query_BHTd=query_BHTd,
        key_BGTd=key_BGTd,
        scaling=view.attention_scale,
        soft_cap=None if implementation == "sdpa" else view.attention_softcap,
        allowed_BTT=_allowed(batch, view.sliding_window),
        softmax_dtype=torch.float32 if single else query_BHTd.dtype,
    )


def _rotated(
    model: "Model", batch: "TokenBatch", layer: int, q_BTX: Tensor, k_BTX: Tensor
) -> tuple[Tensor, Tensor]:
    architecture, hf = model.architecture, model.hf
    pair = []
    for x_BTX, path in ((q_BTX, architecture.row.q_norm), (k_BTX, architecture.row.k_norm)):
        heads = x_BTX.unflatten(-1, (-1, architecture.head_dim))
        if path is not None:
            norm = hf.get_submodule(architecture.block_path(layer, path))
            per_head = norm.weight.numel() == architecture.head_dim
            heads = norm.forward(heads) if per_head else norm.forward(x_BTX).reshape(heads.shape)
        pair.append(heads.transpose(1, 2))
    rotary = getattr(hf.base_model, "rotary_emb", None)
    if rotary is None:
        return pair[0], pair[1]
    attention = hf.get_submodule(architecture.block_path(layer, architecture.row.attn))
    types = [attention.layer_type] if hasattr(rotary, "layer_types") else []
    cos, sin = rotary.forward(q_BTX, batch.position_ids_BT, *types)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    query, key = rotate(pair[0], pair[1], cos, sin)
    return query, key


def _allowed(batch: "TokenBatch", window: int | None) -> Bool[Tensor, "B T T"]:
    """Causal, within the sliding window, between real tokens."""
    real_BT = batch.attention_mask_BT.bool()
    steps_T = torch.arange(real_BT.shape[1], device=real_BT.device)
    distance_TT = steps_T[:, None] - steps_T[None, :]
    allowed_TT = distance_TT >= 0
    if window is not None:
        allowed_TT = allowed_TT & (distance_TT < window)
    return allowed_TT & real_BT[:, :, None] & real_BT[:, None, :]


def check(model: "Model", network: FrozenNetwork, acts: dict[str, Tensor]) -> None:
    """Compare every frozen component with the model at real positions; LinearizeError names the first miss."""
    tolerance = TOLERANCE[model.dtype]
    if not network.logits_BTV[network.real_BT].isfinite().all():
        raise LinearizeError(
            "the model's own logits are not finite on this batch. Transformers' eager attention does this in float64 "
            "under left padding: pad on the right, or load the model in float32."
        )
    for layer, block in enumerate(network.blocks):
        at = f"blocks.{layer}."
        x_BKTD, attn_BTD = acts[at + "input"][:, None], acts[at + "attn_out"]
        read_BKTD = x_BKTD if block.parallel else x_BKTD + attn_BTD[:, None]
        neurons = acts[at + "neurons"]
        found = {
            "attn_out": (block.attention_forward(x_BKTD), attn_BTD),
            "mlp_out": (block.write_forward(neurons[:, None]), acts[at + "mlp_out"]),
        }
        if network.rules == Rules():
            found["neurons"] = (block.neurons_forward(read_BKTD), neurons)
        for name, (mine, theirs) in found.items():
            _compare(at + name, mine[:, 0], theirs, network.real_BT, tolerance)
    _compare("logits", _logits(network), network.logits_BTV, network.real_BT, tolerance)


def _logits(network: FrozenNetwork) -> Float[Tensor, "B T V"]:
    logits_BTV = _affine(network.final_BTD, network.unembed_VD, network.unembed_bias_V)
    cap = network.soft_cap
    return logits_BTV if cap is None else cap * torch.tanh(logits_BTV / cap)


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
