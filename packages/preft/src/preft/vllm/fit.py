"""Whether an engine can serve an adapter: asked before a request for it enters.

An adapter may say which model it was made for. Blocks and width are compared with the served model's; the fingerprint
with `additional_config["preft_fingerprint"]`, where the deployment states one (the engine's own weights may be
quantised or sharded and have no comparable fingerprint).
"""

from typing import Any

from preft.vllm.identity import AdapterIdentity


def check_served(name: str, adapter: AdapterIdentity, vllm_config: Any) -> None:
    """ValueError where the engine's model or its slots do not suit the adapter."""
    text = vllm_config.model_config.hf_text_config
    served = (text.num_hidden_layers, text.hidden_size)
    if adapter.shape not in (None, served):
        raise ValueError(
            f"adapter {name!r} was made for a model of {adapter.shape[0]} blocks of width {adapter.shape[1]}; this "
            f"one has {served[0]} of width {served[1]}"
        )
    extra = vllm_config.additional_config
    known = extra.get("preft_fingerprint") if isinstance(extra, dict) else None
    if known and adapter.fingerprint not in (None, known):
        raise ValueError(
            f"adapter {name!r} was made for the model with fingerprint {adapter.fingerprint}; this one is {known}"
        )
    _check_slots(name, adapter, vllm_config)


def _check_slots(name: str, adapter: AdapterIdentity, vllm_config: Any) -> None:
    """A speculating engine computes the last prompt token and drafts in one chunk, which it must not cut."""
    parts = len({part.digest for part in adapter.parts or () if part})
    if vllm_config.speculative_config and parts > vllm_config.lora_config.max_loras:
        raise ValueError(
            f"adapter {name!r} has {parts} parts; with speculative decoding it needs max_loras >= {parts}"
        )
