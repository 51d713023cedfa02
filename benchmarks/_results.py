"""Write a benchmark's result where every other one lies: benchmarks/results/NAME_HARDWARE_DATE.{json,md}.

The JSON holds everything (hardware, versions, command, settings, every measurement), the page beside it the table.
"""

import datetime
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from shared.manifest import describe
from shared.serialize import write_json

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """Name of the processor, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def hardware_tag(hardware: Mapping[str, Any]) -> str:
    """Hardware as a word of a file name: `h200` or `2cpu`."""
    gpus = hardware["gpus"]
    if not gpus:
        return f"{hardware['cpus']}cpu"
    return f"{len(gpus)}x" * (len(gpus) > 1) + re.sub(
        r"[^a-z0-9]+", "-", gpus[0].lower().removeprefix("nvidia ")
    ).strip("-")


@cache
def made_here() -> dict[str, Any]:
    """Hardware, versions and commit, looked up once: a benchmark may write after every round."""
    made_with = describe()
    made_with["hardware"]["processor"] = processor()
    return made_with


def write_results(
    name: str, claim: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], raw: Any = None
) -> Path:
    """Write the JSON file and the page of a benchmark; returns the page's path.

    `rows` is the table (equal keys), `settings` what was measured on, `raw` the single measurements.
    """
    made_with = made_here()
    made_with["command"] = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    date = datetime.date.today().isoformat()
    stem = RESULTS / f"{name}_{hardware_tag(made_with['hardware'])}_{date}"
    result = {
        "name": name,
        "claim": claim,
        "date": date,
        "settings": settings,
        "rows": rows,
        "raw": raw,
    } | made_with
    write_json(stem.with_suffix(".json"), result)
    stem.with_suffix(".md").write_text(page(result), encoding="utf-8")
    return stem.with_suffix(".md")


def page(result: Mapping[str, Any]) -> str:
    """The result as Markdown: claim, table, and what it was measured on."""
    columns = list(result["rows"][0])
    table = [
        columns,
        ["---"] * len(columns),
        *([shown(row[column]) for column in columns] for row in result["rows"]),
    ]
    lines = [f"# {result['name']}", "", result["claim"], ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in table]
    lines += ["", f"`{result['command']}`, {result['date']}", ""]
    for title in ("settings", "hardware", "versions"):
        lines.append(
            f"- {title}: " + ", ".join(f"{key} {shown(value)}" for key, value in result[title].items())
        )
    git = result["git"]
    lines.append(
        f"- commit: {git['commit'][:12]}{' and local changes' if git['dirty'] else ''}"
        if git
        else "- commit: none"
    )
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A value for a reader: floats to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value) if value not in ([], None) else "none"
