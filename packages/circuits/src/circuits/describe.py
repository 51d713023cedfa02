"""What a neuron says and when it fires: descriptions that need no other model (digest 1.9).

- Words: the direct path of neuron i in layer l, its write direction W_d[:, i] through the post-norm's and the final
  norm's gains and the unembedding. `describe` takes it at one prompt's activation, with the norms frozen there;
  `vocabulary_effects` from the weights alone (no prompt: gains without the norms' scale, so only the order means much).
- Contexts: the places of a set of texts at which it fires most at a given sign (`firing_contexts`).

`circuits.explain` has a language model write descriptions from the contexts, and scores them on held-out ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from circuits.edges import Neurons
from circuits.pathways import neuron_activations
from circuits.profiles import Signed

if TYPE_CHECKING:
    from circuits.frozen import FrozenNetwork
    from shared.models import Model


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


def vocabulary_effects(model: "Model", neurons: Sequence[Signed]) -> Float[Tensor, "n V"]:
    """Return the direction in which each signed neuron moves the logits, from the weights alone (unit activation)."""
    architecture = model.architecture
    rows_nD = architecture.W_U.new_zeros(len(neurons), architecture.width)
    for layer in {neuron.layer for neuron in neurons}:
        block = architecture.block(layer)
        here = [row for row, neuron in enumerate(neurons) if neuron.layer == layer]
        signs_n = rows_nD.new_tensor([neurons[row].sign for row in here])
        write_nD = block.W_down.T[[neurons[row].neuron for row in here]] * signs_n[:, None]
        gain_D = None if block.mlp_post_norm is None else block.mlp_post_norm.gain.to(write_nD)
        rows_nD[here] = write_nD.detach() if gain_D is None else (write_nD * gain_D).detach()
    norm = architecture.final_norm
    rows_nD = rows_nD - rows_nD.mean(-1, keepdim=True) if norm.kind == "layer" else rows_nD
    return (rows_nD * norm.gain.detach().to(rows_nD)) @ architecture.W_U.detach().T


def describe(network: "FrozenNetwork", neurons: Neurons, tokenizer: Any, k: int = 4) -> list[str]:
    """Return one line a neuron: the k tokens it raises most and the k it lowers most."""
    return _lines(write_logits(network, neurons), tokenizer, k) if len(neurons) else []


def describe_weights(model: "Model", neurons: Sequence[Signed], k: int = 4) -> list[str]:
    """Return the same line for each signed neuron from the weights alone, so of no prompt in particular."""
    return _lines(vocabulary_effects(model, neurons), model.tokenizer, k) if neurons else []


def _lines(logits_nV: Tensor, tokenizer: Any, k: int) -> list[str]:
    raised, lowered = logits_nV.topk(k).indices.tolist(), (-logits_nV).topk(k).indices.tolist()

    def words(ids: list[int]) -> str:
        return " ".join(repr(tokenizer.decode([token])) for token in ids)

    return [f"raises {words(up)}; lowers {words(down)}" for up, down in zip(raised, lowered, strict=True)]


@dataclass(frozen=True)
class Context:
    """One text with a signed neuron's activation at every token (0 where it has the other sign)."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    @property
    def peak(self) -> float:
        """The largest activation."""
        return max(self.activations)

    def marked(self, share: float = 0.5) -> str:
        """Return the text with the tokens that reach a share of the peak between << and >>."""
        limit = share * self.peak
        pieces = (
            f"<<{token}>>" if value > 0 and value >= limit else token
            for token, value in zip(self.tokens, self.activations, strict=True)
        )
        return "".join(pieces)


def contexts_of(
    model: "Model", texts: Sequence[str], neurons: Sequence[Signed], batch_size: int = 32
) -> dict[Signed, list[Context]]:
    """Return every signed neuron's context in each text, in the order of the texts."""
    found: dict[Signed, list[Context]] = {neuron: [] for neuron in neurons}
    for start in range(0, len(texts), batch_size):
        batch = model.encode(list(texts[start : start + batch_size]))
        acts_BLTN = neuron_activations(model, batch)
        for row, ids in enumerate(batch.rows()):
            tokens = tuple(model.tokenizer.decode([token]) for token in ids)
            real = batch.attention_mask_BT[row].bool().to(acts_BLTN.device)
            for neuron in neurons:
                values_T = (neuron.sign * acts_BLTN[row, neuron.layer, real, neuron.neuron]).clamp_min(0.0)
                found[neuron].append(Context(tokens, tuple(values_T.tolist())))
    return found


def firing_contexts(
    model: "Model", texts: Sequence[str], neurons: Sequence[Signed], k: int = 5
) -> dict[Signed, list[Context]]:
    """Return the k texts in which each signed neuron fires most, the strongest first."""
    every = contexts_of(model, texts, neurons)
    return {neuron: sorted(contexts, key=lambda one: -one.peak)[:k] for neuron, contexts in every.items()}
