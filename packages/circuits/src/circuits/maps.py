"""Which tokens a neuron's activation comes from: the total effect of every token's embedding on it (digest 3.4).

In the frozen network a neuron is a sum over tokens (and biases). Two ways to the same numbers:

    forward   each token's embedding alone through the network: T linear passes give the map of every neuron
    backward  each neuron's cotangent down through attention and MLPs to the embeddings: one pass a neuron

`token_maps` takes the one with fewer passes. The sum of a neuron's map over tokens is its activation, less what learned
positions and biases add.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.edges import COPIES, Neurons, input_rows
from circuits.frozen import FrozenNetwork


def token_maps(network: FrozenNetwork, neurons: Neurons, max_bytes: int = 1 << 30) -> Float[Tensor, "n T"]:
    """Return the total effect of every token's embedding on every neuron, of a network with one example."""
    if len(network.embed_BTD) != 1:
        raise ValueError("maps are of one example: use network.row(index)")
    forward = network.embed_BTD.shape[1] <= len(neurons)
    return (
        forward_maps(network, neurons, max_bytes) if forward else backward_maps(network, neurons, max_bytes)
    )


def _token_embeddings(network: FrozenNetwork) -> Float[Tensor, "T D"]:
    embed_TD = network.embed_BTD[0]
    return embed_TD if network.position_BTD is None else embed_TD - network.position_BTD[0]


def _passes(network: FrozenNetwork, max_bytes: int) -> int:
    """Return how many passes fit together: a stream and a layer's neurons each."""
    _, n_positions, width = network.embed_BTD.shape
    numbers = n_positions * (COPIES * width + 2 * network.blocks[0].neurons_BTN.shape[2])
    return max(1, max_bytes // (numbers * network.embed_BTD.element_size()))


def forward_maps(network: FrozenNetwork, neurons: Neurons, max_bytes: int = 1 << 30) -> Float[Tensor, "n T"]:
    """Return the maps by one linear pass a token."""
    embed_TD = _token_embeddings(network)
    map_nT = embed_TD.new_zeros(len(neurons), len(embed_TD))
    for tokens in torch.arange(len(embed_TD), device=embed_TD.device).split(_passes(network, max_bytes)):
        alone_KTD = embed_TD.new_zeros(len(tokens), *embed_TD.shape)
        alone_KTD[torch.arange(len(tokens), device=tokens.device), tokens] = embed_TD[tokens]

        def read(layer: int, a_BKTN: Tensor, tokens: Tensor = tokens) -> Tensor:
            here = (neurons.layer_n == layer).nonzero()[:, 0]
            map_nT[here[:, None], tokens] = a_BKTN[0, :, neurons.position_n[here], neurons.index_n[here]].T
            return a_BKTN

        network.forward(alone_KTD[None], bias=False, on_neurons=read)
    return map_nT


def backward_maps(network: FrozenNetwork, neurons: Neurons, max_bytes: int = 1 << 30) -> Float[Tensor, "n T"]:
    """Return the maps by one linear pass a neuron."""
    embed_TD = _token_embeddings(network)
    map_nT = embed_TD.new_zeros(len(neurons), len(embed_TD))
    for layer in neurons.layer_n.unique().tolist():
        here = (neurons.layer_n == layer).nonzero()[:, 0]
        for part in here.split(_passes(network, max_bytes)):
            map_nT[part] = torch.einsum("std,td->st", _pulled_back(network, neurons, layer, part), embed_TD)
    return map_nT


def _pulled_back(
    network: FrozenNetwork, neurons: Neurons, layer: int, part: Tensor
) -> Float[Tensor, "S T D"]:
    """Return the cotangents of some neurons of one layer on the embeddings."""
    block, position = network.blocks[layer], neurons.position_n[part]
    g_STD = network.embed_BTD.new_zeros(len(part), *network.embed_BTD.shape[1:])
    rows = torch.arange(len(part), device=part.device)
    g_STD[rows, position] = input_rows(block, position, neurons.index_n[part])
    g_BKTD = g_STD[None]
    if not block.parallel:
        g_BKTD = g_BKTD + block.attention_transpose(g_BKTD)
    for lower in reversed(network.blocks[:layer]):
        middle_BKTD = g_BKTD + lower.neurons_transpose(lower.write_transpose(g_BKTD))
        g_BKTD = middle_BKTD + lower.attention_transpose(g_BKTD if lower.parallel else middle_BKTD)
    return g_BKTD[0]
