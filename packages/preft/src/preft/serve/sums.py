"""Strengths and sums of adapters that clients name, `alice+calm:0.5`: made when first asked for, and bounded.

vLLM asks `OpenAIServingModels.resolve_lora` for a model that it does not list; here that is `Sums.resolve`, and none of
its resolvers is asked. Names are looked up among the server's adapters and the folders in VLLM_LORA_RESOLVER_CACHE_DIR,
which pass the check like any other; they are never joined to a path. What a name stands for (`preft.vllm.requests`) is
one more adapter, listed and retired by the catalog:

    stale    replacing or deleting an adapter unlists every sum of it; the next request makes it anew
    bounded  the catalog lists at most `MOST_SUMS`; none is written whose rank the engine has no buffers for
    files    lie in the store, and go with the last version that needs them
"""

import asyncio
from http import HTTPStatus
from pathlib import Path
from typing import Any

from preft.adapters import AdapterError
from preft.serve.catalog import Catalog, Refusal, Version
from preft.serve.guard import error_response
from preft.vllm.requests import Term, adapter_folder, parse
from preft.vllm.resolver import operators_folders
from shared.errors import UserError


class Sums:
    """The strengths and sums of one catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog

    async def resolve(self, name: str) -> Any:
        """The LoRARequest of a model's name, or vLLM's error response: status 404, or 400 for what does not add up."""
        try:
            self._terms(name, await self._folders())
            # Locks are kept for ever, so only names that stand for something get one.
            async with self.catalog.models.lora_resolver_lock[name], self.catalog.files:
                return self.catalog.models.lora_requests.get(name) or await self._made(name)
        except AdapterError as error:
            return error_response(error)

    async def _folders(self) -> dict[str, Path]:
        return await asyncio.to_thread(operators_folders) | self.catalog.folders()

    def _terms(self, name: str, folders: dict[str, Path]) -> list[Term]:
        try:
            return parse(name, folders)
        except UserError as error:
            raise Refusal(str(error), HTTPStatus.NOT_FOUND) from error

    async def _made(self, name: str) -> Any:
        """The sum of what its terms mean at the end: another one is made where they were replaced meanwhile."""
        catalog = self.catalog
        while True:
            folders = await self._folders()
            terms = self._terms(name, folders)
            before = catalog.ids(term.name for term in terms)
            folder = await asyncio.to_thread(self._write, name, terms, folders)
            written = len(terms) > 1 or terms[0].strength != 1.0
            try:
                request = await catalog.load(name, folder)
            except Refusal:
                await catalog.discard(folder, written)
                raise
            if before == catalog.ids(term.name for term in terms):
                made_of = frozenset(term.name for term in terms) - {name}
                catalog.enter(request, Version(1, None, None, False, written, made_of))
                return request
            await catalog.engine.remove_lora(request.lora_int_id)
            await catalog.discard(folder, written)

    def _write(self, name: str, terms: list[Term], folders: dict[str, Path]) -> Path:
        for term in terms:
            if term.name not in self.catalog.models.lora_requests:
                self.catalog.check(folders[term.name])
        try:
            return adapter_folder(name, folders, self.catalog.check.max_rank).resolve()
        except (UserError, ValueError) as error:
            raise Refusal(str(error)) from error
