"""The matrix on Model Runner V2, the runner of GPUs: its own scheduler paths, request states, token map and sampler.

A process of its own, because the runner and Triton's interpreter are chosen when vLLM is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.slow, pytest.mark.timeout(900)]
HERE = Path(__file__).parent
# All rows plainly, and asynchronously those in which steps overlap; everything runs too, without -k, and takes long.
OVERLAPPING = "any_order or in_chunks or preempted or reset or cancelled or swapped"
PART = f"plain or (async and not ngram and ({OVERLAPPING}))"


def test_the_matrix_on_model_runner_v2() -> None:
    pytest.importorskip("triton", reason="Model Runner V2 is written in Triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "triton_on_cpu", str(HERE / "test_matrix.py")]
    command += ["-k", PART]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Not this session's xdist variables: the matrix runs alone in there.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    run = subprocess.run(
        command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=880
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
