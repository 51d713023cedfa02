"""The self-check at loading: does the model compute what its architecture row says?

One forward pass over a few tokens, captured at every site through the hooks, then, in every block:

    shapes      every site has the width the table states
    projections q, k, v (and gate, up) equal the weights of `BlockView` times their input
    neurons     the activation rule gives the input of the down projection
    experts     a sparse MLP's own code gives what its neurons gave (`shared.experts`)
    mlp         neurons through the down projection (and post-norm) give mlp_out
    heads       attention patterns (shared.attention) times v give the input of the output projection
    attention   heads through the output projection (and post-norm) give attn_out
    residual    input + attn_out + mlp_out = output

`ArchitectureError` names the failing check, the block and the error. Quantised models are checked for shapes, mlp,
heads, attention and residual only, since their weights are not plain matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from shared.architecture import Architecture, ArchitectureError
from shared.attention import attention_patterns
from shared.hooks import Activations, capture
from shared.tokens import pad

if TYPE_CHECKING:
    from shared.models import Model

# Norms and eager attention's softmax compute in float32 also inside a float64 model.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 5e-2
_TOKENS = 6


def check(model: Model) -> None:
    """Run all checks on a loaded model; `ArchitectureError` names the first that fails."""
    from nnsight.intervention.interleaver import OutOfOrderError

    architecture = model.architecture
    if model.hf.device.type == "meta":
        return
    ids = [(7 * i + 3) % architecture.vocab_size for i in range(_TOKENS)]
    batch = pad([ids], [_TOKENS], 0)
    sites = [site for site in architecture.sites() if site not in ("embed", "logits")]
    try:
        with torch.no_grad(), capture(model, sites) as acts:
            model(batch)
            patterns = attention_patterns(model, batch)
    except OutOfOrderError as error:
        raise ArchitectureError(
            f"{architecture.family}: check 'order' failed: the model does not reach its modules in the order "
            f"of the table ({error})."
        ) from None
    plain = model.config.quantization is None
    tolerance = TOLERANCE.get(model.dtype, LOW_PRECISION_TOLERANCE) if plain else LOW_PRECISION_TOLERANCE
    _check_shapes(architecture, acts)
    for layer in range(architecture.n_layers):
        heads = heads_from(architecture, patterns[layer], acts[f"blocks.{layer}.v"])
        _compare(architecture, f"heads in block {layer}", heads, acts[f"blocks.{layer}.heads"], tolerance)
        for name, got, expected in block_identities(architecture, layer, acts, plain):
            _compare(architecture, f"{name} in block {layer}", got, expected, tolerance)


def heads_from(
    architecture: Architecture, pattern_BHTT: Float[Tensor, "B H T T"], v_BTX: Float[Tensor, "B T X"]
) -> Float[Tensor, "B T Y"]:
    """Concatenated heads A_h V_h, the input of the output projection."""
    v_BGTd = v_BTX.unflatten(-1, (architecture.n_kv_heads, architecture.head_dim)).transpose(1, 2)
    v_BHTd = v_BGTd.repeat_interleave(architecture.n_heads // architecture.n_kv_heads, dim=1)
    return (pattern_BHTT @ v_BHTd).transpose(1, 2).flatten(2)


def block_identities(
    architecture: Architecture, layer: int, acts: Activations, weights: bool = True
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Pairs (name, what the table predicts, what the model computed) of one block."""
    row = architecture.row

    def site(kind: str) -> Tensor:
        return acts[f"blocks.{layer}.{kind}"]

    def through(paths: tuple[str | None, ...], value: Tensor) -> Tensor:
        for path in paths:
            if path:
                value = architecture._module(architecture.block_path(layer, path))(value)
        return value

    with torch.no_grad():
        if weights:
            yield from _weight_identities(architecture, layer, site)
        yield "attention", through((row.o, row.attn_post_norm), site("heads")), site("attn_out")
        if architecture.experts(layer):
            yield "experts", through((row.sparse_mlp,), site("mlp_norm")), site("mlp_out")
            written = linear(site("neurons"), architecture.block(layer).W_down)
        else:
            written = through((row.down,), site("neurons")[..., : architecture.n_neurons_of(layer)])
        yield "mlp", through((row.mlp_post_norm,), written), site("mlp_out")
        yield "residual", site("input") + site("attn_out") + site("mlp_out"), site("output")


def _weight_identities(
    architecture: Architecture, layer: int, site: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    block = architecture.block(layer)
    middle = site("input") if block.parallel else site("input") + site("attn_out")
    attn_in, mlp_in = site("input"), middle
    if block.attn_norm is not None:
        attn_in = site("attn_norm")
        yield "attn_norm", block.attn_norm(site("input")), attn_in
    if block.mlp_norm is not None:
        mlp_in = site("mlp_norm")
        yield "mlp_norm", block.mlp_norm(middle), mlp_in
    for kind in ("q", "k", "v"):
        weight, bias = getattr(block, f"W_{kind}"), getattr(block, f"b_{kind}")
        yield f"projection {kind}", linear(attn_in, weight, bias), site(kind)
    sparse, row = architecture.experts(layer) is not None, architecture.row
    routing = architecture.spread(layer, site("routing")) if sparse else torch.ones(())
    act = architecture._module(architecture.block_path(layer, f"{row.experts}.act_fn" if sparse else row.act))
    yield "projection up", linear(mlp_in, block.W_up, block.b_up) * (routing != 0), site("up")
    if block.W_gate is None:
        yield "neurons", act(site("up")), site("neurons")
    else:
        gate = linear(mlp_in, block.W_gate, block.b_gate)
        yield "projection gate", gate * (routing != 0), site("gate")
        yield "neurons", act(site("gate")) * site("up") * routing, site("neurons")


def _check_shapes(architecture: Architecture, acts: Activations) -> None:
    for site in acts.sites:
        expected = (1, _TOKENS, architecture.site_width(site))
        if tuple(acts[site].shape) != expected:
            raise ArchitectureError(
                f"{architecture.family}: check 'shapes' failed: {site} has shape {tuple(acts[site].shape)}, "
                f"the table expects {expected}."
            )


def _compare(architecture: Architecture, name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = max(1.0, float(expected.float().abs().max()))
    error = float((got.float() - expected.float()).abs().max()) / scale
    if not error <= tolerance:
        raise ArchitectureError(
            f"{architecture.family}: check '{name}' failed: relative error {error:.2e} above {tolerance:.0e}. "
            "The model does not have the structure of this family's row in shared.families.FAMILIES."
        )
