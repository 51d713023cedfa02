"""The serving benchmark's result: table, plot and the JSON object of its ratios."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _preft_plan import Ratio, estimate, reached
from _results import write_results

CLAIM = (
    "Prefill-only adapters in stock vLLM decode like the bare model. Ratios are medians of round-by-round ratios with "
    "95% bootstrap intervals; all arms of a scene replay the same prompts in turn."
)
MIN_ROUNDS = 3  # fewer give no interval worth the name
Records = Sequence[Mapping[str, Any]]


def summary(ratios: Sequence[Ratio], records: Records) -> dict[str, Any]:
    """Every measured ratio by its key, with its interval under KEY_ci (None below three rounds)."""
    found: dict[str, Any] = {}
    for ratio in ratios:
        if measured := estimate(ratio, records):
            interval, rounds = measured
            found[ratio.key] = round(interval.estimate, 4)
            enough = rounds >= MIN_ROUNDS
            found[f"{ratio.key}_ci"] = [round(interval.low, 4), round(interval.high, 4)] if enough else None
    return found


def rows(ratios: Sequence[Ratio], records: Records) -> list[dict[str, Any]]:
    """The table: the ratios first, then every arm's own speed."""
    return ratio_rows(ratios, records) + speed_rows(records)


def ratio_rows(ratios: Sequence[Ratio], records: Records) -> list[dict[str, Any]]:
    """One row a measured ratio."""
    table = []
    for ratio in ratios:
        if measured := estimate(ratio, records):
            interval, rounds = measured
            verdict = reached(ratio, interval.estimate)
            sign = "at least" if ratio.value == "tokens_per_s" else "at most"
            table.append(
                {
                    "figure": ratio.key,
                    "median": interval.estimate,
                    "interval": f"{interval.low:.4g} to {interval.high:.4g}"
                    if rounds >= MIN_ROUNDS
                    else f"{rounds} rounds",
                    "note": ""
                    if ratio.target is None
                    else f"{sign} {ratio.target}: {'reached' if verdict else 'not reached'}",
                    "rounds": rounds,
                }
            )
    return table


def speed_rows(records: Records) -> list[dict[str, Any]]:
    """One row a scene and arm: medians of its rounds."""
    from statistics import median

    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["scene"], record["arm"]), []).append(record)
    table = []
    for (scene, arm), group in groups.items():
        value = {
            key: median(r[key] for r in group)
            for key in ("ttft_ms", "ttft_p99_ms", "itl_ms", "decode_step_ms")
        }
        speeds = [r["tokens_per_s"] for r in group]
        table.append(
            {
                "figure": f"{scene}, {arm}: generated tokens/s",
                "median": median(speeds),
                "interval": f"{min(speeds):.4g} to {max(speeds):.4g} (range)",
                "note": f"TTFT {value['ttft_ms']:.0f} ms (p99 {value['ttft_p99_ms']:.0f}), ITL {value['itl_ms']:.1f} "
                f"ms, decode step {value['decode_step_ms']:.1f} ms",
                "rounds": len(group),
            }
        )
    return table


def write(name: str, records: Records, ratios: Sequence[Ratio], settings: Mapping[str, Any]) -> Path:
    """Write JSON, page and plot of what was measured so far under a name; returns the page."""
    known = {key: value for key, value in settings.items() if value not in (None, [], False)}
    page = write_results(name, CLAIM, rows(ratios, records), known, list(records))
    plot(ratios, records, page.with_suffix(".png"))
    return page


def plot(ratios: Sequence[Ratio], records: Records, path: Path) -> None:
    """Left: the ratios against what is asked; right: the curves over context length, where measured."""
    from shared.plots import PALETTE, subplots

    table = [(ratio, measured[0]) for ratio in ratios if (measured := estimate(ratio, records))]
    bars = [(ratio, interval) for ratio, interval in table if "@" not in ratio.key]
    curves: dict[str, list[tuple[int, Any]]] = {}
    for ratio, interval in table:
        if "@" in ratio.key:
            name, _, context = ratio.key.partition("@")
            curves.setdefault(name, []).append((int(context), interval))
    figure, axes = subplots(1, 1 + bool(curves and bars), width=6.4, height=3.8, squeeze=False)
    panels = list(axes[0])
    if bars:
        axis = panels.pop(0)
        for y, (ratio, interval) in enumerate(reversed(bars)):
            axis.plot([interval.low, interval.high], [y, y], color=PALETTE[0])
            axis.plot(interval.estimate, y, "o", color=PALETTE[0], markersize=5)
            if ratio.target is not None:
                axis.plot(ratio.target, y, "|", color=PALETTE[1], markersize=14)
        axis.set_yticks(range(len(bars)), [ratio.key for ratio, _ in reversed(bars)])
        axis.set_xscale("log")
        axis.set_xticks([0.7, 1, 1.5, 2, 3], minor=False)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.set_xlabel("ratio of speeds (orange: what is asked)")
    if curves:
        for name, points in curves.items():
            contexts = [context for context, _ in points]
            panels[0].plot(contexts, [i.estimate for _, i in points], "o-", label=name, markersize=4)
            panels[0].fill_between(
                contexts, [i.low for _, i in points], [i.high for _, i in points], alpha=0.15
            )
        panels[0].set_xscale("log", base=2)
        panels[0].set_xlabel("prompt tokens")
        panels[0].set_ylabel("ratio of speeds")
        panels[0].legend()
    figure.savefig(path, dpi=150)
