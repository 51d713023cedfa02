"""An adapter whose tensors are sharded over processes (FSDP2), and its whole twin.

FSDP2 replaces parameters by DTensors in place. What needs whole matrices (the retraction of R, saving) is done on a
twin that was made before: gather, compute, scatter. All processes call together.
"""

import torch

from preft.adapters import Adapter


def is_sharded() -> bool:
    """Whether accelerate was told to shard what this process trains (fsdp.yaml)."""
    from accelerate.utils import parse_flag_from_env

    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


@torch.no_grad()
def gather_(whole: Adapter, sharded: Adapter) -> Adapter:
    """Give the twin the sharded adapter's values; returns the twin."""
    from torch.distributed.tensor import DTensor

    for to, source in zip(whole.parameters(), sharded.parameters(), strict=True):
        to.copy_(source.full_tensor() if isinstance(source, DTensor) else source)
    return whole


@torch.no_grad()
def retract_sharded_(sharded: Adapter, whole: Adapter) -> None:
    """`Adapter.retract_` of a sharded adapter."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    gather_(whole, sharded).retract_()
    for to, source in zip(sharded.parameters(), whole.parameters(), strict=True):
        to.copy_(
            distribute_tensor(source.detach(), to.device_mesh, to.placements)
            if isinstance(to, DTensor)
            else source
        )
