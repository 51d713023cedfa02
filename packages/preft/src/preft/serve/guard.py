"""vLLM's own routes /v1/load_lora_adapter and /v1/unload_lora_adapter, under the rules of the catalog.

As they come they load whatever path of the server a client names, and only what loading happens to notice is refused.
Here the folder must lie under `--allow-local-paths` and pass the check, and what they unload is retired like any other
version. The handlers are replaced on vLLM's one instance, so that every route that leads to them is covered.
"""

import asyncio
from http import HTTPStatus
from pathlib import Path
from typing import Any

from preft.adapters import AdapterError
from preft.serve.catalog import Catalog, Refusal


def allowed_folder(path: str, root: Path | None) -> Path:
    """The folder a client named, resolved; Refusal unless it lies under `root`."""
    if root is None:
        raise Refusal(
            "this server reads no adapters from its own disk for clients: upload the files, or start it with "
            "--allow-local-paths FOLDER",
            HTTPStatus.FORBIDDEN,
        )
    folder = Path(path).resolve()
    if not folder.is_relative_to(root):
        raise Refusal(f"{path!r} is outside the folder that --allow-local-paths opens", HTTPStatus.FORBIDDEN)
    if not folder.is_dir():
        raise Refusal(f"there is no folder {path!r} on the server", HTTPStatus.NOT_FOUND)
    return folder


def guard(catalog: Catalog, root: Path | None) -> None:
    """Put the two handlers of `catalog.models` under the rules."""

    async def load_lora_adapter(request: Any, base_model_name: str | None = None) -> Any:
        try:
            if request.lora_name in catalog.store.current:
                raise Refusal(
                    f"{request.lora_name!r} was uploaded: PUT /v1/adapters replaces it", HTTPStatus.CONFLICT
                )
            catalog.check_name(request.lora_name)
            folder = allowed_folder(request.lora_path, root)
            checked = await asyncio.to_thread(catalog.check, folder)
            # In place means another id here as well: two folders under one id would be taken for one another.
            await catalog.adopt(request.lora_name, folder, checked, request.load_inplace)
        except AdapterError as error:
            return error_response(error)
        return f"Success: LoRA adapter '{request.lora_name}' added successfully."

    async def unload_lora_adapter(request: Any) -> Any:
        try:
            await catalog.remove(request.lora_name)
        except Refusal as error:
            return error_response(error)
        return f"Success: LoRA adapter '{request.lora_name}' removed successfully."

    models = catalog.models
    models.load_lora_adapter, models.unload_lora_adapter = load_lora_adapter, unload_lora_adapter


def error_response(error: AdapterError) -> Any:
    """vLLM's error response, which is OpenAI's, for a refusal (an adapter that does not fit: status 400)."""
    from vllm.entrypoints.serve import create_error_response

    status = error.status if isinstance(error, Refusal) else HTTPStatus.BAD_REQUEST
    return create_error_response(str(error), status.phrase.replace(" ", "") + "Error", status)
