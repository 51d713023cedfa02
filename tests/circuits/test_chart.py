"""Plots show the numbers they are given: lines, bands, controls apart, sweeps by their setting."""

import numpy as np
import pytest
import torch

from circuits.chart import draw_curves, draw_metrics, draw_sweep, read_curves, sweep_points
from circuits.cli import main
from circuits.faithfulness import CurvePoint
from shared.errors import UserError
from shared.serialize import write_json


def points(scale):
    full, empty = torch.tensor([2.0, 3.0, 4.0]), torch.zeros(3)
    return [CurvePoint(k, full * min(1.0, scale * k), full * 0.1, full, empty) for k in (1, 2, 5)]


METRICS = {
    "faithfulness": {"nounpp": {"relp": {"10": 0.5, "100": 0.9}, "random": {"10": 0.0, "100": 0.1}}},
    "completeness": {"nounpp": {"relp": {"10": 0.4, "100": 0.1}}},
    "intervals": {"nounpp": {"faithfulness": {"relp": {"10": [0.4, 0.6], "100": [0.8, 0.95]}}}},
}


def test_lines_and_bands_are_the_curves():
    curves = {"relp": points(0.2), "random": points(0.01)}
    figure = draw_curves(curves, "edges")
    axis = figure.axes[0]
    assert axis.get_xlabel() == "edges in the circuit"
    lines = {line.get_label(): line for line in axis.lines}
    estimates = [point.faithfulness().estimate for point in curves["relp"]]
    assert lines["RelP"].get_ydata() == pytest.approx(estimates)
    assert list(lines["RelP"].get_xdata()) == [1, 2, 5]
    assert lines["random"].get_linestyle() == "--"
    assert lines["RelP"].get_linestyle() == "-"
    band = axis.collections[0].get_paths()[0].vertices
    interval = curves["relp"][0].faithfulness()
    assert band[band[:, 0] == 1][:, 1].min() == pytest.approx(interval.low)


def test_a_runs_metrics_are_read_with_their_intervals():
    read = read_curves(METRICS, "faithfulness")["nounpp"]
    assert read["relp"][100] == (0.9, 0.8, 0.95)
    assert read["random"][10] == (0.0, 0.0, 0.0)
    figure = draw_metrics(METRICS)
    assert len(figure.axes) == 2
    assert figure.axes[0].get_title(loc="left") == "nounpp"
    with pytest.raises(UserError, match="no curves"):
        draw_metrics({"seconds": 1.0})


def test_sweeps_are_drawn_by_their_setting():
    rows = [
        {
            "run": str(i),
            "status": "finished",
            "seed": i % 2,
            "settings.ablate": size,
            "accuracy": size / 100 + i % 2,
        }
        for i, size in enumerate([50, 50, 20, 20])
    ]
    setting, found = sweep_points(rows, "accuracy")
    assert setting == "settings.ablate"
    assert [tuple(point) for point in found] == [(50, 0.5), (50, 1.5), (20, 0.2), (20, 1.2)]
    axis = draw_sweep(rows, "accuracy").axes[0]
    assert np.array_equal(axis.lines[0].get_xdata(), [20, 50])
    assert axis.lines[0].get_ydata() == pytest.approx([0.7, 1.0])
    assert axis.get_xlabel() == "settings.ablate"
    words = [row | {"settings.reference": row.pop("settings.ablate")} for row in map(dict, rows)]
    named = [row | {"settings.reference": f"r{row['settings.reference']}"} for row in words]
    ticks = draw_sweep(named, "accuracy").axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["r50", "r20"]
    with pytest.raises(UserError, match="no run reports 'loss'; there are accuracy"):
        draw_sweep(rows, "loss")
    with pytest.raises(UserError, match="varies settings.ablate, model.name"):
        draw_sweep([row | {"model.name": row["run"]} for row in rows], "accuracy")


def test_the_command_draws_runs_and_sweeps(tmp_path, capsys):
    for number, value in enumerate([0.1, 0.2]):
        run = tmp_path / "sweep" / str(number)
        config = {"pipeline": "circuit_tracing", "settings": {"ablate": 10 * (number + 1)}}
        write_json(run / "manifest.json", {"status": "finished", "seed": 0, "config": config})
        write_json(run / "metrics.json", METRICS | {"accuracy": value})
    out = tmp_path / "made" / "curve.png"
    assert main(["plot", str(tmp_path / "sweep" / "0"), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert (
        main(["plot", str(tmp_path / "sweep"), "--metric", "accuracy", "--out", str(out.with_suffix(".svg"))])
        == 0
    )
    assert "accuracy" in out.with_suffix(".svg").read_text()
    capsys.readouterr()
    for arguments, reason in [
        (["plot", str(tmp_path), "--out", str(out)], "no finished run"),
        (["plot", str(tmp_path), "--metric", "loss", "--out", str(out)], "no run reports"),
        (["plot", str(tmp_path / "nowhere"), "--metric", "x", "--out", str(out)], "no run"),
        (["plot", str(tmp_path), "--out", "x.txt"], "pictures end in"),
    ]:
        assert main(arguments) == 2
        assert reason in capsys.readouterr().err
