"""Neurons as interventions: ablate, scale or replace them, and see which answers change (paper section 5; digest 1.9).

A node is (layer, position, neuron), the position counted without padding, or None for every position. The edits are
`shared` interventions, so they compose, are saved with `save_interventions`, and act during generation. Beside every
edit stands a matched control: as many random other neurons of the same layers and positions.
"""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.tasks import PairBatch
from shared.errors import UserError
from shared.hooks import edit
from shared.interventions import Ablate, Intervention, Scale

if TYPE_CHECKING:
    from shared.architecture import Architecture
    from shared.models import Model
    from shared.tokens import TokenBatch


class Node(NamedTuple):
    """One neuron at one position (None: at every position)."""

    layer: int
    position: int | None
    neuron: int


def nodes_of(mask_LTN: Bool[Tensor, "L T N"]) -> list[Node]:
    """Return the nodes of a mask in order."""
    return [Node(*entry) for entry in mask_LTN.nonzero().tolist()]


def _groups(nodes: Sequence[Node]) -> dict[tuple[int, int | None], list[int]]:
    groups: dict[tuple[int, int | None], set[int]] = defaultdict(set)
    for layer, position, neuron in nodes:
        groups[layer, position].add(neuron)
    return {key: sorted(neurons) for key, neurons in groups.items()}


def scale_nodes(nodes: Sequence[Node], factor: float) -> list[Intervention]:
    """Return edits that multiply the nodes by a factor (0 ablates, -1 flips, 2 amplifies)."""
    return [
        Scale(f"blocks.{layer}.neurons", factor, indices=indices, positions=None if at is None else (at,))
        for (layer, at), indices in _groups(nodes).items()
    ]


def replace_nodes(nodes: Sequence[Node], reference_LTN: Float[Tensor, "L T N"]) -> list[Intervention]:
    """Return edits that set each node to its reference at its position, or to the one of all positions (T is 1)."""
    edits: list[Intervention] = []
    n_positions = reference_LTN.shape[1]
    for (layer, at), indices in _groups(nodes).items():
        if at is None:
            raise UserError("a reference for each position needs nodes with positions")
        if n_positions > 1 and at >= n_positions:
            raise UserError(f"the reference has {n_positions} positions, a node is at position {at}")
        mean_X = reference_LTN[layer, at if n_positions > 1 else 0, indices]
        edits.append(Ablate(f"blocks.{layer}.neurons", mean=mean_X, indices=indices, positions=(at,)))
    return edits


def matched_random(nodes: Sequence[Node], architecture: "Architecture", seed: int = 0) -> list[Node]:
    """Return as many random other neurons in each layer and position, and expert, as `nodes` has there (all distinct).

    In a mixture of experts most others would be inactive, and no control.
    """
    rng = random.Random(seed)
    drawn = []
    for (layer, position), taken in _groups(nodes).items():
        pools: dict[range, list[int]] = defaultdict(list)
        for neuron in taken:
            pools[architecture.siblings(layer, neuron)].append(neuron)
        for pool, inside in pools.items():
            rest = sorted(set(pool) - set(inside))
            chosen = rng.sample(rest, min(len(inside), len(rest)))
            drawn += [Node(layer, position, neuron) for neuron in sorted(chosen)]
    return drawn


@dataclass(frozen=True)
class Answers:
    """What the model says at each prompt's last token: top token, both answers' probability, logit difference."""

    top_B: list[int]
    answer_probability_B: Float[Tensor, " B"]
    wrong_probability_B: Float[Tensor, " B"]
    difference_B: Float[Tensor, " B"]

    def accuracy(self) -> float:
        """Return the share of examples whose right answer has the higher logit of the two."""
        return float((self.difference_B > 0).double().mean())


def answer(model: "Model", batch: PairBatch, interventions: Sequence[Intervention] = ()) -> Answers:
    """Return the model's answers on the clean prompts under the interventions."""
    with torch.no_grad(), edit(model, list(interventions)):
        logits_BTV = model(batch.clean)
    rows_B = torch.arange(len(batch), device=logits_BTV.device)
    last_BV = logits_BTV[rows_B, batch.clean.last_columns_B].float()
    right_B, wrong_B = last_BV[rows_B, list(batch.answers)], last_BV[rows_B, list(batch.wrongs)]
    normaliser_B = last_BV.logsumexp(-1)
    return Answers(
        top_B=last_BV.argmax(-1).tolist(),
        answer_probability_B=(right_B - normaliser_B).exp(),
        wrong_probability_B=(wrong_B - normaliser_B).exp(),
        difference_B=right_B - wrong_B,
    )


def side_effect(model: "Model", batch: "TokenBatch", interventions: Sequence[Intervention]) -> float:
    """Return the mean KL divergence (nats a token) from the model to the edited model on a batch of unrelated text."""
    with torch.no_grad():
        before_BTV = model(batch).float().log_softmax(-1)
        with edit(model, list(interventions)):
            after_BTV = model(batch).float().log_softmax(-1)
    kl_BT = (before_BTV.exp() * (before_BTV - after_BTV)).sum(-1)
    return float(kl_BT[batch.attention_mask_BT.bool()].mean())


def changed_answers(
    model: "Model", batch: PairBatch, edits: Mapping[str, Sequence[Intervention]], limit: int = 8
) -> list[dict[str, str | float]]:
    """Return one row a prompt: the model's word and P(answer), then the same under each named edit."""
    decode = model.tokenizer.decode
    results = {"model": answer(model, batch)} | {
        name: answer(model, batch, edit) for name, edit in edits.items()
    }
    rows: list[dict[str, str | float]] = []
    for index, pair in list(enumerate(batch.pairs))[:limit]:
        row: dict[str, str | float] = {"prompt": pair.clean, "answer": pair.answer.strip()}
        for name, result in results.items():
            row[name] = decode([result.top_B[index]]).strip()
            row[f"P {name}"] = round(float(result.answer_probability_B[index]), 4)
        rows.append(row)
    return rows
