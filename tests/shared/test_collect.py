"""One table out of the runs of a sweep."""

import csv
import subprocess
import sys

import pytest

from shared.collect import collect, show_table, write_table
from shared.errors import UserError
from shared.runs import start_run
from shared.serialize import read_json


def sweep(root):
    for index in (0, 1, 2, 10):
        with start_run(
            root / str(index), {"rate": 0.1 * index, "model": {"name": "x"}}, seed=index % 2
        ) as run:
            run.metrics({"loss": {"base": index / 2}})


def test_rows_hold_what_varied_and_every_metric(tmp_path):
    sweep(tmp_path)
    rows = collect(tmp_path)
    assert [row["run"] for row in rows] == ["0", "1", "2", "10"]
    assert list(rows[0]) == ["run", "status", "seed", "rate", "loss.base"]
    assert [row["loss.base"] for row in rows] == [0, 0.5, 1, 5]


def test_the_table_is_written_as_csv_and_json(tmp_path):
    sweep(tmp_path)
    rows = collect(tmp_path)
    write_table(rows, tmp_path)
    with (tmp_path / "table.csv").open() as file:
        assert [float(row["loss.base"]) for row in csv.DictReader(file)] == [0, 0.5, 1, 5]
    assert read_json(tmp_path / "table.json") == rows


def test_the_printed_table_has_a_line_a_metric_and_says_what_it_left_out(tmp_path, capsys):
    sweep(tmp_path)
    show_table(collect(tmp_path), "title", most=3)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["run", "0", "1", "2"] in lines
    assert ["loss.base", "0", "0.5", "1"] in lines
    assert ["and", "1", "more", "runs", "in", "the", "file"] in lines


def test_a_failed_run_keeps_its_row(tmp_path):
    sweep(tmp_path)
    with pytest.raises(RuntimeError, match="no"), start_run(tmp_path / "3", {"rate": 3.0}):
        raise RuntimeError("no")
    assert {row["run"]: row["status"] for row in collect(tmp_path)}["3"] == "failed"


def test_no_run_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="make sweep"):
        collect(tmp_path)
    command = [sys.executable, "-m", "shared.collect", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no run")
    assert "Traceback" not in done.stderr
