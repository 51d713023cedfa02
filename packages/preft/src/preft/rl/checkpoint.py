"""The state of a run between two steps: adapter, AdamW's moments, number of steps taken; safetensors, one file.

Nothing else is needed to go on: prompts and seeds are functions of (seed, step). The adapter's own parameters are kept
(R and W apart), so that a continued run is the same bit for bit.
"""

from pathlib import Path
from typing import Any

import torch

from preft.adapters import Adapter, AdapterError
from shared.serialize import atomic_path

ADAPTER, OPTIMIZER = "adapter.", "optimizer."


def save_checkpoint(path: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, done: int) -> None:
    """Write the state after `done` steps; a run that is interrupted here leaves the former file."""
    from safetensors.torch import save_file

    tensors = {f"{ADAPTER}{name}": value for name, value in adapter.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{OPTIMIZER}{index}.{name}": value for name, value in state.items()}
    cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as partial:
        save_file(cpu, partial, metadata={"done": str(done)})


def load_checkpoint(path: Path, adapter: Adapter, optimizer: torch.optim.Optimizer) -> int:
    """Bring adapter and optimiser to the saved state; returns the steps taken. AdapterError if they do not fit."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        done = int(file.metadata()["done"])
    own = {name.removeprefix(ADAPTER): t for name, t in tensors.items() if name.startswith(ADAPTER)}
    try:
        adapter.load_state_dict(own)
    except RuntimeError as error:
        raise AdapterError(f"{path} belongs to another adapter; remove it to start anew: {error}") from error
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith(OPTIMIZER):
            index, key = name.removeprefix(OPTIMIZER).split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return done
