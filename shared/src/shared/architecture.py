"""Where every model family keeps its blocks, norms, projections, neurons and unembedding: one table, one accessor.

1. A `Family` row names the modules of one Hugging Face family by path (`shared.families`).
2. `Architecture` binds a row to a loaded model and turns a site name into a `Slot`: which module, its input or its
   output, and, where the weights are fused (Phi-3, GPT-NeoX, GPT-2), which columns.
3. The same columns cut the fused weights, so capture, edit and weights always agree (`shared.blocks`).
4. `shared.checks.check` runs the model once and compares what the table says with what the model computes.

The neurons of a mixture-of-experts MLP are those of all experts side by side (`shared.experts`). Where blocks differ
in width, all have the widest one's: a narrower block's sites end in zeros that no edit can change.

Shape letters: B batch, T token, D width, N neurons, H query heads, G key/value heads, d head width, V vocabulary.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shared.errors import UserError
from shared.experts import TAPS, ExpertSizes
from shared.families import FAMILIES

if TYPE_CHECKING:
    from shared.blocks import BlockView, NormView

Columns = slice | Tensor


class ArchitectureError(UserError):
    """A model does not have the structure its family's row states; the message names the failing check."""


class SiteError(UserError):
    """A site name that this model does not have."""


# Order in which one forward pass reaches a block's sites; nnsight must be asked in this order.
BLOCK_SITES = (
    "input",
    "attn_norm",
    "q",
    "k",
    "v",
    "heads",
    "attn_out",
    "mlp_norm",
    "routing",
    "gate",
    "up",
    "neurons",
    "mlp_out",
    "output",
)
NEURON_SITES = ("gate", "up", "neurons")
READ_OUT_SITES = ("final_norm", "logits")  # behind the last block
_SITE = re.compile(r"^blocks\.(\d+)\.(\w+)$")


@dataclass(frozen=True)
class Slot:
    """How one site is read and written: a module's input or output, and which columns of it.

    `attribute` names the field of a structured output (the logits), `item` the element of a tuple (read only); `pad`
    zeros stand behind the module's own values; `rank` sorts slots in execution order.
    """

    path: str
    side: Literal["input", "output"]
    rank: tuple[int, ...]
    columns: Columns | None = field(default=None, compare=False)
    attribute: str | None = None
    item: int | None = None
    pad: int = 0

    def take(self, value: Any) -> Tensor:
        """Cut the site's tensor out of the module's value."""
        tensor = getattr(value, self.attribute) if self.attribute else value
        tensor = tensor if self.item is None else tensor[self.item]
        tensor = tensor if self.columns is None else tensor[..., self.columns]
        return nn.functional.pad(tensor, (0, self.pad)) if self.pad else tensor

    def put(self, value: Any, tensor: Tensor) -> Any:
        """Return the module's value with the site's tensor replaced; `value` itself is left alone."""
        if self.attribute:
            return replace(value, **{self.attribute: tensor})
        tensor = tensor[..., : tensor.shape[-1] - self.pad]
        if self.columns is None:
            return tensor
        whole = value.clone()
        whole[..., self.columns] = tensor
        return whole


def family_of(config: Any) -> str:
    """Name of the row in `FAMILIES` for a Hugging Face config; `UserError` when there is none."""
    for name, row in FAMILIES.items():
        if row.model_type == config.model_type:
            return name
    if any(getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        sparse = ", ".join(name for name, row in FAMILIES.items() if row.experts)
        raise ArchitectureError(
            f"Mixture-of-experts models of type {config.model_type!r} are not supported: their experts or their "
            f"router compute something of their own. Supported mixture-of-experts families: {sparse}."
        )
    raise UserError(
        f"Model type {config.model_type!r} is not supported. Supported families: {', '.join(FAMILIES)}. "
        "A family with the same structure can be added as one row of shared.families.FAMILIES."
    )


class Architecture:
    """One family's row bound to one loaded model: sizes, sites and weights by name."""

    def __init__(self, hf: nn.Module, config: Any | None = None) -> None:
        self._hf = hf
        self.config = cast(Any, hf.config if config is None else config)
        self.family = family_of(self.config)
        self.row = FAMILIES[self.family]
        self.n_layers = len(self._module(self.row.layers))
        attention = self._module(self.block_path(0, self.row.attn))
        self.width = int(self.config.hidden_size)
        self.n_heads = int(self.config.num_attention_heads)
        self.n_kv_heads: int = getattr(self.config, "num_key_value_heads", None) or self.n_heads
        self.head_dim: int = getattr(attention, "head_dim", None) or attention.head_size
        self._experts = [self._sizes(layer) for layer in range(self.n_layers)]
        self._n_neurons = [self._width(layer) for layer in range(self.n_layers)]
        self.n_neurons = max(self._n_neurons)
        self.vocab_size = features(self._module(self.row.unembed))[1]
        self.gated = self.row.gate is not None
        self.activation: str = _activation(self.config)
        self.parallel: bool = bool(getattr(self.config, "use_parallel_residual", False))

    def __repr__(self) -> str:
        return (
            f"Architecture({self.family}, n_layers={self.n_layers}, width={self.width}, "
            f"n_neurons={self.n_neurons}, n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, "
            f"head_dim={self.head_dim}, vocab_size={self.vocab_size})"
        )

    def sites(self, name: str | None = None) -> list[str]:
        """All site names in execution order, or only those of one kind (`sites("neurons")`)."""
        layers = range(self.n_layers)
        names = [f"blocks.{layer}.{kind}" for layer in layers for kind in self.block_sites(layer)]
        names = ["embed", *names, *READ_OUT_SITES]
        if name is None:
            return names
        chosen = [site for site in names if site.rpartition(".")[2] == name]
        if not chosen:
            raise SiteError(f"No site is called {name!r} in {self.family}; there are {self.block_sites()}.")
        return chosen

    def block_sites(self, layer: int | None = None) -> list[str]:
        """Kinds of site that one block has (None: that any block of this model has), in execution order."""
        experts = self._experts if layer is None else [self._experts[layer]]
        absent = {
            "attn_norm": self.row.attn_norm is None,
            "mlp_norm": self.row.mlp_norm is None,
            "routing": not any(experts),
            "gate": not self.gated,
        }
        return [kind for kind in BLOCK_SITES if not absent.get(kind, False)]

    def slot(self, site: str) -> Slot:
        """Where a site's tensor is; `SiteError` for a name that this model does not have."""
        last = (self.n_layers, 0)
        if site == "embed":
            return self._block_slot(0, "input")
        if site == "final_norm":
            return Slot(self.row.unembed, "input", last)
        if site == "logits":
            return Slot("", "output", (self.n_layers, 1), attribute="logits")
        match = _SITE.match(site)
        if match and int(match[1]) < self.n_layers and match[2] in self.block_sites(int(match[1])):
            return self._block_slot(int(match[1]), match[2])
        near = difflib.get_close_matches(site, self.sites(), n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise SiteError(
            f"{self.family} with {self.n_layers} blocks has no site {site!r}.{hint} Sites: embed, "
            f"blocks.L.{{{','.join(self.block_sites())}}}, final_norm, logits."
        )

    def module(self, site: str) -> tuple[nn.Module, Slot]:
        """The module a site is read at, and how (`Slot`)."""
        slot = self.slot(site)
        return self._module(slot.path), slot

    def site_width(self, site: str) -> int:
        """Size of a site's last dimension."""
        kind = site.rpartition(".")[2]
        self.slot(site)
        if kind == "routing":
            experts = self.experts(int(site.split(".")[1]))
            return experts.n_routed if experts else 0
        sizes = {
            "q": self.n_heads * self.head_dim,
            "heads": self.n_heads * self.head_dim,
            "k": self.n_kv_heads * self.head_dim,
            "v": self.n_kv_heads * self.head_dim,
            "gate": self.n_neurons,
            "up": self.n_neurons,
            "neurons": self.n_neurons,
            "logits": self.vocab_size,
        }
        return sizes.get(kind, self.width)

    def block_path(self, layer: int, path: str = "") -> str:
        """Dotted path of a block's module from the Hugging Face model's root."""
        return f"{self.row.layers}.{layer}" + (f".{path}" if path else "")

    def experts(self, layer: int) -> ExpertSizes | None:
        """Number and sizes of a block's experts, or None where its MLP is dense."""
        return self._experts[layer]

    def n_neurons_of(self, layer: int) -> int:
        """Neurons that a block really has, at most `n_neurons`."""
        return self._n_neurons[layer]

    def siblings(self, layer: int, neuron: int) -> range:
        """The neurons of a neuron's own expert, or of its whole MLP where that is dense."""
        experts = self._experts[layer]
        return experts.siblings(neuron) if experts else range(self._n_neurons[layer])

    def neuron_name(self, layer: int, neuron: int) -> str:
        """A neuron's name within its block: `N153`, or `E2/N17` in a mixture of experts."""
        experts = self._experts[layer]
        return experts.name(neuron) if experts else f"N{neuron}"

    def spread(self, layer: int, routing: Float[Tensor, "*B R"]) -> Float[Tensor, "*B N"]:
        """The routing weight of every neuron of a sparse block, that of its expert."""
        experts = self._experts[layer]
        assert experts is not None, f"block {layer} is dense"
        return nn.functional.pad(experts.spread(routing), (0, self.n_neurons - experts.total))

    def columns(self, kind: str) -> Columns | None:
        """Which output columns of a fused projection are `kind` (q, k, v, gate, up); None where not fused."""
        if kind in ("gate", "up"):
            start = 0 if kind == "gate" else self.n_neurons
            return slice(start, start + self.n_neurons) if self.row.fused_gate_up else None
        if self.row.fused == "none":
            return None
        position = "qkv".index(kind)
        if self.row.fused == "per_head":  # each head's q, k and v lie side by side
            starts_H1 = torch.arange(self.n_heads)[:, None] * 3 * self.head_dim + position * self.head_dim
            return (starts_H1 + torch.arange(self.head_dim)).flatten()
        edges = [0, self.n_heads, self.n_heads + self.n_kv_heads, self.n_heads + 2 * self.n_kv_heads]
        return slice(edges[position] * self.head_dim, edges[position + 1] * self.head_dim)

    def block(self, layer: int) -> BlockView:
        """Weights, norms and settings of one block as [out, in] tensors (`shared.blocks.BlockView`)."""
        from shared.blocks import block_view

        return block_view(self, layer)

    @property
    def final_norm(self) -> NormView:
        """The norm in front of the unembedding."""
        from shared.blocks import norm_view

        return norm_view(self._module(self.row.final_norm), self.row.norm)

    @property
    def W_E(self) -> Tensor:
        """Token embedding V D, without the embedding scale."""
        return self._module(self.row.embed).weight

    @property
    def W_P(self) -> Tensor | None:
        """Learned position embedding, positions x D (GPT-2); None where positions are rotary."""
        return self._module(self.row.position).weight if self.row.position else None

    @property
    def W_U(self) -> Tensor:
        """Unembedding V D."""
        return self._module(self.row.unembed).weight

    @property
    def embedding_scale(self) -> float:
        """Factor applied to the token embedding (Gemma: the square root of the width)."""
        return float(getattr(self._module(self.row.embed), "scalar_embed_scale", 1.0))

    @property
    def final_softcap(self) -> float | None:
        """C of C * tanh(logits / C), or None."""
        return getattr(self.config, "final_logit_softcapping", None)

    def _sizes(self, layer: int) -> ExpertSizes | None:
        mlp = self._module(self.block_path(layer, self.row.sparse_mlp)) if self.row.sparse_mlp else None
        return ExpertSizes.of(mlp) if hasattr(mlp, "experts") else None

    def _width(self, layer: int) -> int:
        """Neurons that a block really has."""
        sizes = self._experts[layer]
        return sizes.total if sizes else features(self._module(self.block_path(layer, self.row.down)))[0]

    def _module(self, path: str) -> Any:
        try:
            return self._hf.get_submodule(path)
        except AttributeError as error:
            raise ArchitectureError(f"{self.family}: no module {path!r} in the model ({error}).") from None

    def _block_slot(self, layer: int, kind: str) -> Slot:
        row = self.row
        where: dict[str, tuple[str | None, Literal["input", "output"]]] = {
            "input": ("", "input"),
            "attn_norm": (row.attn_norm, "output"),
            "q": (row.q, "output"),
            "k": (row.k, "output"),
            "v": (row.v, "output"),
            "heads": (row.o, "input"),
            "attn_out": (row.attn_post_norm or row.o, "output"),
            "mlp_norm": (row.mlp_norm, "output"),
            "gate": (row.gate, "output"),
            "up": (row.up, "output"),
            "neurons": (row.down, "input"),
            "mlp_out": (row.mlp_post_norm or row.down, "output"),
            "output": ("", "output"),
        }
        if self._experts[layer]:
            taps = f"{row.sparse_mlp}.{TAPS}."
            where |= {kind: (taps + kind, "output") for kind in ("routing", *NEURON_SITES)}
            where["mlp_out"] = (row.mlp_post_norm or row.sparse_mlp, "output")
        path, side = where[kind]
        columns = self.columns(kind) if kind in ("q", "k", "v", "gate", "up") else None
        pad = self.n_neurons - self._n_neurons[layer] if kind in NEURON_SITES else 0
        rank = (layer, BLOCK_SITES.index(kind))
        return Slot(self.block_path(layer, path or ""), side, rank, columns, pad=pad)


def features(module: Any) -> tuple[int, int]:
    """Input and output width of a linear layer, whichever class it is (Conv1D, quantised)."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return module.nx, module.nf


def check_sites(architecture: Architecture, sites: Iterable[str]) -> list[str]:
    """The sites as a list, each known to the architecture; `SiteError` otherwise."""
    if isinstance(sites, str):
        sites = [sites]
    names = list(sites)
    for site in names:
        architecture.slot(site)
    return names


def _activation(config: Any) -> str:
    for name in ("hidden_activation", "hidden_act", "activation_function"):
        if getattr(config, name, None):
            return getattr(config, name)
    raise ArchitectureError(f"{config.model_type}: the config names no activation function.")
