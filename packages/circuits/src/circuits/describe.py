"""What neurons write to the vocabulary: descriptions that need nothing but the weights (digest 1.9).

The direct path of neuron i in layer l: its write direction W_d[:, i], scaled by the frozen post-norm and final-norm
gains, through the unembedding. The tokens it raises and lowers most at the sign of its activation describe it.
"""

from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from circuits.edges import Neurons

if TYPE_CHECKING:
    from circuits.frozen import FrozenNetwork


def write_logits(network: "FrozenNetwork", neurons: Neurons) -> Float[Tensor, "n V"]:
    """Return each neuron's direct effect, at its activation, on the logits of its own position (one example)."""
    rows_nD = network.embed_BTD.new_zeros(len(neurons), network.embed_BTD.shape[-1])
    for layer in neurons.layer_n.unique().tolist():
        chosen, block = neurons.layer_n == layer, network.blocks[layer]
        position, index = neurons.position_n[chosen], neurons.index_n[chosen]
        write_nD = block.weights.down_DN.T[index] * block.mlp_post.scale_BTD[0, position]
        rows_nD[chosen] = write_nD * block.neurons_BTN[0, position, index, None]
    norm = network.final_norm
    rows_nD = rows_nD - rows_nD.mean(-1, keepdim=True) if norm.centred else rows_nD
    return (rows_nD * norm.scale_BTD[0, neurons.position_n]) @ network.unembed_VD.T


def describe(network: "FrozenNetwork", neurons: Neurons, tokenizer: Any, k: int = 4) -> list[str]:
    """Return one line a neuron: the k tokens it raises most and the k it lowers most."""
    if not len(neurons):
        return []
    logits_nV = write_logits(network, neurons)
    raised, lowered = logits_nV.topk(k).indices.tolist(), (-logits_nV).topk(k).indices.tolist()

    def words(ids: list[int]) -> str:
        return " ".join(repr(tokenizer.decode([token])) for token in ids)

    return [f"raises {words(up)}; lowers {words(down)}" for up, down in zip(raised, lowered, strict=True)]
