"""Is the graph's page smooth at 2,000 nodes and 20,000 edges? Frame times in headless Chromium while it is used.

    python benchmarks/circuits_page.py            # needs chromium; ten seconds

A synthetic graph (seeded: layers, tokens, effects and edges drawn at random) is opened in software rendering.
Measured are the times between frames that the browser presents while the view is dragged and zoomed, one step a frame,
with the default 250 edges, with all 20,000, and with a node picked, beside those of an empty page; the processor time
that the browser's processes took for a frame, which other load on the machine hardly changes; and the time from a
change of a slider to its frame. The last line of the output is one JSON object.
"""

import contextlib
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from _results import write_results
from browser import Browser, Page, find_chromium

from circuits.graph import EMBEDDING, LOGIT, NEURON, Graph, Header
from circuits.view import write_page
from shared.errors import UserError

CLAIM = (
    "The graph's page at 2,000 nodes and 20,000 edges in headless Chromium without a GPU: milliseconds between frames "
    "and of processor time a frame while the view moves, beside an empty page that draws one square."
)
NODES, EDGES, LAYERS, TOKENS, FRAMES = 2000, 20_000, 32, 24, 60

MOVE = """new Promise((done) => {
  const times = [];
  let last = null, i = 0;
  const turn = (now) => {
    if (last !== null) times.push(now - last);
    last = now;
    if (i++ >= %d) return done(times);
    %s;
    requestAnimationFrame(turn);
  };
  requestAnimationFrame(turn);
})"""
STEP = "view = { ...view, x: view.x + 8 * Math.sin(i / 9) }; zoom(1 + 0.03 * Math.sin(i / 12))"
EMPTY = "<!doctype html><title>empty</title><canvas></canvas>"
SLIDE = """new Promise((done) => {
  const start = performance.now();
  const field = document.getElementById("count");
  field.value = %d;
  field.dispatchEvent(new Event("input"));
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)));
})"""


def synthetic(seed: int = 0) -> Graph:
    """A graph of NODES neurons and EDGES edges, upwards and forwards, with heavy-tailed effects."""
    draw = torch.Generator().manual_seed(seed)

    def integers(high: int, n: int) -> torch.Tensor:
        return torch.randint(high, (n,), generator=draw)

    n = TOKENS + NODES + 1
    kind_n = torch.full((n,), NEURON)
    kind_n[:TOKENS], kind_n[-1] = EMBEDDING, LOGIT
    layer_n, order = integers(LAYERS, n).sort()
    layer_n[:TOKENS], layer_n[-1] = -1, LAYERS
    position_n = (TOKENS * torch.rand(n, generator=draw).sqrt()).long()
    position_n[:TOKENS], position_n[-1] = torch.arange(TOKENS), TOKENS - 1
    activation_n = torch.randn(n, generator=draw)
    total_nK = (torch.randn(n, 1, generator=draw) ** 3) / 10
    ends = torch.stack([integers(n, 40 * EDGES), integers(n, 40 * EDGES)])
    ends = ends[:, (layer_n[ends[0]] < layer_n[ends[1]]) & (position_n[ends[0]] <= position_n[ends[1]])]
    source_e, target_e = ends.unique(dim=1)[:, :: max(1, ends.shape[1] // EDGES // 2)][:, :EDGES]
    header = Header(
        prompt="synthetic",
        tokens=[f"word{i}" for i in range(TOKENS)],
        token_ids=list(range(TOKENS)),
        targets=["target"],
        target_ids=[0],
        target_values=[1.0],
        target_probabilities=[0.5],
        metric="demeaned logit",
        model="synthetic",
        fingerprint="0" * 16,
        n_layers=LAYERS,
        n_neurons=1000,
        rules={},
    )
    return Graph(
        header=header,
        kind_n=kind_n,
        layer_n=layer_n,
        position_n=position_n,
        index_n=torch.where(kind_n == LOGIT, 0, order % 1000),
        activation_n=activation_n,
        total_nK=total_nK,
        token_nT=torch.randn(n, TOKENS, generator=draw),
        own_n=torch.zeros(n),
        remainder_n=torch.zeros(n),
        source_e=source_e,
        target_e=target_e,
        weight_e=torch.randn(source_e.shape[0], generator=draw) ** 3,
    )


def processor_seconds(group: int) -> float:
    """Processor time that the live processes of a process group have taken."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def frames(page: Page, name: str, script: str, group: int) -> dict[str, float]:
    """Median and 95th percentile of the times between frames, and processor time a frame, in milliseconds."""
    before = processor_seconds(group)
    times = sorted(page.evaluate(script))
    spent = 1000 * (processor_seconds(group) - before) / FRAMES
    return {
        f"{name}_frame_ms": round(statistics.median(times), 1),
        f"{name}_frame_p95_ms": round(times[int(0.95 * len(times))], 1),
        f"{name}_processor_ms": round(spent, 1),
    }


def measure(page: Page, group: int) -> dict[str, float]:
    """The figures of each state of the page, and of the slider."""

    def state(name: str) -> dict[str, float]:
        page.wait_for("drawn.next === drawn.strokes.length")
        figures = frames(page, name, MOVE % (FRAMES, STEP), group)
        page.evaluate("fit()")
        return figures

    figures = state("default")
    page.set_value("#edges", EDGES)
    figures |= state("all_edges")
    page.set_value("#edges", 250)
    page.evaluate("pick(ranked[0])")
    figures |= state("picked")
    page.evaluate("pick(null)")
    slides = [page.evaluate(SLIDE % count) for count in range(NODES, NODES // 2, -100)]
    figures["slider_ms"] = round(statistics.median(slides), 1)
    return figures


def main() -> None:
    """Print one line a figure and all as JSON."""
    executable = find_chromium()
    if executable is None:
        raise UserError("no Chromium is installed")
    graph = synthetic()
    with tempfile.TemporaryDirectory() as folder, Browser(executable) as browser:
        path = write_page(graph, Path(folder) / "page.html")
        figures = {"nodes": NODES, "edges": graph.n_edges, "page_kib": path.stat().st_size // 1024}
        empty = Path(folder) / "empty.html"
        empty.write_text(EMPTY)
        with browser.open(empty, width=1440, height=900) as page:
            nothing = (
                "document.title = i; document.querySelector('canvas').getContext('2d').fillRect(i, i, 9, 9)"
            )
            figures |= frames(page, "empty", MOVE % (FRAMES, nothing), browser.group)
        with browser.open(path, width=1440, height=900) as page:
            figures |= measure(page, browser.group)
            if page.errors:
                sys.exit(f"error: the page reports {page.errors}")
    names = ("frame_ms", "frame_p95_ms", "processor_ms")
    states = ("empty", "default", "all_edges", "picked")
    rows = [{"page": state} | {name: figures[f"{state}_{name}"] for name in names} for state in states]
    # Frame times mean little on a loaded machine: the load is part of the record, beside processor time.
    settings = {key: figures[key] for key in ("nodes", "edges", "page_kib", "slider_ms")}
    settings |= {"frames": FRAMES, "load_average": round(os.getloadavg()[0], 1), "window": "1440 x 900"}
    print(write_results("circuits_page", CLAIM, rows, settings, figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
