"""The report of the adapter_quality pipeline: what was asked, how it was tuned, figures and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from preft.quality.arms import LABELS
from preft.quality.charts import distance_chart, rank_chart, tradeoff_chart
from preft.quality.findings import answer_means, difference, interval, reached, reference_cell
from preft.quality.people import Person
from preft.quality.settings import MEASURED, AdapterQualityConfig
from preft.quality.study import Cell, Result
from preft.quality.tradeoff import Speed
from shared.runs import Run


def write_pages(
    run: Run,
    config: AdapterQualityConfig,
    cells: Sequence[Cell],
    baselines: Mapping[str, Sequence[Result]],
    speeds: Sequence[Speed],
    persons: Sequence[Person],
) -> None:
    """Add the study's results to the run's report, its figures to the run's folder too."""
    report = run.report

    def figure(name: str, drawn: Any, caption: str) -> None:
        report.figure(drawn, caption)
        drawn.savefig(run.path(f"{name}.png"), dpi=150)

    report.text(f"# Quality of prefill-only adapters\n\n{_method(config)}\n\n{findings_text(cells)}")
    bands = "Held-out loss over size; bands are 95% intervals over users."
    figure("rank", rank_chart(cells, baselines), bands)
    report.table(loss_rows(config, cells, baselines), "Held-out loss, nats a response token")
    shown = [rank for rank in (*config.answer_ranks, *config.ranks) if rank in config.ranks][:2]
    figure(
        "distance",
        distance_chart(cells, list(dict.fromkeys(shown)), baselines["base"]),
        "Loss by distance from the prompt. Distance 0 is predicted by the prompt's last token. Greeting, content and "
        "sign-off stand at different distances, so the gap to the all-token twin (right) says more than the loss.",
    )
    if speeds:
        figure("tradeoff", tradeoff_chart(cells, speeds, baselines["base"]), _speed_caption(config))
        report.table([one._asdict() | {"arm": LABELS[one.arm]} for one in speeds], "Speed")
    if answers := answer_rows(cells, baselines):
        report.table(answers, "Greedy answers to held-out questions: share that keeps each preference")
    report.table(
        tuning_rows(config, cells), "Learning rates: validation loss of those tried, best in the last column"
    )
    report.table(
        [{"user": one.name} | (one.preferences._asdict() if one.preferences else {}) for one in persons],
        "Users",
    )


def _method(config: AdapterQualityConfig) -> str:
    rates = ", ".join(f"{rate:g}" for rate in config.rates)
    return (
        f"{config.users} users, {config.seeds} seeds each; {config.train.steps} steps of {config.train.batch_size} of "
        f"{config.train_chats} chats; losses on {config.heldout_chats} held-out chats a user. Every arm and size has "
        f"its own learning rate by one rule: a walk on the grid {rates} that ends where both neighbours are worse, by "
        f"the loss on {config.validation_chats} validation chats of {config.tuning_users} other user(s)."
    )


def findings_text(cells: Sequence[Cell]) -> str:
    """One sentence an arm: at which size it reaches all-token LoRA."""
    reference = reference_cell(cells)
    lines = [f"All-token LoRA of rank {reference.size}: {interval(reference.results).estimate:.4f} nats."]
    for arm in dict.fromkeys(cell.arm for cell in cells if cell.arm != "lora"):
        found = reached(cells, arm)
        best = min(
            (cell for cell in cells if cell.arm == arm), key=lambda cell: interval(cell.results).estimate
        )
        gap = difference(best.results, reference.results)
        lines.append(
            f"- {LABELS[arm]}: its mean reaches that {_at(found.mean)}, its interval {_at(found.interval)}; best at "
            f"{best.size}, {gap.estimate:+.4f} nats ({gap.low:+.4f} to {gap.high:+.4f})."
        )
    return "\n".join(lines)


def _at(size: int | None) -> str:
    return "at no size tried" if size is None else f"at {size}"


def loss_rows(
    config: AdapterQualityConfig, cells: Sequence[Cell], baselines: Mapping[str, Sequence[Result]]
) -> list[dict[str, Any]]:
    """One row an arm and size: trained values, loss, interval, difference to the reference, learning rate."""
    reference = reference_cell(cells).results
    rows = []
    for name, results in baselines.items():
        found = interval(results)
        rows.append({"arm": name, "size": "", "values": 0, "loss": found.estimate, "interval": _span(found)})
    for cell in cells:
        found, gap = interval(cell.results), difference(cell.results, reference)
        rows.append(
            {
                "arm": LABELS[cell.arm],
                "size": cell.size,
                "values": cell.results[0].parameters,
                "loss": found.estimate,
                "interval": _span(found),
                "less reference": gap.estimate,
                "interval of that": _span(gap),
                "learning rate": f"{cell.tuned.rate:g}{' (end of the grid)' * cell.tuned.at_end(config.rates)}"
                if cell.tuned
                else "",
            }
        )
    return rows


def _span(found: Any) -> str:
    return f"{found.low:.4f} to {found.high:.4f}"


def answer_rows(cells: Sequence[Cell], baselines: Mapping[str, Sequence[Result]]) -> list[dict[str, Any]]:
    """One row an arm and size whose answers were judged."""
    rows: list[dict[str, Any]] = [
        {"arm": name, "size": ""} | (answer_means(results) or {}) for name, results in baselines.items()
    ]
    rows += [
        {"arm": LABELS[cell.arm], "size": cell.size} | means
        for cell in cells
        if (means := answer_means(cell.results))
    ]
    return [row for row in rows if "all" in row]


def tuning_rows(config: AdapterQualityConfig, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row an arm and size: validation loss at each rate."""
    return [
        {"arm": LABELS[cell.arm], "size": cell.size}
        | {f"{rate:g}": cell.tuned.losses.get(rate, "") for rate in config.rates}
        | {"best": f"{cell.tuned.rate:g}"}
        for cell in cells
        if cell.tuned
    ]


def _speed_caption(config: AdapterQualityConfig) -> str:
    if config.throughput != MEASURED:
        return f"Loss against speed; speed from {config.throughput}."
    trace = config.trace
    return (
        f"Loss against speed, this model in vLLM: {trace.requests} concurrent requests over {trace.adapters} adapters, "
        f"{trace.prompt_tokens} prompt and {trace.new_tokens} generated tokens, one engine a rank, medians of "
        f"{trace.repeats} rounds interleaved with the bare model; all arms on this project's operators."
    )
