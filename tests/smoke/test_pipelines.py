"""Every installed pipeline, two steps of it, as a user starts it: a process of its own, one folder, one report."""

import subprocess
import sys
from importlib import metadata

import pytest

from shared.collect import collect
from shared.demo import PARTS, owed_metrics, violations
from shared.screen import LINES
from shared.serialize import read_json

PACKAGES = {
    "adapter_serving": "preft",
    "adapter_quality": "quality",
    "adapter_rl": "rl",
    "adapter_parity": "parity",
    "circuit_tracing": "circuits",
    "assumption_probing": "assumptions",
}
INSTALLED = sorted(entry.name for entry in metadata.entry_points(group="innerworks.pipelines"))
SERVED = {"adapter_serving", "assumption_probing"}  # these start vLLM: one at a time
CASES = [
    pytest.param(name, marks=[pytest.mark.xdist_group("served")] if name in SERVED else [], id=name)
    for name in INSTALLED
]


def run(*arguments, folder):
    command = [sys.executable, "-m", "shared.run", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def test_the_pipelines_are_installed():
    assert set(PACKAGES) <= set(INSTALLED)


@pytest.mark.parametrize("name", CASES)
def test_smoke(name, tmp_path):
    folder = tmp_path / "run"
    run(f"experiment={PACKAGES[name]}/smoke", f"run.folder={folder}", folder=tmp_path)
    manifest = read_json(folder / "manifest.json")
    assert manifest["status"] == "finished"
    assert manifest["config"]["pipeline"] == name
    assert manifest["model"]["fingerprint"]
    metrics = read_json(folder / "metrics.json")
    for part in (part for part in PARTS if part.pipeline == name):
        assert owed_metrics(part, metrics) == []
        assert violations(part, metrics) == []
        assert not [line for line in LINES[name](metrics) if "-" in line.split()], "the screen lacks a figure"
    assert metrics.get("match_rate", 1) == 1
    assert metrics.get("conservation_error", 0) <= 1e-4
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert len(page) > 5000


def test_a_sweep_of_two_by_two_on_joblib_becomes_one_table(tmp_path):
    """Two seeds times two circuit sizes, side by side; the same job in and out of the sweep gives the same figures."""
    sweep = tmp_path / "sweep"
    common = ("experiment=circuits/smoke", "pipeline.estimators=[relp,random]")
    grid = ("run.seed=0,1", "pipeline.ablate=2,4")
    run("-m", *common, *grid, f"sweep.folder={sweep}", "hydra/launcher=local", folder=tmp_path)
    rows = collect(sweep)
    assert [(row["seed"], row["settings.ablate"]) for row in rows] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert {row["status"] for row in rows} == {"finished"}
    alone = tmp_path / "alone"
    run(*common, "run.seed=1", "pipeline.ablate=2", f"run.folder={alone}", folder=tmp_path)
    assert read_json(alone / "metrics.json") == read_json(sweep / "2" / "metrics.json")
