"""The Makefile documents itself, and the pins are exact and name no host."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = [
    "setup",
    "demo",
    "test",
    "check",
    "preft",
    "preft-quality",
    "circuits",
    "assumptions",
    "sweep",
    "bench",
    "tinyworld",
    "clean",
]


def make(*arguments, path=os.environ["PATH"]):
    settings = ("MAKE", "MFLAGS", "MODEL", "SWEEP", "EXPERIMENT")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(settings)}
    environment["PATH"] = path
    command = ["make", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_alone_lists_the_targets():
    listed = re.findall(r"^ +make ([a-z-]+) +(\S.*)$", make(), re.MULTILINE)
    assert set(TARGETS) <= {name for name, _ in listed}
    assert all(len(text) > 10 for _, text in listed)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["preft", "MODEL=tinyworld"], "pipeline=adapter_serving model=tinyworld"),
        (["preft-quality", "EXPERIMENT=smoke"], "pipeline=adapter_quality  experiment=quality/smoke"),
        (["circuits", "MODEL=qwen3", "EXPERIMENT=smoke"], "model=qwen3 experiment=circuits/smoke"),
        (["assumptions", "MODEL=some/model", "ARGS=run.seed=3"], "model.name=some/model  run.seed=3"),
        (["sweep", "LAUNCHER=slurm", "SWEEP=there"], "hydra/launcher=slurm sweep.folder=there"),
    ],
)
def test_settings_reach_hydra(arguments, expected):
    assert expected in make("-n", *arguments)


@pytest.mark.parametrize("arguments", [["preft"], ["circuits", "EXPERIMENT=smoke"], ["sweep"]])
def test_without_a_model_the_experiments_choice_holds(arguments):
    assert not re.search(r"\bmodel(\.name)?=", make("-n", *arguments))


def test_a_sweep_is_gathered_where_it_ran(tmp_path):
    """A `date` whose answer changes at every call: the folder must be named once."""
    clock = tmp_path / "date"
    clock.write_text(f"#!/bin/sh\necho tick >>{tmp_path}/ticks\nwc -l <{tmp_path}/ticks\n", encoding="utf-8")
    clock.chmod(0o755)
    printed = make("-n", "sweep", path=f"{tmp_path}:{os.environ['PATH']}")
    ran, gathered = re.search(r"sweep\.folder=(\S+)", printed), re.search(r"shared\.collect (\S+)", printed)
    assert ran[1] == gathered[1] == "runs/sweep/1"


@pytest.mark.parametrize("name", ["cpu.txt", "cuda.txt"])
def test_pins_are_exact_and_name_no_host(name):
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert len(lines) > 100
    assert not [line for line in lines if not re.fullmatch(r"[a-z0-9._-]+==[^ ]+( ; .*)?", line)]
    assert "://" not in text
    assert "find-links" not in text


def test_the_ci_script_is_executable():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert os.access(ROOT / "scripts/setup", os.X_OK)


def test_setup_gives_pip_to_an_environment_that_uv_left_without(tmp_path):
    """A .venv without pip and no uv on PATH: ensurepip is asked; where it gives none, the ways out are named."""
    script, python = tmp_path / "scripts/setup", tmp_path / ".venv/bin/python"
    for path in (script, python):
        path.parent.mkdir(parents=True)
    shutil.copy(ROOT / "scripts/setup", script)
    python.write_text('#!/bin/sh\necho "$*" >>asked\nexit 1\n', encoding="utf-8")
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "ACCEL": "cpu"}
    if shutil.which("uv", path=environment["PATH"]):
        pytest.skip("uv is in a system folder")
    done = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (tmp_path / "asked").read_text().splitlines() == ["-m pip --version", "-m ensurepip"]
    assert "has no pip" in done.stderr
    assert "rm -r .venv" in done.stderr


def test_the_python_that_is_promised_is_the_one_that_was_resolved():
    """README's version, the lock's, and the first that set-up looks for."""
    readme, lock, setup = (
        (ROOT / name).read_text() for name in ("README.md", "scripts/lock", "scripts/setup")
    )
    (resolved,) = re.findall(r"--python-version (\S+)", lock)
    assert re.search(r"With Python (\d\.\d+) and make", readme)[1] == resolved
    assert re.search(r"PYTHON:-python(\S+) ", setup)[1] == resolved
