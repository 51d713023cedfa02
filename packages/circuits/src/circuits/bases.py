"""Node bases: what one node is, and where the frozen network shows its total effect (paper section 3; digest 1.1).

A basis is a kind of site and how many consecutive coordinates of it make a node. Scores have the shape B K L T N with
N the nodes a layer and position has; they are signed.

    neurons     input of the down projection, the default: privileged, since the non-linearity is element-wise
    mlp_out     what the MLP adds to the residual stream, by coordinate
    heads       input of attention's output projection, one node a head
    attn_out    what attention adds to the residual stream, by coordinate
    residual    the residual stream after a block, by coordinate: a whole cut of the network
    embeddings  what enters block 0, one node a token (one layer)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from shared.errors import UserError

if TYPE_CHECKING:
    from circuits.frozen import FrozenNetwork, Level
    from shared.architecture import Architecture

Effect = Callable[["FrozenNetwork", "Level"], Float[Tensor, "B K T X"]]


@dataclass(frozen=True)
class Basis:
    """One kind of node: its site in every layer, the coordinates a node takes, and the cotangent on that site."""

    name: str
    kind: str
    group: Callable[["Architecture"], int]
    effect: Effect

    def sites(self, architecture: "Architecture") -> list[str]:
        """Return the basis's site in every layer (`embed` alone for the embeddings)."""
        return architecture.sites(self.kind)

    def sum(self, x: Float[Tensor, "*S X"], architecture: "Architecture") -> Float[Tensor, "*S N"]:
        """Add up what belongs to one node: gradient times difference of its coordinates."""
        size = self.group(architecture)
        return x if size == 1 else x.unflatten(-1, (-1, size)).sum(-1)

    def norm(self, x: Float[Tensor, "*S X"], architecture: "Architecture") -> Float[Tensor, "*S N"]:
        """Return the size of each node's coordinates (the absolute value where a node is one)."""
        size = self.group(architecture)
        return x.abs() if size == 1 else x.unflatten(-1, (-1, size)).norm(dim=-1)

    def spread(self, x: Tensor, architecture: "Architecture") -> Tensor:
        """Repeat a value of each node over its coordinates, the last dimension."""
        size = self.group(architecture)
        return x if size == 1 else x.repeat_interleave(size, dim=-1)


def _one(architecture: "Architecture") -> int:
    return 1


BASES: dict[str, Basis] = {
    basis.name: basis
    for basis in (
        Basis("neurons", "neurons", _one, lambda network, level: level.neurons_BKTN),
        Basis("mlp_out", "mlp_out", _one, lambda network, level: level.output_BKTD),
        Basis(
            "heads",
            "heads",
            lambda architecture: architecture.head_dim,
            lambda network, level: network.blocks[level.layer].heads_transpose(level.attention_BKTD),
        ),
        Basis("attn_out", "attn_out", _one, lambda network, level: level.attention_BKTD),
        Basis("residual", "output", _one, lambda network, level: level.output_BKTD),
        Basis(
            "embeddings",
            "embed",
            lambda architecture: architecture.width,
            lambda network, level: level.input_BKTD,
        ),
    )
}
NEURONS = BASES["neurons"]


def basis_named(name: str) -> Basis:
    """Return a basis by name; UserError names those there are."""
    if name not in BASES:
        raise UserError(f"unknown node basis {name!r}; there are: {', '.join(BASES)}")
    return BASES[name]
