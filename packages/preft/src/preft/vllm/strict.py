"""Names that other loaders refuse: how an adapter that is no ordinary LoRA keeps from being taken for one.

A loader that does not know the section `preft` of adapter_config.json would apply a prefill-only LoRA to every token,
and say nothing: vLLM drops unknown keys, peft warns and goes on. So a folder of any other kind than a LoRA of phase all
is written in a way that both refuse by themselves (digest, section 4a):

    peft_type       PREFT in place of LORA                       peft knows no such type; vLLM does not look at it
    tensors         PATH.preft_A.weight, PATH.preft_B.weight     vLLM: "... is unsupported LoRA weight"

The names leave out "lora_A" altogether, for loaders that look for it anywhere in a name. This project's loader and its
vLLM plugin read both kinds of name; the plugin has the phase at hand when it does.
"""

from collections.abc import Callable
from typing import Any

PEFT_TYPE, STRICT_TYPE = "LORA", "PREFT"
_STRICT_OF = {"lora_A": "preft_A", "lora_B": "preft_B"}
_PLAIN_OF = {strict: plain for plain, strict in _STRICT_OF.items()}


def strict_name(name: str) -> str:
    """The name of a tensor in a strict folder, by its name in peft's."""
    return _renamed(name, _STRICT_OF)


def plain_name(name: str) -> str:
    """The name of a tensor in peft's format, by its name in either kind of folder."""
    return _renamed(name, _PLAIN_OF)


def _renamed(name: str, names: dict[str, str]) -> str:
    module, _, weight = name.rpartition(".")
    module, dot, factor = module.rpartition(".")
    return f"{module}{dot}{names[factor]}.{weight}" if weight == "weight" and factor in names else name


def parse_lora_name(original: Callable[..., tuple[str, bool]]) -> Callable[..., tuple[str, bool]]:
    """`vllm.lora.lora_model.parse_fine_tuned_lora_name`: module and factor of a tensor, strict names too."""

    def parse_fine_tuned_lora_name(name: str, weights_mapper: Any = None) -> tuple[str, bool]:
        return original(plain_name(name), weights_mapper)

    return parse_fine_tuned_lora_name
