"""/v1/adapters: list, upload, replace and remove adapters over HTTP; errors in OpenAI's shape.

GET    /v1/adapters          all of them, and what each is doing
GET    /v1/adapters/NAME     one
POST   /v1/adapters          a new one: multipart, field `name` and the files as fields `files`; or, where the
                             operator allows local paths, JSON {"name": ..., "path": folder on the server}
PUT    /v1/adapters/NAME     a new one, or a new version under a name that exists; body as for POST, without name
DELETE /v1/adapters/NAME     serve it no longer
"""

from collections import Counter
from http import HTTPStatus
from typing import Any

from preft.adapters import AdapterError
from preft.serve.catalog import Catalog, Refusal, Version
from preft.serve.endpoint import settings
from preft.serve.guard import error_response
from preft.serve.upload import receive
from preft.vllm.metrics import Snapshot
from preft.vllm.scheduling import adapter_registry

PATH = "/v1/adapters"


def make_router() -> Any:
    """The FastAPI router."""
    from fastapi import APIRouter, Request
    from fastapi.responses import JSONResponse

    router = APIRouter(tags=["adapters"])

    def failed(error: AdapterError) -> JSONResponse:
        response = error_response(error)
        return JSONResponse(response.model_dump(), response.error.code)

    async def put(request: Request, name: str | None, replace: bool) -> JSONResponse:
        catalog: Catalog = request.app.state.adapters
        try:
            upload = await receive(request, settings(request.app.state.args), name)
            await catalog.put(upload.name, upload.staged, replace)
        except AdapterError as error:
            return failed(error)
        return JSONResponse((await rows(request, upload.name))[0], 200 if replace else 201)

    @router.get(PATH)
    async def list_adapters(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": await rows(request)})

    @router.get(PATH + "/{name}")
    async def get_adapter(request: Request, name: str) -> JSONResponse:
        found = await rows(request, name)
        return (
            JSONResponse(found[0])
            if found
            else failed(Refusal(f"there is no adapter {name!r}", HTTPStatus.NOT_FOUND))
        )

    @router.post(PATH)
    async def create_adapter(request: Request) -> JSONResponse:
        return await put(request, None, replace=False)

    @router.put(PATH + "/{name}")
    async def replace_adapter(request: Request, name: str) -> JSONResponse:
        return await put(request, name, replace=True)

    @router.delete(PATH + "/{name}")
    async def delete_adapter(request: Request, name: str) -> JSONResponse:
        try:
            await request.app.state.adapters.remove(name)
        except AdapterError as error:
            return failed(error)
        return JSONResponse({"id": name, "object": "adapter", "deleted": True})

    return router


async def rows(request: Any, name: str | None = None) -> list[dict[str, Any]]:
    """The adapters as JSON objects, all or those of one name."""
    catalog: Catalog = request.app.state.adapters
    counts = await request.app.state.adapter_counts.fresh()
    flying = catalog.in_flight().all
    older: Counter[str] = Counter()
    for number, old in catalog.retiring.items():
        older[old] += flying[number]
    return [
        row(lora, version, counts)
        | {
            "requests_in_flight": flying[lora.lora_int_id],
            "requests_under_older_versions": older[lora.lora_name],
        }
        for lora, version in catalog.rows()
        if name in (None, lora.lora_name)
    ]


def row(lora: Any, version: Version, counts: Snapshot) -> dict[str, Any]:
    """What an adapter is and where it is, as a JSON object."""
    identity, number = adapter_registry.current(lora), lora.lora_int_id
    weights = adapter_registry.part_ids(number)
    in_memory = "memory" if weights <= set(counts.slots.in_memory) else "disk"
    return {
        "id": lora.lora_name,
        "object": "adapter",
        "phase": identity and identity.phase.value,
        "method": identity and identity.method,
        "rank": version.rank,
        "digest": identity and identity.digest,
        "version": version.number,
        "created": version.created,
        "stored": version.stored,
        "resident": "slot" if weights <= set(counts.slots.in_slot) else in_memory,
        "adapted_tokens": counts.worker.by_adapter.get(lora.lora_name, {}),
    }
