"""The report of circuit_tracing: one section a task."""

from typing import TYPE_CHECKING, Any

from circuits.chart import draw_curves
from circuits.faithfulness import CurvePoint
from circuits.graph import Graph
from circuits.pipeline_stages import graph_folder
from circuits.study import Study
from shared.runs import Run

if TYPE_CHECKING:
    from circuits.pipeline import CircuitTracingConfig


def report_task(
    study: Study,
    points: dict[str, list[CurvePoint]],
    edge_points: dict[str, list[CurvePoint]],
    rows: list[dict[str, Any]],
    graph: Graph,
    metrics: dict[str, Any],
    config: "CircuitTracingConfig",
    run: Run,
) -> None:
    """Add one task's section: data and headline, curves, edges, the graph, and the ablated answers."""
    run.report.text(f"## {study.name}\n\n{_summary(metrics, config)}")
    run.report.figure(
        draw_curves(points), "Faithfulness (1 is ideal) and completeness (0 is ideal) with 95 % intervals."
    )
    if "areas" in metrics:
        run.report.table(
            [
                {"scores": name}
                | {kind: "{:.3f} [{:.3f}, {:.3f}]".format(*area) for kind, area in one.items()}
                for name, one in metrics["areas"].items()
            ],
            "Areas of faithfulness (CPR: higher is better) and of its distance from 1 (CMD: lower is better) over "
            f"the shares {config.proportions} of all nodes, on the linear axis, and on "
            "the logarithmic one divided by its length.",
        )
    if edge_points:
        run.report.figure(
            draw_curves(edge_points),
            f"The same against the number of edges among the {config.ablate} neurons, run by path patching.",
        )
    _graph(study, graph, metrics, config, run)
    run.report.table(
        rows,
        f"The model's word with the top {config.ablate} neurons (layer, position, index) at their reference (ablated) "
        "or at what they are in the counterfactual prompt (swapped), and the same with as many random ones.",
    )


def _summary(metrics: dict[str, Any], config: "CircuitTracingConfig") -> str:
    size, accuracy = metrics["pairs"], metrics["accuracy"]
    faithful, complete = (metrics[f"{kind}_{config.ablate}"] for kind in ("faithfulness", "completeness"))
    low, high = metrics[f"faithfulness_{config.ablate}_ci"]
    unable = "" if accuracy >= config.min_accuracy else (
        f" **The model does this task badly ({accuracy:.0%} right): its circuit explains no ability.**"
    )  # fmt: skip
    return (
        f"{size['train']} training and {size['test']} test pairs of {size['length']} tokens; the model prefers the "
        f"right answer on {accuracy:.1%} of the test pairs.{unable} The {config.ablate} neurons of largest mean RelP "
        f"score on the training pairs are {faithful:.2f} faithful [{low:.2f}, {high:.2f}] and {complete:.2f} complete "
        "(0 is ideal) on the test pairs. "
        f"{_smallest(metrics['smallest'], config.target)} Relevance is conserved to "
        f"{metrics['conservation_error']:.1e} of the metric (where that is below a tenth of the absolute relevance: "
        "of the latter)."
    )


def _smallest(figures: dict[str, Any], target: float) -> str:
    if figures["neurons"] is None:
        return f"None of the sizes is {target} faithful on the training pairs."
    low, high = figures["faithfulness_ci"]
    return (
        f"The smallest size that is {target} faithful on the training pairs, {figures['neurons']}, is "
        f"{figures['faithfulness']:.2f} [{low:.2f}, {high:.2f}] on the test pairs."
    )


def _graph(
    study: Study, graph: Graph, metrics: dict[str, Any], config: "CircuitTracingConfig", run: Run
) -> None:
    kept, rightly = metrics["mass_kept"], metrics["graph_prompt"]["answered_rightly"]
    which = "" if rightly else " (the model answers none rightly: this one's answer is wrong)"
    run.report.text(
        f"The graph of one test prompt{which}, `{graph.header.prompt}`: {len(graph)} nodes and {graph.n_edges} direct "
        f"edges, keeping {kept['nodes']:.0%} of the neurons' absolute effect and {kept['edges']:.0%} of the edges'."
    )
    run.report.html(f'<p><a href="{graph_folder(study, config)}/index.html">Open the graph</a></p>')
