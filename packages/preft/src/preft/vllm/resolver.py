"""The resolver through which vLLM's server finds `alice+calm:0.5` when a request names it as its model.

vLLM asks its resolvers for a model name that it does not know, if VLLM_ALLOW_RUNTIME_LORA_UPDATING is set; what one
finds is loaded, and listed from then on. Names are looked up, never joined to a path: those of the adapters that the
engine has loaded (`loaded`, kept by the wrapped `add_lora` and `remove_lora`), and of the folders in
VLLM_LORA_RESOLVER_CACHE_DIR.

vLLM keeps what it found for as long as it runs, whatever becomes of the adapters; `preft serve` does not ask here
(`preft.serve.sums`).
"""

import asyncio
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from preft.vllm.requests import adapter_request, folders_in, parse
from shared.errors import UserError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

NAME = "preft"
# Adapters that this process's engine has loaded, by id: name and path.
loaded: dict[int, tuple[str, str]] = {}


def known_folders() -> dict[str, Path]:
    """Where the adapters that may be named are."""
    return {name: Path(path) for name, path in loaded.values()} | operators_folders()


def operators_folders() -> dict[str, Path]:
    """The folders in VLLM_LORA_RESOLVER_CACHE_DIR by name, none where it is not set."""
    import vllm.envs as envs

    root = envs.VLLM_LORA_RESOLVER_CACHE_DIR
    return folders_in(Path(root)) if root else {}


@cache
def resolver_class() -> type:
    """The class `AdapterResolver`, built on first use because its base imports vLLM."""
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.resolver import LoRAResolver

    class AdapterResolver(LoRAResolver):
        """Finds sums and strengths of known adapters."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> "LoRARequest | None":
            folders = await asyncio.to_thread(known_folders)
            try:
                parse(lora_name, folders)
            except UserError:
                return None  # vLLM then says that there is no such model
            try:
                return await asyncio.to_thread(adapter_request, lora_name, folders)
            except (UserError, ValueError) as error:
                raise VLLMValidationError(str(error), parameter="model", value=lora_name) from error

    return AdapterResolver


def register_resolver() -> None:
    """Offer the resolver to vLLM's server; a second call does nothing."""
    from vllm.lora.resolver import LoRAResolverRegistry

    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(NAME, resolver_class()())
