"""The stages of circuit_tracing that go from neurons to concepts: supernodes, hypotheses, steering, the capitals study.

Each leaves typed JSON in the run folder or its metrics; supernodes lie beside the graph too, for its page.
"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.attribution import Problem, attribute, pose, top_nodes
from circuits.clusters import cluster, coverage
from circuits.concepts_report import report_steps, swap_rate
from circuits.describe import vocabulary_effects
from circuits.folder import SUPERNODES, with_effects
from circuits.graph import load_graph
from circuits.hypotheses import (
    Finding,
    chosen_features,
    score_hypotheses,
    signed_features,
    strongest_features,
)
from circuits.merge import AlwaysOn, always_on
from circuits.metric import Metric, top_logits
from circuits.pathways import neuron_activations
from circuits.pipeline_stages import graph_folder, inputs_hash
from circuits.profiles import Profile, Signed, frequent, profile
from circuits.prune import select_nodes
from circuits.relp import relp
from circuits.steering import nodes_of
from circuits.step_data import QUESTIONS, StepData, make_step_data
from circuits.steps import SETS, find_sets, judge, overlap
from circuits.study import Study, pose_pairs
from circuits.supernodes import Supernodes, from_clusters, read_supernodes, write_supernodes
from circuits.sweeps import SweepPoint, sweep
from circuits.tasks import PairBatch
from circuits.tracing import trace
from shared.models import Model
from shared.runs import Run, config_hash
from shared.tinyworld.facts import CAPITALS

if TYPE_CHECKING:
    from circuits.pipeline import CircuitTracingConfig

NEUTRAL = (
    "The children went to the park and played a game.",
    "She put the book on the table and walked home.",
    "It was late, and the small dog was tired.",
    "He has a red hat and a new boat.",
    "The old man sat by the window with a cup of tea.",
    "They saw a bird in the tree near the house.",
    "Mom made a cake, and it was very good.",
    "The water was cold, but the sun was warm.",
    "One day a little girl found a key in the grass.",
    "He wanted to help his friend, so he ran home.",
)  # unrelated text: always-on neurons, side effects
TARGETS = 5  # the paper's case studies trace the five likeliest tokens


def context_profiles(
    study: Study, pairs: PairBatch, config: "CircuitTracingConfig", run: Run, limit: int
) -> list[Profile]:
    """Return the profiles of the first `limit` clean prompts: nodes above the graph's threshold, top logits."""

    def make_metric(logits_BTV: Tensor, positions_B: Tensor) -> Metric:
        return top_logits(logits_BTV, positions_B, TARGETS)

    prompts = [pair.clean for pair in pairs.pairs[:limit]]
    problem = pose(study.model, study.model.encode(prompts), make_metric)
    return [
        profile(problem, row, _strong_nodes(problem, row, config))
        for row in run.progress(range(len(prompts)), "profiles")
    ]


def _strong_nodes(problem: Problem, row: int, config: "CircuitTracingConfig") -> Tensor:
    keep_S = problem.network.real_BT[row].nonzero()[:, 0]
    found = relp(problem.network.row(row), problem.metric.row(row, keep_S))
    totals_KLTN = found.sensitivity_BKLTN[0] * problem.activations_BLTN[row][:, keep_S]
    mask_LSN = select_nodes(totals_KLTN, found.ledger.value_BK[0], config.threshold, config.max_nodes).mask
    mask_LTN = torch.zeros_like(problem.activations_BLTN[row], dtype=torch.bool)
    mask_LTN[:, keep_S] = mask_LSN
    return mask_LTN


def supernode_stage(study: Study, config: "CircuitTracingConfig", run: Run) -> Supernodes:
    """Cluster the neurons of the training prompts; coverage is that of the test prompts' neurons by the frozen map."""
    key = inputs_hash(study, config.threshold, config.max_nodes, config.supernodes, config.contexts)
    stage = run.stage(f"supernodes_{study.name}-{key}.json")
    made = not stage.done
    if made:
        contexts = context_profiles(study, study.train, config, run, config.contexts)
        neurons = frequent(contexts, max(2, len(contexts) // 10), config.max_nodes)
        clustering = cluster(contexts, neurons, config.supernodes, seed=run.seed)
        held_out = context_profiles(study, study.test, config, run, config.contexts)
        found = from_clusters(study.model, clustering, contexts, coverage(held_out, neurons))
        with stage as path:
            write_supernodes(path, found)
    content = read_supernodes(stage.path)
    _beside_graph(study, content, run.path(graph_folder(study, config)), made)
    return content


def _beside_graph(study: Study, content: Supernodes, folder: Path, made: bool) -> None:
    """Write the supernodes beside the graph, and its page anew with them and their effects.

    Where they were not made just now and some are there already, these stay: they may have been edited on the page.
    """
    path = folder / SUPERNODES
    if path.exists() and (found := read_supernodes(path)).supernodes and (not made or found == content):
        return
    graph = load_graph(folder)
    with_effects(study.model, graph, content).save(folder, f"{study.name}: {graph.header.prompt} ...")


def hypothesis_stage(study: Study, config: "CircuitTracingConfig", run: Run) -> list[Finding]:
    """Score the strongest signed neurons against every class of the task's labels."""

    def compute() -> list[dict[str, Any]]:
        train, test = (_features(study, half, run.seed) for half in (study.train, study.test))
        neurons, mask_2LN = strongest_features(train, config.hypotheses)
        names = sorted(set(study.train.examples[0].labels) & set(study.test.examples[0].labels))
        labels = [{name: half.labels(name) for name in names} for half in (study.train, study.test)]
        findings = score_hypotheses(
            neurons,
            chosen_features(train, mask_2LN), labels[0],
            chosen_features(test, mask_2LN), labels[1],
            seed=run.seed,
            test_clusters=study.test.clusters,
        )  # fmt: skip
        return [asdict(finding) for finding in findings]

    key = inputs_hash(study, config.reference, config.hypotheses)
    rows = run.json_stage(f"hypotheses_{study.name}-{key}.json", compute)
    return [Finding(**row | {"neuron": Signed(*row["neuron"])}) for row in rows]


def _features(study: Study, half: PairBatch, seed: int) -> Tensor:
    problem = pose_pairs(study, half)
    return signed_features(attribute(problem, "relp", seed)[:, 0], problem.activations_BLTN)


def always_on_stage(model: Model, config: "CircuitTracingConfig", run: Run) -> list[AlwaysOn]:
    """Return the neurons in the graphs of nearly all neutral prompts: a circuit that has them is not about its task."""

    def compute() -> list[AlwaysOn]:
        prompts = run.progress(NEUTRAL, "neutral prompts")
        limits = {"threshold": config.threshold, "max_nodes": config.max_nodes}
        return always_on([trace(model, text, max_edges=1, **limits) for text in prompts])  # type: ignore[arg-type]

    key = config_hash([NEUTRAL, config.threshold, config.max_nodes])[:8]
    return [AlwaysOn(*row) for row in run.json_stage(f"always_on-{key}.json", compute)]


def steering_stage(
    study: Study, scores_LTN: Tensor, config: "CircuitTracingConfig", run: Run
) -> list[SweepPoint]:
    """Multiply the circuit's nodes by every factor, beside random and strength-matched ones."""
    nodes = nodes_of(top_nodes(scores_LTN, config.ablate))
    neutral = study.model.encode(list(NEUTRAL))
    return sweep(study.model, study.test, nodes, config.steer, neutral, seed=run.seed)


def steps_stage(model: Model, config: "CircuitTracingConfig", run: Run) -> dict[str, Any]:
    """Run the capitals study; returns its figures and adds its section of the report."""

    def compute() -> dict[str, Any]:
        data = make_step_data(model, run.seed)
        sets = find_sets(data, config.steps)
        effects = judge(data, sets, run.seed)
        return {
            "states": data.states,
            "neurons_a_state": config.steps,
            "overlap": {
                f"{one} and {other}": overlap(sets, one, other)
                for one, other in (("first", "second"), ("first", "common"), ("second", "common"))
            },
            "effects": [asdict(effect) for effect in effects],
            "named": named_neurons(model, data, sets),
        }

    found: dict[str, Any] = run.json_stage("steps.json", compute)
    report_steps(found, run)
    rates = {
        name: {question: swap_rate(found["effects"], name, question) for question in QUESTIONS}
        for name in ("none", *SETS, *(f"{name}: random" for name in SETS))
    }
    says = {name: _says([row for row in found["named"] if row["step"] == name]) for name in SETS}
    return {"states": len(found["states"]), "overlap": found["overlap"], "swapped": rates, "says": says}


def _says(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share of states whose set raises its state, or its capital, most of all words."""
    answers = {"state": lambda row: row["state"], "capital": lambda row: CAPITALS[row["state"]]}
    return {
        name: sum(row["says"][0] == answer(row) for row in rows) / len(rows)
        for name, answer in answers.items()
    }


def named_neurons(model: Model, data: StepData, sets: dict[str, Tensor], k: int = 5) -> list[dict[str, Any]]:
    """Return, for each step and state, its k neurons of largest mean activation, and the words the whole set raises.

    `sets` holds a mask (states, layers, neurons) for each step: "first" (which asks the state), "second" (the capital)
    or "common" (both questions). Means are over the state's training prompts of that question, at their last token.
    Rows have `step`, `state`, `neurons` ("L2/N15+", the sign that of the mean) and `says`: the three words of the
    largest sum, over all of the set's neurons, of mean activation times direct write.
    """
    asked = {"first": "state", "second": "capital", "common": "both"}
    rows = []
    for name, chosen_SLN in sets.items():
        batch = data.studies[asked[name]].train
        rows_B = torch.arange(len(batch))
        last_BLN = neuron_activations(model, batch.clean)[rows_B, :, batch.clean.last_columns_B]
        for state, chosen_LN in zip(data.states, chosen_SLN, strict=True):
            here_B = torch.tensor([label == state for label in batch.labels("state")])
            mean_LN = last_BLN[here_B].mean(0)
            neurons = [
                Signed(layer, neuron, 1 if mean_LN[layer, neuron] >= 0 else -1)
                for layer, neuron in chosen_LN.nonzero().tolist()
            ]
            size_n = mean_LN[chosen_LN].abs()
            written_V = size_n @ vocabulary_effects(model, neurons).to(size_n)
            words = [model.tokenizer.decode([token]).strip() for token in written_V.topk(3).indices.tolist()]
            strongest = [str(neurons[place]) for place in size_n.topk(min(k, len(neurons))).indices.tolist()]
            rows.append({"step": name, "state": state, "neurons": strongest, "says": words})
    return rows
