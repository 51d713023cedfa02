"""The circuit_tracing pipeline: pairs to scores, faithfulness, a graph with its page, and answers changed by ablation.

For each task: (1) pairs of the training and the test split; (2) node scores by every estimator on training pairs;
(3) faithfulness and completeness against the number of neurons on test pairs; (4) the graph of one test prompt, its
direct edges and its page; (5) the top neurons ablated, beside as many random ones.

Scores and graph are files named after what they are made from (pairs and settings), so that a resumed run whose pairs
changed makes new ones.
"""

from dataclasses import dataclass, field
from operator import ne
from typing import Any, Literal

import torch
from torch import Tensor

from circuits.attribution import ESTIMATORS, top_nodes
from circuits.chart import draw_curves
from circuits.faithfulness import CurvePoint
from circuits.graph import Graph, load_graph
from circuits.pathways import neuron_activations, pathway_edits
from circuits.steering import answer, changed_answers, matched_random, nodes_of
from circuits.study import Study, conservation_error, held_out_curve, make_study, mean_scores, pose_pairs
from circuits.tasks import TASKS, deduplicate, read_pairs, split_by_subject, task_names, task_pairs
from circuits.tracing import trace_problem
from circuits.view import write_page
from shared.models import ModelConfig, load
from shared.runs import Pipeline, Run, config_hash
from shared.tinyworld.tasks import Pair


@dataclass
class CircuitTracingConfig:
    """Settings of circuit_tracing.

    `tasks`: names (simple, nounpp, rc, within_rc, capitals) or paths of JSON-lines files with the columns clean_prefix,
    patch_prefix, clean_answer, patch_answer, case; no two of one name. `reference`: what ablated neurons are set to.
    `ablate`: how many of the top RelP neurons are ablated in the last step.
    """

    tasks: list[str] = field(default_factory=lambda: ["nounpp", "capitals"])
    train_pairs: int = 96
    test_pairs: int = 64
    estimators: list[str] = field(default_factory=lambda: ["relp", "atp", "random"])
    sizes: list[int] = field(default_factory=lambda: [5, 10, 20, 50, 100, 200, 500, 1000])
    reference: Literal["mean", "zero"] = "mean"
    threshold: float = 0.005
    max_nodes: int = 300
    max_edges: int = 2000
    ablate: int = 200
    examples: int = 6

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"tasks must name at least one of {', '.join(TASKS)}, or a file of pairs")
        task_names(self.tasks)
        if not self.sizes or min(self.sizes) < 1 or len(set(self.sizes)) < len(self.sizes):
            raise ValueError(
                f"sizes must be one or more different numbers of neurons, each >= 1; got {self.sizes}"
            )
        for name, least in {
            "train_pairs": 1,
            "test_pairs": 1,
            "max_nodes": 1,
            "max_edges": 1,
            "ablate": 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        unknown = [name for name in self.estimators if name not in ESTIMATORS]
        if unknown or "relp" not in self.estimators:
            raise ValueError(
                f"estimators must include relp and be among {', '.join(ESTIMATORS)}; got {self.estimators}"
            )


def load_pairs(task: str, config: CircuitTracingConfig, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return training and test pairs of a task; a user's file is deduplicated and split by subject."""
    if task in TASKS:
        train, test = (
            task_pairs(task, split, n, seed)
            for split, n in (("train", config.train_pairs), ("test", config.test_pairs))
        )
        return deduplicate(train), deduplicate(test)
    parts = split_by_subject(deduplicate(read_pairs(task)), {"train": 0.7, "test": 0.3}, seed)
    return parts["train"][: config.train_pairs], parts["test"][: config.test_pairs]


def run(config: CircuitTracingConfig, model_config: ModelConfig, run: Run) -> dict[str, Any]:
    """Run the pipeline and return its metrics."""
    pairs = {task: load_pairs(task, config, run.seed) for task in config.tasks}
    model = run.use_model(load(model_config))
    run.report.text(
        "# Circuit tracing\n\nNode scores are fixed on training pairs, every figure is on held-out test pairs."
    )
    metrics: dict[str, Any] = {"conservation_error": 0.0}
    names = task_names(config.tasks)
    for task in run.progress(config.tasks, "tasks"):
        study = make_study(model, names[task], *pairs[task], config.reference)
        result = run_task(study, config, run)
        metrics["conservation_error"] = max(metrics["conservation_error"], result.pop("conservation_error"))
        for key, value in result.items():
            metrics.setdefault(key, {})[names[task]] = value
    return metrics


def run_task(study: Study, config: CircuitTracingConfig, run: Run) -> dict[str, Any]:
    """Score, judge, trace and ablate one task; returns its metrics and adds its part of the report."""
    scores = score_stage(study, config, run)
    graph = graph_stage(study, config, run)
    points = {name: held_out_curve(study, scores[name], config.sizes) for name in config.estimators}
    ablation, rows = ablate_top(study, scores["relp"], config, run.seed)
    metrics = {
        "conservation_error": max(float(scores["conservation_error"]), graph.header.conservation_error),
        "accuracy": float((next(iter(points.values()))[0].full_B > 0).double().mean()),
        "pairs": {
            "train": len(study.train),
            "test": len(study.test),
            "length": study.length,
            "dropped": study.train.dropped + study.test.dropped,
        },
        "faithfulness": _by_size(points, "faithfulness"),
        "completeness": _by_size(points, "completeness"),
        "intervals": {kind: _intervals(points, kind) for kind in ("faithfulness", "completeness")},
        "graph_prompt": {
            "prompt": graph.header.prompt,
            "answered_rightly": graph.header.target_values[0] > 0,
        },
        "edges": graph.n_edges,
        "nodes": len(graph),
        "edge_closure_error": graph.closure_error(),
        "mass_kept": {"nodes": graph.header.node_mass_kept, "edges": graph.header.edge_mass_kept},
        "ablation": ablation,
    }
    _report(study, points, rows, graph, metrics, config, run)
    return metrics


def inputs_hash(study: Study, *settings: Any) -> str:
    """Return 8 hex digits of the pairs and the settings that a stage's file is made from."""
    return config_hash([study.train.pairs, study.test.pairs, *settings])[:8]


def graph_folder(study: Study, config: CircuitTracingConfig) -> str:
    """Return the name of the graph's folder in the run folder."""
    settings = (config.reference, config.threshold, config.max_nodes, config.max_edges)
    return f"graph_{study.name}-{inputs_hash(study, *settings)}"


def score_stage(study: Study, config: CircuitTracingConfig, run: Run) -> dict[str, Tensor]:
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


def graph_stage(study: Study, config: CircuitTracingConfig, run: Run) -> Graph:
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
            write_page(graph, graph.save(path) / "index.html", title=f"{study.name}: {pair.clean} ...")
    return load_graph(stage.path)


def ablate_top(
    study: Study, scores_LTN: Tensor, config: CircuitTracingConfig, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Edit the top neurons on the test prompts; returns figures, and rows to show.

    `ablated` sets them to the reference, `swapped` to what they are in each prompt's counterfactual; `random` does both
    to as many other neurons of the same layers and positions.
    """
    model, top = study.model, top_nodes(scores_LTN, config.ablate)
    rest = torch.zeros_like(top)
    for layer, position, neuron in matched_random(nodes_of(top), model.architecture.n_neurons, seed):
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


def _by_size(points: dict[str, list[CurvePoint]], kind: str) -> dict[str, dict[str, float]]:
    return {name: {str(p.size): getattr(p, kind)().estimate for p in curve} for name, curve in points.items()}


def _intervals(points: dict[str, list[CurvePoint]], kind: str) -> dict[str, dict[str, list[float]]]:
    return {
        name: {str(p.size): list(getattr(p, kind)()[1:]) for p in curve} for name, curve in points.items()
    }


def _report(
    study: Study,
    points: dict[str, list[CurvePoint]],
    rows: list[dict[str, Any]],
    graph: Graph,
    metrics: dict[str, Any],
    config: CircuitTracingConfig,
    run: Run,
) -> None:
    size, kept = metrics["pairs"], metrics["mass_kept"]
    run.report.text(
        f"## {study.name}\n\n{size['train']} training and {size['test']} test pairs of {size['length']} tokens; the "
        f"model prefers the right answer on {metrics['accuracy']:.1%} of the test pairs. Relevance is conserved to "
        f"{metrics['conservation_error']:.1e} of the metric (where that is below a tenth of the absolute relevance: of "
        "the latter)."
    )
    run.report.figure(
        draw_curves(points), "Faithfulness (1 is ideal) and completeness (0 is ideal) with 95 % intervals."
    )
    rightly = metrics["graph_prompt"]["answered_rightly"]
    which = "" if rightly else " (the model answers none rightly: this one's answer is wrong)"
    run.report.text(
        f"The graph of one test prompt{which}, `{graph.header.prompt}`: {len(graph)} nodes and {graph.n_edges} direct "
        f"edges, keeping {kept['nodes']:.0%} of the neurons' absolute effect and {kept['edges']:.0%} of the edges'."
    )
    run.report.html(f'<p><a href="{graph_folder(study, config)}/index.html">Open the graph</a></p>')
    run.report.table(
        rows,
        f"The model's word with the top {config.ablate} neurons (layer, position, index) at their reference (ablated) "
        "or at what they are in the counterfactual prompt (swapped), and the same with as many random ones.",
    )


PIPELINE = Pipeline("circuit_tracing", CircuitTracingConfig, run)
