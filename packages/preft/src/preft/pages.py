"""The report page of the adapter_serving pipeline: figures, tables, and what each user gets to read."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from preft.adapters import Adapter
from preft.mixed_batch import Outcome, match_rate
from preft.throughput import Speed
from shared.plots import PALETTE, subplots
from shared.report import Report

if TYPE_CHECKING:
    from preft.pipeline import AdapterServingConfig, UserData

LABELS = {"base": "base", "lora": "LoRA, all tokens", "lora_p": "LoRA-P", "reft_p": "ReFT-P"}


def write_pages(
    report: Report,
    config: "AdapterServingConfig",
    users: "Sequence[UserData]",
    adapters: Mapping[str, Adapter],
    losses: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Outcome],
    speeds: Mapping[str, Speed],
    tolerance: float,
) -> None:
    """Add the pipeline's results to a report; `tolerance` in logits is the near tie of the model's number type."""
    report.text(_summary(config, outcomes, tolerance))
    report.figure(_figure(losses, speeds), _caption(config, len(users)))
    report.table(_speed_rows(speeds), "Generated tokens a second, one engine, arms interleaved")
    report.table(losses, "Held-out loss, nats a response token")
    report.table(_adapter_rows(adapters), "Adapters")
    report.table(
        [_answer_row(outcome) for outcome in outcomes], "Served in one batch, beside what the user wanted"
    )
    report.table([{"user": user.name, **user.preferences} for user in users], "What each user prefers")


def _summary(config: "AdapterServingConfig", outcomes: Sequence[Outcome], tolerance: float) -> str:
    tokens = sum(len(outcome.reference) for outcome in outcomes)
    gap = min(outcome.smallest_gap for outcome in outcomes)
    ties = sum(outcome.near_tie(tolerance) for outcome in outcomes)
    rounding = (
        f" In half precision engine and reference round differently: {ties} further requests differ, first at a token "
        f"that the reference chose by at most {tolerance:g} logits, and count as near ties."
        if tolerance
        else ""
    )
    return (
        f"**{match_rate(outcomes):.0%}** of {len(outcomes)} requests ({tokens} tokens) of the mixed batch equal the "
        "masked Hugging Face reference, token for token. Base, all-token LoRA, LoRA-P and ReFT-P requests ran in one "
        f"batch of stock vLLM with this project's plugin. The closest call between two tokens was {gap:.2g} logits."
        f"{rounding}\n\n"
        "Prefill-only adapters act on the prompt; every token after the first generated one is computed by the bare "
        f"model. LoRA has rank {config.lora.rank}, {config.reft.method} rank {config.reft.rank}."
    )


def _caption(config: "AdapterServingConfig", n_users: int) -> str:
    trace = config.throughput
    return (
        f"Left: held-out loss, mean of {n_users} users (dots: users). Right: generated tokens a second; "
        f"{trace.requests} concurrent requests over {trace.adapters} adapters, {trace.prompt_tokens} prompt and "
        f"{trace.new_tokens} generated tokens, median and range of {trace.repeats} rounds. One engine with LoRA "
        "enabled; all arms use this project's operators, the all-token LoRA too (stock vLLM's are slower on a CPU)."
    )


def _figure(losses: Sequence[Mapping[str, Any]], speeds: Mapping[str, Speed]) -> Any:
    figure, (left, right) = subplots(1, 2)
    kinds = list(speeds)
    colors = PALETTE[: len(kinds)]
    left.bar(range(len(kinds)), [mean(row[kind] for row in losses) for kind in kinds], color=colors)
    for row in losses:
        left.plot(
            range(len(kinds)), [row[kind] for kind in kinds], "o", color="black", markersize=3, alpha=0.6
        )
    left.set_ylabel("held-out loss (nats a token)")
    medians = [speeds[kind].median for kind in kinds]
    below = [speeds[kind].median - speeds[kind].low for kind in kinds]
    above = [speeds[kind].high - speeds[kind].median for kind in kinds]
    right.bar(range(len(kinds)), medians, yerr=[below, above], color=colors, capsize=3)
    right.set_ylabel("generated tokens / s")
    for axis in (left, right):
        axis.set_xticks(range(len(kinds)), [LABELS[kind] for kind in kinds], rotation=20, ha="right")
    return figure


def _speed_rows(speeds: Mapping[str, Speed]) -> list[dict[str, Any]]:
    base = speeds["base"].median
    return [
        {
            "kind": LABELS[kind],
            "median": speed.median,
            "lowest": speed.low,
            "highest": speed.high,
            "over base": speed.median / base,
        }
        for kind, speed in speeds.items()
    ]


def _adapter_rows(adapters: Mapping[str, Adapter]) -> list[dict[str, Any]]:
    return [
        {
            "adapter": name,
            "method": adapter.config.method,
            "rank": adapter.config.rank,
            "phase": adapter.config.phase.value,
            "modules": len(adapter.paths),
            "values": adapter.n_parameters(),
        }
        for name, adapter in adapters.items()
    ]


def _answer_row(outcome: Outcome) -> dict[str, Any]:
    return {
        "user": outcome.request.user,
        "kind": LABELS[outcome.request.kind],
        "question": outcome.request.chat[-1]["content"],
        "answer": outcome.text,
        "wanted": outcome.request.wanted,
        "equals reference": outcome.matches,
    }
