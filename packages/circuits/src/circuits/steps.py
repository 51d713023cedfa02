"""The capitals study: neurons for city -> state and for state -> capital, and whether they carry the two-step question.

Three questions about the same states: `state` (which state contains the city), `capital` (the capital of the state: no
city in it), `both` (the capital of the state containing the city). For each state a step's neurons are the k of largest
RelP score, summed over positions, mean over the state's training prompts of the step's own question less the mean over
all states: `first` from the state question, `second` from the capital question, `common` by the smallest of the three
questions' scores. The two-step question is used for `common` alone: that `second` carries it is found, not put in.

Judged on held-out cities (the capital question, which has none: on another wording), by edits at all positions:

    swapped    the neurons of the prompt's state and of its counterfactual's at what they are in the counterfactual:
               how often is the counterfactual's answer said?
    ablated    the state's neurons at their mean over training prompts: how often is the answer still said?
    amplified  the state's neurons doubled: the same

beside as many random neurons of the same layers, and the neurons of a third state. A step is dissociated when swapping
its neurons changes the answers of its question and not those of the other's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.attribution import attribute
from circuits.pathways import neuron_activations, pathway_edits
from circuits.steering import answer
from circuits.step_data import QUESTIONS, StepData
from circuits.study import Study, pose_pairs
from circuits.tasks import PairBatch
from shared.hooks import edit
from shared.stats import Interval, bootstrap_interval

if TYPE_CHECKING:
    from shared.models import Model

SETS = ("first", "second", "common")
CONTROLS = ("random", "third state")
EDITS = ("swapped", "ablated", "amplified")
States = Bool[Tensor, "S L N"]


@dataclass(frozen=True)
class Effect:
    """One set of neurons under one edit on one question: how often the own and the counterfactual's answer is said."""

    nodes: str
    edit: str
    question: str
    own: Interval
    other: Interval


def state_scores(data: StepData, question: str) -> Float[Tensor, "S L N"]:
    """Return every neuron's mean score on each state's training prompts of a question, less the mean over states."""
    study = data.studies[question]
    scores_BLN = attribute(pose_pairs(study, study.train), "relp")[:, 0].sum(2)
    label_B = np.array(study.train.labels("state"))
    mean_SLN = torch.stack([scores_BLN[torch.from_numpy(label_B == state)].mean(0) for state in data.states])
    return mean_SLN - mean_SLN.mean(0)


def find_sets(data: StepData, k: int) -> dict[str, States]:
    """Return the k neurons of every state for each step, chosen on training prompts alone."""
    scores = {question: state_scores(data, question) for question in QUESTIONS}
    smallest_SLN = torch.stack(list(scores.values())).amin(0)
    ranked = {"first": scores["state"], "second": scores["capital"], "common": smallest_SLN}
    return {name: _largest(ranked[name], k) for name in SETS}


def _largest(scores_SLN: Float[Tensor, "S L N"], k: int) -> States:
    flat_SX = scores_SLN.flatten(1)
    chosen_SX = torch.zeros_like(flat_SX, dtype=torch.bool)
    return chosen_SX.scatter_(1, flat_SX.topk(k, dim=1).indices, True).reshape(scores_SLN.shape)


def overlap(sets: Mapping[str, States], one: str, other: str) -> tuple[float, float]:
    """Return the mean share of a state's neurons in one set that are in its other set, and in another state's."""
    a_SX, b_SX = (sets[name].flatten(1) for name in (one, other))
    size = float(a_SX.sum(1).double().mean())
    shared_SS = (a_SX.double() @ b_SX.double().T) / size
    n_states = len(shared_SS)
    same = float(shared_SS.diagonal().mean())
    return same, float((shared_SS.sum() - shared_SS.diagonal().sum()) / (n_states * (n_states - 1)))


def judge(data: StepData, sets: Mapping[str, States], seed: int = 0) -> list[Effect]:
    """Return the effect of every set and control under every edit on every question's held-out prompts."""
    effects = [_measure(data, question, "none", "none", None) for question in QUESTIONS]
    for name in sets:
        controls = {name: sets[name], f"{name}: random": random_like(sets[name], seed)}
        controls[f"{name}: third state"] = sets[name].roll(len(data.states) // 2, 0)
        for label, chosen_SLN in controls.items():
            for kind in EDITS:
                effects += [_measure(data, question, label, kind, chosen_SLN) for question in QUESTIONS]
    return effects


def random_like(chosen_SLN: States, seed: int = 0) -> States:
    """Return, for every state and layer, as many other neurons drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    noise_SLN = torch.rand(chosen_SLN.shape, generator=generator).to(chosen_SLN.device)
    rank_SLN = noise_SLN.masked_fill(chosen_SLN, -1.0).argsort(-1, descending=True).argsort(-1)
    return (rank_SLN < chosen_SLN.sum(-1, keepdim=True)) & ~chosen_SLN


def _measure(data: StepData, question: str, nodes: str, kind: str, chosen_SLN: States | None) -> Effect:
    study = data.studies[question]
    top_B = torch.tensor(_top(data, study, kind, chosen_SLN))
    own_B, other_B = (top_B == torch.tensor(ids) for ids in (study.test.answers, study.test.wrongs))
    clusters = study.test.labels("state")
    own, other = (
        bootstrap_interval(hits.double(), clusters=clusters, resamples=500) for hits in (own_B, other_B)
    )
    return Effect(nodes, kind, question, own, other)


def _top(data: StepData, study: Study, kind: str, chosen_SLN: States | None) -> list[int]:
    if chosen_SLN is None:
        return answer(study.model, study.test).top_B
    return _EDITS[kind](data, study, chosen_SLN)


def _rows(data: StepData, batch: PairBatch, label: str, chosen_SLN: States) -> Bool[Tensor, "B L 1 N"]:
    index = {state: row for row, state in enumerate(data.states)}
    rows_B = torch.tensor([index[state] for state in batch.labels(label)], device=chosen_SLN.device)
    return chosen_SLN[rows_B][:, :, None]


def _edited(model: "Model", batch: PairBatch, change_BLTN: Tensor, value_BLTN: Tensor) -> list[int]:
    with torch.no_grad(), edit(model, pathway_edits(model, ~change_BLTN, value_BLTN)):
        logits_BTV = model(batch.clean)
    rows_B = torch.arange(len(batch), device=logits_BTV.device)
    return logits_BTV[rows_B, batch.clean.last_columns_B.to(rows_B.device)].argmax(-1).tolist()


def _swap(data: StepData, study: Study, chosen_SLN: States) -> list[int]:
    batch = study.test
    change = _rows(data, batch, "state", chosen_SLN) | _rows(data, batch, "other state", chosen_SLN)
    return _edited(study.model, batch, change, neuron_activations(study.model, batch.corrupt))


def _ablate(data: StepData, study: Study, chosen_SLN: States) -> list[int]:
    change = _rows(data, study.test, "state", chosen_SLN)
    mean_LN = neuron_activations(study.model, study.train.clean).mean(
        (0, 2)
    )  # test wordings differ in length
    return _edited(study.model, study.test, change, mean_LN[None, :, None])


def _amplify(data: StepData, study: Study, chosen_SLN: States) -> list[int]:
    change = _rows(data, study.test, "state", chosen_SLN)
    return _edited(study.model, study.test, change, 2 * neuron_activations(study.model, study.test.clean))


_EDITS: dict[str, Callable[[StepData, Study, States], list[int]]] = {
    "swapped": _swap,
    "ablated": _ablate,
    "amplified": _amplify,
}


def find_effect(effects: Sequence[Effect], nodes: str, kind: str, question: str) -> Effect:
    """Return one effect by its names."""
    return next(e for e in effects if (e.nodes, e.edit, e.question) == (nodes, kind, question))
