"""`circuits trace`: one prompt's graph with its page, what scaling its neurons does, and a table of the strongest."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from shared.commands import output_folder
from shared.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from circuits.graph import Graph

TABLE = 12  # neurons in the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add_model(parser)
    add("--prompt", required=True, help="the text whose next token is explained")
    add("--answer", help="a token, with its leading space: explains its logit less that of --wrong")
    add("--wrong", help="the token that the answer is compared with")
    add(
        "--top-k",
        type=int,
        default=5,
        help="without an answer: how many likely tokens (default: %(default)s)",
    )
    add("--threshold", type=float, default=0.005, help="least share of a target (default: %(default)s)")
    add("--max-nodes", type=int, default=300, help="most neurons (default: %(default)s)")
    add("--max-edges", type=int, default=3000, help="most edges (default: %(default)s)")
    add("--supernodes", type=Path, metavar="FILE", help="supernodes.json of another graph of this model")
    add("--out", type=output_folder, required=True, metavar="FOLDER", help="where the graph and its page go")


def add_model(parser: argparse.ArgumentParser, default: str | None = "tinyworld", name: bool = True) -> None:
    """The options that say which model (without its name where that is no option), shared by the commands."""
    add = parser.add_argument
    if name:
        add("--model", default=default, help="tinyworld, random:FAMILY, a folder, or a Hugging Face id")
    add("--dtype", default="float32", help="float32, bfloat16, float64 (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda:0 ... (default: %(default)s)")


def main(arguments: Namespace) -> int:
    """Trace, write the folder, print the table."""
    from rich.console import Console

    check(arguments)
    from circuits.folder import with_effects
    from circuits.supernodes import read_supernodes
    from circuits.tracing import trace
    from shared.models import ModelConfig, load

    supernodes = read_supernodes(arguments.supernodes) if arguments.supernodes else None
    console = Console()
    with console.status(f"loading {arguments.model}") as status:
        model = load(ModelConfig(arguments.model, dtype=arguments.dtype, device=arguments.device))
        status.update("tracing")
        graph = trace(
            model,
            arguments.prompt,
            arguments.answer,
            arguments.wrong,
            top_k=arguments.top_k,
            threshold=arguments.threshold,
            max_nodes=arguments.max_nodes,
            max_edges=arguments.max_edges,
        )
        status.update("ablating, flipping and doubling the strongest neurons")
        content = with_effects(model, graph, supernodes)
    folder = content.save(arguments.out)
    show(graph, console)
    console.print(f"page: {folder / 'index.html'}", highlight=False, soft_wrap=True)
    return 0


def check(arguments: Namespace) -> None:
    """Refuse options that do not fit before anything is loaded."""
    if not arguments.prompt.strip():
        raise UserError("--prompt is empty")
    if (arguments.answer is None) != (arguments.wrong is None):
        raise UserError("give both --answer and --wrong, or neither (the likeliest tokens)")
    for name in ("top_k", "max_nodes", "max_edges"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if arguments.threshold < 0:
        raise UserError(f"--threshold must not be negative, got {arguments.threshold}")
    if arguments.supernodes and not arguments.supernodes.is_file():
        raise UserError(f"--supernodes {arguments.supernodes}: no such file")
    out: Path = arguments.out
    if out.is_dir() and any(out.iterdir()) and not (out / "graph.json").exists():
        raise UserError(f"--out {out} holds something other than a graph; give a new folder")


def show(graph: "Graph", console: "Console") -> None:
    """Print the targets, what is kept, and the strongest neurons with their descriptions."""
    from rich.table import Table

    header = graph.header
    pairs = zip(header.targets, header.target_values, header.target_probabilities, strict=True)
    targets = ", ".join(f"{name.strip()} {value:.2f} (p {chance:.3f})" for name, value, chance in pairs)
    lines = (
        f"{header.metric}: {targets}",
        f"{len(graph.neurons())} neurons keep {header.node_mass_kept:.0%} of the absolute effect, {graph.n_edges} "
        f"edges {header.edge_mass_kept:.0%}; relevance conserved to {header.conservation_error:.0e}, in-flow to "
        f"{graph.closure_error():.0e}",
    )
    for text in lines:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    names = (
        "neuron",
        "token",
        "activation",
        f"effect on {header.targets[0].strip()}",
        "share",
        "what it writes",
    )
    table = Table(*names, box=None, header_style="bold")
    scale = sum(map(abs, header.target_values)) or 1.0
    for node in graph.strongest_numbers(TABLE):
        token = header.tokens[int(graph.position_n[node])]
        table.add_row(
            graph.label(node),
            token.strip() or repr(token),
            f"{float(graph.activation_n[node]):.3g}",
            f"{float(graph.total_nK[node, 0]):+.3g}",
            f"{float(graph.total_nK[node].abs().sum()) / scale:.1%}",
            header.notes.get(str(node), ""),
        )
    console.print(table, markup=False, highlight=False)
