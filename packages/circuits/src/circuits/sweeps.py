"""Steering sweeps: neurons multiplied by a range of factors, beside matched controls and side effects (digest 1.9).

For every factor (0 ablates, -1 flips, 2 amplifies) the rate at which the right answer is said, its probability, and the
KL divergence on unrelated text, with intervals. Beside the chosen neurons stand as many random ones of the same layers
and positions, and as many of like strength (activation times the length of the write direction), each drawn several
times: without them a change may be that of any edit of this size. `saying` does the same through generation.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.pathways import neuron_activations
from circuits.steering import Node, answer, matched_random, scale_nodes, side_effect
from circuits.tasks import PairBatch
from shared.interventions import Intervention
from shared.stats import Interval, bootstrap_interval

if TYPE_CHECKING:
    from shared.models import Model
    from shared.tokens import TokenBatch


@dataclass(frozen=True)
class SweepPoint:
    """One set of neurons at one factor: how often and how likely the right answer is, and KL on unrelated text."""

    nodes: str  # chosen, random or strength-matched
    factor: float
    answer_rate: Interval
    probability: Interval
    accuracy: Interval
    kl: float


def sweep(
    model: "Model",
    pairs: PairBatch,
    nodes: Sequence[Node],
    factors: Sequence[float],
    neutral: "TokenBatch",
    *,
    controls: int = 3,
    seed: int = 0,
) -> list[SweepPoint]:
    """Return every factor's effect on the clean prompts for the nodes, random ones and ones of like strength."""
    strength_LTN = write_strength(model, pairs.clean)
    sets = {
        "chosen": [list(nodes)],
        "random": [matched_random(nodes, model.architecture, seed + draw) for draw in range(controls)],
        "strength-matched": [strength_matched(nodes, strength_LTN, seed + draw) for draw in range(controls)],
    }
    return [
        _point(model, pairs, name, factor, [scale_nodes(some, factor) for some in drawn], neutral)
        for factor in factors
        for name, drawn in sets.items()
    ]


def _point(
    model: "Model",
    pairs: PairBatch,
    name: str,
    factor: float,
    edits: Sequence[Sequence[Intervention]],
    neutral: "TokenBatch",
) -> SweepPoint:
    results = [answer(model, pairs, some) for some in edits]
    said = [np.array(result.top_B) == np.array(pairs.answers) for result in results]
    probability = [result.answer_probability_B.double().cpu().numpy() for result in results]
    right = [(result.difference_B > 0).cpu().numpy() for result in results]
    clusters = list(pairs.clusters) * len(results)
    rate, likely, accurate = (
        bootstrap_interval(np.concatenate(values).astype(float), clusters=clusters, resamples=500)
        for values in (said, probability, right)
    )
    kl = float(np.mean([side_effect(model, neutral, some) for some in edits]))
    return SweepPoint(name, factor, rate, likely, accurate, kl)


def write_strength(model: "Model", batch: "TokenBatch") -> Float[Tensor, "L T N"]:
    """Return every node's mean absolute activation times the length of what it writes."""
    acts_LTN = neuron_activations(model, batch).abs().mean(0)
    blocks = (model.architecture.block(layer) for layer in range(model.architecture.n_layers))
    length_LN = torch.stack([block.W_down.detach().float().norm(dim=0) for block in blocks])
    return acts_LTN * length_LN[:, None].to(acts_LTN)


def strength_matched(
    nodes: Sequence[Node], strength_LTN: Float[Tensor, "L T N"], seed: int = 0, among: int = 20
) -> list[Node]:
    """Return, for each node, another one of its layer and position drawn from the `among` next to it in strength."""
    rng, taken, drawn = random.Random(seed), set(nodes), []
    for node in nodes:
        layer, position, neuron = node
        column_N = (
            strength_LTN[layer].sum(0)
            if position is None
            else strength_LTN[layer, min(position, strength_LTN.shape[1] - 1)]
        )
        nearest = (column_N - column_N[neuron]).abs().argsort().tolist()
        free = [Node(layer, position, other) for other in nearest]
        free = [other for other in free if other not in taken][:among]
        if free:
            drawn.append(rng.choice(free))
            taken.add(drawn[-1])
    return drawn


def saying(
    model: "Model",
    prompts: Sequence[str],
    expected: Sequence[str],
    interventions: Sequence[Intervention],
    max_tokens: int = 8,
) -> tuple[float, list[str]]:
    """Return how often the greedy continuation under the edits begins with the expected word, and the continuations."""
    from shared.generation import HFGenerator, Request, Sampling

    generator = HFGenerator(model, interventions)
    completions = generator.generate([Request(prompt) for prompt in prompts], Sampling(max_tokens=max_tokens))
    texts = [completion[0].text for completion in completions]
    hits = [text.strip().startswith(word.strip()) for text, word in zip(texts, expected, strict=True)]
    return sum(hits) / len(hits), texts
