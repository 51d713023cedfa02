"""The stages of circuit_tracing: node scores, edges, the graph, and ablations.

What takes long is kept in the run folder, in files named after what they are made from (pairs and settings), so that a
resumed run whose pairs changed makes new ones.
"""

from functools import partial
from operator import ne
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.attribution import top_nodes
from circuits.edge_circuits import edge_scores
from circuits.edges import Neurons
from circuits.faithfulness import CurvePoint
from circuits.folder import with_effects
from circuits.graph import Graph, load_graph
from circuits.pathways import neuron_activations, pathway_edits
from circuits.steering import answer, changed_answers, matched_random, nodes_of
from circuits.study import (
    Study,
    conservation_error,
    first_pairs,
    held_out_edge_curve,
    mean_scores,
    pose_pairs,
)
from circuits.tracing import trace_problem
from shared.runs import Run, config_hash

if TYPE_CHECKING:
    from circuits.pipeline import CircuitTracingConfig


def inputs_hash(study: Study, *settings: Any) -> str:
    """Return 8 hex digits of the pairs and the settings that a stage's file is made from."""
    return config_hash([study.train.pairs, study.test.pairs, *settings])[:8]


def graph_folder(study: Study, config: "CircuitTracingConfig") -> str:
    """Return the name of the graph's folder in the run folder."""
    settings = (config.reference, config.threshold, config.max_nodes, config.max_edges)
    return f"graph_{study.name}-{inputs_hash(study, *settings)}"


def score_stage(study: Study, config: "CircuitTracingConfig", run: Run) -> dict[str, Tensor]:
    """Return every estimator's mean scores (L T N) on the training pairs, from the run folder where they are done."""
    from safetensors.torch import load_file, save_file

    key = inputs_hash(study, config.reference, config.estimators)
    stage = run.stage(f"scores_{study.name}-{key}.safetensors")
    if not stage.done:
        problem = pose_pairs(study, study.train)
        scores = {name: mean_scores(problem, name, run.seed).contiguous() for name in config.estimators}
        scores["conservation_error"] = torch.tensor(conservation_error(problem), dtype=torch.float64)
        with stage as path:
            save_file({name: tensor.cpu() for name, tensor in scores.items()}, path)
    return {name: tensor.to(study.model.device) for name, tensor in load_file(stage.path).items()}


def edge_stage(
    study: Study, scores_LTN: Tensor, config: "CircuitTracingConfig", run: Run
) -> dict[str, list[CurvePoint]]:
    """Return, for every ranking of edges among the circuit's neurons, its values on the test pairs by path patching.

    Edges are ranked on the training pairs; scores and values are kept in the run folder.
    """
    from safetensors.torch import load_file, save_file

    neurons = Neurons.from_mask(top_nodes(scores_LTN, config.ablate))
    settings = (config.reference, config.ablate, config.edge_pairs)
    ranking_key = inputs_hash(study, *settings, config.edge_estimators)  # all pairs choose the neurons
    curve_key = inputs_hash(study, *settings, config.edge_sizes)
    study = first_pairs(study, config.edge_pairs)
    stage = run.stage(f"edges_{study.name}-{ranking_key}.safetensors")
    if not stage.done:
        problem = pose_pairs(study, study.train)
        ranked = {name: edge_scores(problem, neurons, name, run.seed) for name in config.edge_estimators}
        with stage as path:
            save_file({name: scores.contiguous().cpu() for name, scores in ranked.items()}, path)
    points = {}
    for name, scores_Sn in load_file(stage.path).items():
        scores_Sn = scores_Sn.to(scores_LTN.device)
        values = partial(held_out_edge_curve, study, neurons, scores_Sn, config.edge_sizes)
        rows = run.json_stage(f"edge_curve_{study.name}_{name}-{curve_key}.json", values)
        points[name] = [_curve_point(row) for row in rows]
    return points


def _curve_point(row: dict[str, Any]) -> CurvePoint:
    names = ("circuit_B", "rest_B", "full_B", "empty_B")
    circuit, rest, full, empty = (torch.tensor(row[name], dtype=torch.float64) for name in names)
    return CurvePoint(row["size"], circuit, rest, full, empty, tuple(row["clusters"]))


def graph_stage(study: Study, config: "CircuitTracingConfig", run: Run) -> Graph:
    """Trace the first test prompt that the model answers rightly, or the first one where it answers none.

    Graph and page are written into the run folder; the sign of the graph's target value says which of the two it is.
    """
    stage = run.stage(graph_folder(study, config))
    if not stage.done:
        right = (answer(study.model, study.test).difference_B > 0).int()
        problem, row = pose_pairs(study, study.test), int(right.argmax())
        pair = study.test.pairs[row]
        names = [f"{pair.answer.strip()} over {pair.wrong.strip()}"]
        limits = {"threshold": config.threshold, "max_nodes": config.max_nodes, "max_edges": config.max_edges}
        with stage as path:
            graph = trace_problem(problem, row, names, **limits)  # type: ignore[arg-type]
            with_effects(study.model, graph).save(path, f"{study.name}: {pair.clean} ...")
    return load_graph(stage.path)


def ablate_top(
    study: Study, scores_LTN: Tensor, config: "CircuitTracingConfig", seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Edit the top neurons on the test prompts; returns figures, and rows to show.

    `ablated` sets them to the reference, `swapped` to what they are in each prompt's counterfactual; `random` does both
    to as many other neurons of the same layers and positions.
    """
    model, top = study.model, top_nodes(scores_LTN, config.ablate)
    rest = torch.zeros_like(top)
    for layer, position, neuron in matched_random(nodes_of(top), model.architecture, seed):
        rest[layer, position, neuron] = True
    swapped_BLTN = neuron_activations(model, study.test.corrupt)
    reference_BLTN = study.reference_BLTN.expand(1, *scores_LTN.shape)
    edits = {
        "ablated": pathway_edits(model, ~top[None], reference_BLTN),
        "swapped": pathway_edits(model, ~top[None], swapped_BLTN),
        "random ablated": pathway_edits(model, ~rest[None], reference_BLTN),
        "random swapped": pathway_edits(model, ~rest[None], swapped_BLTN),
    }
    figures: dict[str, Any] = {"neurons": int(top.sum()), "of": top.numel()}
    before = answer(model, study.test)
    for name, interventions in {"model": [], **edits}.items():
        after = answer(model, study.test, interventions)
        figures[name] = {
            "accuracy": after.accuracy(),
            "logit_difference": float(after.difference_B.mean()),
            "answers_changed": sum(map(ne, before.top_B, after.top_B)) / len(before.top_B),
        }
    rows = changed_answers(model, study.test, edits, config.examples)
    figures["examples"] = rows
    return figures, rows
