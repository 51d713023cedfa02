"""The circuit_tracing pipeline: pairs to scores, faithfulness, a graph with its page, and answers changed by ablation.

For each task: (1) training and test pairs about different things, fitted to the model's tokenizer; (2) node scores by
every estimator on training pairs; (3) faithfulness and completeness against the number of neurons on test pairs, and
the headline at one size that is fixed beforehand; (4) edges among the circuit's neurons, ranked on training pairs and
run by path patching on test pairs; (5) the graph of one test prompt and its page; (6) the circuit's neurons ablated,
beside as many random ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from circuits.areas import areas, proportion_sizes
from circuits.attribution import ESTIMATORS, top_nodes
from circuits.concepts_report import report_always_on, report_findings, report_supernodes, report_sweep
from circuits.edge_circuits import EDGE_ESTIMATORS
from circuits.faithfulness import CurvePoint
from circuits.graph import Graph
from circuits.merge import AlwaysOn
from circuits.pipeline_concepts import (
    NEUTRAL,
    always_on_stage,
    hypothesis_stage,
    steering_stage,
    steps_stage,
    supernode_stage,
)
from circuits.pipeline_report import report_task
from circuits.pipeline_stages import ablate_top, edge_stage, graph_stage, score_stage
from circuits.study import (
    Curves,
    Study,
    by_size,
    held_out_curve,
    intervals_by_size,
    make_study,
    size_on_training,
    under_every_reference,
)
from circuits.tasks import TASKS, Drawn, Style, Task, draw, find_task, task_names
from shared.models import Model, ModelConfig, load
from shared.runs import Pipeline, Run


@dataclass
class CircuitTracingConfig:
    """Settings of circuit_tracing.

    `tasks`: names (circuits.tasks.TASKS) or paths of JSON-lines files with the columns clean_prefix, patch_prefix,
    clean_answer, patch_answer, case (a pattern with * is several files read as one); no two of one name.
    `style`: prompts as plain text, or as a user's message in the chat template.
    `reference`: what ablated neurons are set to.
    `ablate`: size of the circuit, the top RelP neurons: faithfulness_N and completeness_N are its figures, its edges
    are those that `edge_sizes` count (none: no edges are run), and it is ablated in the last step.
    `target`: faithfulness whose smallest size (of `sizes`) is found on training pairs, and judged on test pairs.
    `proportions`: shares of all nodes (two or more) at which the areas CPR and CMD are taken, MIB's for example:
    [.001,.002,.005,.01,.02,.05,.1,.2,.5,1] (none: no areas).
    `edge_pairs`: how many of the training pairs rank edges, and of the test pairs judge them.
    `supernodes`: candidate numbers of clusters of the neurons of `contexts` prompts (none: no clusters).
    `hypotheses`: how many signed neurons are scored against the task's classes (0: none).
    `steer`: factors by which the circuit is multiplied, beside controls.
    `steps`: neurons a state in the capitals study (0: none), which is of its own data.
    `min_accuracy`: below it a task's figures are marked as those of a model that cannot do the task.
    """

    tasks: list[str] = field(default_factory=lambda: ["nounpp", "capitals"])
    style: Style = "plain"
    train_pairs: int = 96
    test_pairs: int = 64
    estimators: list[str] = field(default_factory=lambda: ["relp", "atp", "activation", "random"])
    sizes: list[int] = field(default_factory=lambda: [5, 10, 20, 50, 100, 200, 500, 1000])
    reference: Literal["mean", "zero"] = "mean"
    threshold: float = 0.005
    max_nodes: int = 300
    max_edges: int = 2000
    ablate: int = 200
    target: float = 0.9
    proportions: list[float] = field(default_factory=list)
    edge_sizes: list[int] = field(default_factory=list)
    edge_pairs: int = 32
    edge_estimators: list[str] = field(default_factory=lambda: ["relp", "magnitude", "random"])
    supernodes: list[int] = field(default_factory=list)
    contexts: int = 48
    hypotheses: int = 0
    steer: list[float] = field(default_factory=list)
    steps: int = 0
    examples: int = 6
    min_accuracy: float = 0.75

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"tasks must name at least one of {', '.join(TASKS)}, or a file of pairs")
        task_names(self.tasks)
        _check_sizes("sizes", self.sizes, "neurons")
        if self.proportions and (
            len(set(self.proportions)) < 2 or not all(0 < p <= 1 for p in self.proportions)
        ):
            raise ValueError(
                f"proportions are two or more shares of all nodes, above 0 and at most 1; got {self.proportions}"
            )
        if self.edge_sizes:
            _check_sizes("edge_sizes", self.edge_sizes, "edges")
        for name in ("train_pairs", "test_pairs", "max_nodes", "max_edges", "ablate", "edge_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.supernodes and min(self.supernodes) < 2:
            raise ValueError(f"supernodes are numbers of clusters, at least 2; got {self.supernodes}")
        _check_estimators("estimators", self.estimators, list(ESTIMATORS))
        _check_estimators("edge_estimators", self.edge_estimators, list(EDGE_ESTIMATORS))


def _check_sizes(name: str, sizes: list[int], what: str) -> None:
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ValueError(f"{name} must be one or more different numbers of {what}, each >= 1; got {sizes}")


def _check_estimators(name: str, given: list[str], known: list[str]) -> None:
    if set(given) - set(known) or "relp" not in given:
        raise ValueError(f"{name} must include relp and be among {', '.join(known)}; got {given}")


def run(config: CircuitTracingConfig, model_config: ModelConfig, run: Run) -> dict[str, Any]:
    """Run the pipeline and return its metrics."""
    tasks = [find_task(task) for task in config.tasks]
    model = run.use_model(load(model_config))
    drawn = [_drawn(model, task, config, run.seed) for task in tasks]
    run.report.text(
        "# Circuit tracing\n\nNode scores are fixed on training pairs, every figure is on held-out test pairs: no "
        "noun, city or number of one is in the other. Intervals resample what the pairs are about."
    )
    metrics: dict[str, Any] = {"conservation_error": 0.0}
    always_on = always_on_stage(model, config, run)
    pairs = list(zip(tasks, drawn, strict=True))
    for task, examples in run.progress(pairs, "tasks"):
        result = run_task(model, task.name, examples, config, run, always_on)
        metrics["conservation_error"] = max(metrics["conservation_error"], result.pop("conservation_error"))
        for key, value in result.items():
            metrics.setdefault(key, {})[task.name] = value
    report_always_on(
        always_on, {name: one["share"] for name, one in metrics["always_on"].items()}, len(NEUTRAL), run
    )
    if config.steps:
        metrics["steps"] = steps_stage(model, config, run)
    return metrics


def _drawn(model: Model, task: Task, config: CircuitTracingConfig, seed: int) -> Drawn:
    return draw(model, task, {"train": config.train_pairs, "test": config.test_pairs}, seed, config.style)


def run_task(
    model: Model,
    name: str,
    drawn: Drawn,
    config: CircuitTracingConfig,
    run: Run,
    always_on: Sequence[AlwaysOn] = (),
) -> dict[str, Any]:
    """Score, judge, trace and ablate one task; returns its metrics and adds its part of the report."""
    study = make_study(model, name, drawn.parts["train"], drawn.parts["test"], config.reference)
    scores = score_stage(study, config, run)
    sizes = sorted({*config.sizes, config.ablate})
    points = {estimator: held_out_curve(study, scores[estimator], sizes) for estimator in config.estimators}
    edge_points = edge_stage(study, scores["relp"], config, run) if config.edge_sizes else {}
    graph = graph_stage(study, config, run)
    ablation, rows = ablate_top(study, scores["relp"], config, run.seed)
    metrics = {
        "conservation_error": max(float(scores["conservation_error"]), graph.header.conservation_error),
        "pairs": _counts(study, drawn),
        **_node_figures(points, points["relp"][sizes.index(config.ablate)], config),
        "smallest": _smallest(points["relp"], size_on_training(study, scores["relp"], sizes, config.target)),
        "by_reference": _reference_figures(study, top_nodes(scores["relp"], config.ablate), run.seed),
        **(_area_figures(study, scores, config) if config.proportions else {}),
        **(_edge_figures(edge_points) if edge_points else {}),
        **_graph_figures(graph),
        "ablation": ablation,
        "always_on": _always_on(always_on, top_nodes(scores["relp"], config.ablate)),
    }
    report_task(study, points, edge_points, rows, graph, metrics, config, run)
    return metrics | _concepts(study, scores["relp"], config, run)


def _concepts(study: Study, scores_LTN: Tensor, config: CircuitTracingConfig, run: Run) -> dict[str, Any]:
    """Cluster, score and steer, as far as asked for; returns figures and adds to the report."""
    content = supernode_stage(study, config, run) if config.supernodes else None
    findings = hypothesis_stage(study, config, run) if config.hypotheses else []
    sweep = steering_stage(study, scores_LTN, config, run) if config.steer else []
    figures: dict[str, Any] = {}
    if content is not None:
        report_supernodes(content, run)
        figures["supernodes"] = {"number": content.number, "coverage": content.coverage} | {
            "stability": content.stability
        }
    if config.hypotheses:
        report_findings(findings, run)
        holding = sum(finding.holds for finding in findings)
        figures["hypotheses"] = {"selected": len(findings), "hold": holding}
    if config.steer:
        report_sweep(study.name, sweep, run)
        figures["steering"] = sweep
    return figures


def _node_figures(points: Curves, headline: CurvePoint, config: CircuitTracingConfig) -> dict[str, Any]:
    kinds = ("faithfulness", "completeness")
    return {
        "accuracy": float((headline.full_B > 0).double().mean()),
        **_headline(f"faithfulness_{config.ablate}", headline.faithfulness()),
        **_headline(f"completeness_{config.ablate}", headline.completeness()),
        **{kind: by_size(points, kind) for kind in kinds},
        "intervals": {kind: intervals_by_size(points, kind) for kind in kinds},
    }


def _always_on(found: Sequence[AlwaysOn], circuit_LTN: Tensor) -> dict[str, Any]:
    """The model's always-on neurons, and the share of the circuit's nodes that are theirs."""
    theirs = sum(int(circuit_LTN[one.layer, :, one.neuron].sum()) for one in found)
    return {"neurons": [list(one[:2]) for one in found], "share": theirs / max(1, int(circuit_LTN.sum()))}


def _smallest(points: list[CurvePoint], size: int | None) -> dict[str, Any]:
    """The size chosen on training pairs with its figures on the test pairs; no size where none was large enough."""
    chosen = [point for point in points if point.size == size]
    figures = {"neurons": size}
    for point in chosen:
        figures |= _headline("faithfulness", point.faithfulness()) | _headline(
            "completeness", point.completeness()
        )
    return figures


def _reference_figures(study: Study, keep_LTN: Tensor, seed: int) -> dict[str, Any]:
    points = under_every_reference(study, keep_LTN, seed)
    return {
        kind: {
            "faithfulness": list(point.faithfulness()),
            "completeness": list(point.completeness()),
            "gap": list(point.gap()),
        }
        for kind, point in points.items()
    }


def _area_figures(study: Study, scores: Mapping[str, Tensor], config: CircuitTracingConfig) -> dict[str, Any]:
    """Areas of curves of their own, over shares of all nodes, on the test pairs."""
    total = scores["relp"].numel()
    sizes = proportion_sizes(total, config.proportions)
    found = {name: areas(held_out_curve(study, scores[name], sizes), total) for name in config.estimators}
    return {
        "areas": {
            name: {kind: list(area) for kind, area in one._asdict().items()} for name, one in found.items()
        }
    }


def _edge_figures(points: Curves) -> dict[str, Any]:
    kinds = ("faithfulness", "completeness")
    return {
        **_headline("edge_faithfulness", points["relp"][-1].faithfulness()),
        "edge_curve": {kind: by_size(points, kind) for kind in kinds},
        "edge_intervals": {kind: intervals_by_size(points, kind) for kind in kinds},
    }


def _graph_figures(graph: Graph) -> dict[str, Any]:
    header = graph.header
    return {
        "graph_prompt": {"prompt": header.prompt, "answered_rightly": header.target_values[0] > 0},
        "edges": graph.n_edges,
        "nodes": len(graph),
        "edge_closure_error": graph.closure_error(),
        "mass_kept": {"nodes": header.node_mass_kept, "edges": header.edge_mass_kept},
    }


def _headline(name: str, interval: tuple[float, float, float]) -> dict[str, Any]:
    return {name: interval[0], f"{name}_ci": list(interval[1:])}


def _counts(study: Study, drawn: Drawn) -> dict[str, Any]:
    unfit = {
        part: {"unfit": tally.unfit, "other_length": tally.other_length}
        for part, tally in drawn.tally.items()
    }
    dropped = sum(count for counts in unfit.values() for count in counts.values())
    return {
        "train": len(study.train),
        "test": len(study.test),
        "test_clusters": len(set(study.test.clusters)),
        "length": study.length,
        "dropped": dropped,
        "dropped_by_part": unfit,
    }


PIPELINE = Pipeline("circuit_tracing", CircuitTracingConfig, run)
