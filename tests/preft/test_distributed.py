"""Several processes on gloo: DDP trains as one process does; a sharded (FSDP2) model has the same gradients.

accelerate shards on accelerators only, so FSDP's part is tested with torch's own `fully_shard` on the same modules. One
launch serves both: starting processes is what takes the time.
"""

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
import yaml
from preft_cases import chats, distributed_process
from test_train_command import write

from preft.cli import main
from preft.formats import load_adapter
from shared.models import Model
from shared.serialize import read_json

pytestmark = pytest.mark.slow
CONF = Path(__file__).parents[2] / "conf/accelerate"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_two_processes_train_as_one_does(model: Model, tmp_path: Path) -> None:
    """Same rows a step over both processes: the losses and the adapter of one process, up to rounding.

    The same launch again keeps what is finished. In the same processes: blocks and deltas sharded over them, with
    gradient checkpointing, have the gradients of a whole model, and R is retracted whole.
    """
    data = write(tmp_path / "rows.jsonl", [{"messages": chat} for chat in chats(7)])
    text = f"train --data {data} --heldout {data} --model random:llama --method loreft --rank 4 --device cpu"
    # 7 rows in steps of 4: the second step has fewer rows than parts. Checkpoints: only the first process writes.
    text += (
        " --steps 4 --batch-size 4 --gradient-accumulation 2 --eval-every 2 --save-every 2 --warmup-steps 0"
    )
    arguments = [*text.split(), "--out", str(tmp_path / "two")]
    torch.multiprocessing.spawn(distributed_process, args=(2, free_port(), arguments), nprocs=2)
    assert main([*text.split(), "--out", str(tmp_path / "one")]) == 0
    losses = [read_json(tmp_path / out / "losses.json") for out in ("two", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    held = [read_json(tmp_path / out / "metrics.json")["heldout_loss"] for out in ("two", "one")]
    assert held[0] == pytest.approx(held[1], rel=1e-4)
    adapters = [load_adapter(tmp_path / out / "adapter", model.hf) for out in ("two", "one")]
    for a, b in zip(*(adapter.parameters() for adapter in adapters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_the_launch_settings_are_accelerates() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for name, kind in (("ddp", "MULTI_GPU"), ("fsdp", "FSDP")):
        path = CONF / f"{name}.yaml"
        config = load_config_from_file(str(path))
        assert config.distributed_type == kind
        assert config.mixed_precision == "no"
        assert set(yaml.safe_load(path.read_text())) <= set(vars(config))
