"""The worker's half of `preft.vllm.memory`: adapters in host memory, and how vLLM's manager loads them from there.

Both functions become methods of vLLM's `WorkerBase` (`plugin.py`), so that `collective_rpc` finds them by name in every
worker, in this process or another; between processes only text, numbers and bytes travel. What an adapter is refused
for comes back as text, since an exception raised in a worker process would arrive without its kind.
"""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from preft.vllm.identity import worker_adapters

HOLD = "preft_hold_adapter"
DROP = "preft_drop_adapter"


@dataclass
class Held:
    """One version: its id, configuration and tensors (as bytes), and the name it is pinned for (or "")."""

    lora_id: int
    config: str
    tensors: bytes
    pinned_for: str = ""


def hold_adapter(
    worker: Any, name: str, lora_id: int, path: str, config: str, tensors: bytes, pin_for: str
) -> str | None:
    """Keep an adapter in host memory and load it; with `pin_for`, pinned in place of that name's earlier version.

    Returns why it cannot be served, else None. A refused adapter leaves nothing behind.
    """
    from vllm.lora.request import LoRARequest

    manager = worker.model_runner.lora_manager
    held = held_by(manager)
    held[path] = Held(lora_id, config, tensors)
    try:
        if pin_for:
            _check_room(manager, pin_for)
        manager.add_adapter(LoRARequest(name, lora_id, path))
    except Exception as error:
        # Whatever vLLM objects to is a verdict on the adapter; it may have filled half a slot by then.
        manager.remove_adapter(lora_id)
        drop_adapter(worker, lora_id, path)
        return str(error)
    if pin_for:
        _pin(manager, lora_id, path, pin_for)
    return None


def drop_adapter(worker: Any, lora_id: int, path: str) -> None:
    """Forget a version that no request needs."""
    held_by(worker.model_runner.lora_manager).pop(path, None)
    worker_adapters.forget(lora_id)


def held_by(manager: Any) -> dict[str, Held]:
    """What the worker's manager of adapters holds in memory, by path."""
    return manager.__dict__.setdefault("_held_adapters", {})


def load_held(manager: Any, lora_request: Any) -> Any:
    """vLLM's `LoRAModel` of an adapter in memory; ValueError where it does not fit the engine.

    What `WorkerLoRAManager._load_adapter` does for a folder. The tensors are decoded afresh, for vLLM scales them in
    place.
    """
    from safetensors.torch import load
    from vllm.lora.peft_helper import PEFTHelper

    if (held := held_by(manager).get(lora_request.lora_path)) is None:
        raise ValueError(f"adapter {lora_request.lora_name!r} is not in this worker's memory; push it again")
    helper = PEFTHelper.from_dict(
        json.loads(held.config) | {"vllm_max_position_embeddings": manager.max_position_embeddings}
    )
    helper.validate_legal(manager.lora_config)
    model = manager._adapter_manager.model
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    lora = manager._lora_model_cls.from_lora_tensors(
        lora_model_id=lora_request.lora_int_id,
        tensors=load(held.tensors),
        peft_helper=helper,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        skip_prefixes=getattr(model, "lora_skip_prefixes", None),
    )
    _check_modules(manager, lora)
    return lora


def _check_modules(manager: Any, lora: Any) -> None:
    """ValueError names modules of an adapter that this engine lacks or that have other sizes; or it has none.

    vLLM asks neither: what it does not know it leaves out, and a smaller matrix fills a corner of the slot.
    """
    if not lora.loras:
        raise ValueError("it has no weights")
    sizes = _sizes(manager._adapter_manager)
    if unknown := sorted(lora.loras.keys() - sizes.keys()):
        kinds = sorted({name.rpartition(".")[2] for name in sizes})
        raise ValueError(
            f"its modules {', '.join(unknown[:8])} are not adapted here; adapted are {', '.join(kinds)} of this "
            "model's own layers"
        )
    for name, weights in lora.loras.items():
        found = Sizes(weights.lora_a.shape[1], weights.lora_b.shape[0])
        if found != sizes[name]:
            raise ValueError(
                f"its module {name} maps {found.inputs} values to {found.outputs}, and the model's "
                f"{sizes[name].inputs} to {sizes[name].outputs}: it belongs to another model"
            )


class Sizes(NamedTuple):
    """Inputs and outputs of a linear module, before any sharding."""

    inputs: int
    outputs: int


def _sizes(adapted: Any) -> dict[str, Sizes]:
    """Every module that vLLM's manager adapts, under the name it has in adapters: fused ones one by one."""
    sizes: dict[str, Sizes] = {}
    for name, module in adapted.modules.items():
        if (linear := getattr(module, "base_layer", None)) is None or not hasattr(linear, "input_size"):
            continue  # embeddings and heads, which this project's adapters leave alone
        outputs = _outputs(linear)
        parts = adapted.packed_modules.get(name)
        each = zip(parts, outputs, strict=True) if parts else [(name, sum(outputs))]
        inputs = getattr(linear, "adapter_inputs", linear.input_size)
        sizes |= {part: Sizes(inputs, size) for part, size in each}
    return sizes


def _outputs(linear: Any) -> list[int]:
    """Output sizes of a linear layer of vLLM, of every one that is fused in it."""
    if hasattr(
        linear, "total_num_kv_heads"
    ):  # its own `output_sizes` count heads that ranks share more than once
        heads = (linear.total_num_heads, linear.total_num_kv_heads)
        return [heads[0] * linear.head_size, heads[1] * linear.head_size, heads[1] * linear.v_head_size]
    return list(getattr(linear, "output_sizes", None) or [linear.output_size])


def _check_room(manager: Any, pin_for: str) -> None:
    """ValueError where pinning one more name would leave vLLM's cache of adapters nothing to evict."""
    pinned = {held.pinned_for for held in held_by(manager).values() if held.pinned_for} | {pin_for}
    capacity = manager._adapter_manager.capacity
    if len(pinned) >= capacity:
        raise ValueError(
            f"with max_cpu_loras={capacity} no more than {capacity - 1} adapters can be pinned; raise max_cpu_loras "
            "or push without pin"
        )


def _pin(manager: Any, lora_id: int, path: str, pin_for: str) -> None:
    """Pin a version in vLLM's host cache, and unpin the name's version before it.

    Not in a slot, as vLLM's own `pin_lora` does: the scheduler's budget does not count pinned slots, and a step whose
    adapters then find too few would fail.
    """
    cache = manager._adapter_manager._registered_adapters
    for held in held_by(manager).values():
        if held.pinned_for == pin_for:
            held.pinned_for = ""
            cache.pinned_items.discard(held.lora_id)
    held_by(manager)[path].pinned_for = pin_for
    cache.pin(lora_id)
