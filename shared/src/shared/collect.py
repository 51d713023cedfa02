"""Gather the runs of a sweep into one table: what was varied, and every metric.

python -m shared.collect runs/sweep/FOLDER      writes table.csv and table.json there, prints the table
"""

import argparse
import csv
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.report import flatten
from shared.serialize import atomic_path, read_json, write_json

Row = dict[str, Any]


def read_run(folder: Path, root: Path) -> tuple[Row, Row]:
    """Settings (with seed and status) and metrics of one run, both flat with dotted keys."""
    manifest = read_json(folder / "manifest.json")
    settings = {"run": folder.relative_to(root).as_posix(), "status": manifest["status"]}
    settings |= {"seed": manifest["seed"]} | flatten(manifest["config"])
    path = folder / "metrics.json"
    return settings, flatten(read_json(path)) if path.exists() else {}


def collect(root: Path) -> list[Row]:
    """One row a run under `root`, in order of folder: its name, status, the settings that differ, the metrics.

    Raises UserError where there is no run.
    """
    folders = sorted((path.parent for path in root.rglob("manifest.json")), key=_natural)
    if not folders:
        raise UserError(f"no run (manifest.json) under {root}; start a sweep with: make sweep")
    runs = [read_run(folder, root) for folder in folders]
    keys = dict.fromkeys(key for settings, _ in runs for key in settings)
    varied = [key for key in keys if len({repr(settings.get(key)) for settings, _ in runs}) > 1]
    names = list(dict.fromkeys(["run", "status", *varied]))
    return [{name: settings.get(name) for name in names} | metrics for settings, metrics in runs]


def _natural(path: Path) -> tuple[tuple[int, str], ...]:
    """Sort key under which job 10 comes after job 9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in path.parts)


def write_table(rows: list[Row], root: Path) -> None:
    """Write the rows as table.csv and table.json under `root`."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_json(root / "table.json", rows)
    with atomic_path(root / "table.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def show_table(rows: list[Row], title: str, most: int = 8) -> None:
    """Print the sweep, a column a run (the first `most`), a line a setting or a scalar metric."""
    from rich.console import Console
    from rich.table import Column, Table

    names = dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list))
    runs = (str(row["run"]) for row in rows[:most])
    table = Table(Column("run", overflow="fold"), *runs, title=title, title_justify="left", box=None)
    for name in list(names)[1:]:
        table.add_row(name, *(_cell(row.get(name)) for row in rows[:most]))
    Console().print(table, highlight=False)
    if len(rows) > most:
        print(f"and {len(rows) - most} more runs in the file")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def main() -> None:
    """Entry point of `python -m shared.collect`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="folder that holds the runs of a sweep")
    root = parser.parse_args().folder
    try:
        rows = collect(root)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    write_table(rows, root)
    show_table(rows, f"{len(rows)} runs, in {root / 'table.csv'}")


if __name__ == "__main__":
    main()
