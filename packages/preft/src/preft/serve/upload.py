"""What a request brings: the files of a form, or the path of a folder on the server; within the size limit.

    an adapter         adapter_config.json, adapter_model.safetensors
    interventions      interventions.json, interventions.safetensors
    a composition      adapter_config.json, and the two files of an adapter in part-0, part-1, ... (`preft.parts`)

Nothing else is taken, so what a client calls a file never becomes a path. The limit holds for the body as it arrives,
whatever the client says about its length.
"""

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from preft.adapter_files import WEIGHTS_FILE
from preft.serve.catalog import Refusal
from preft.serve.endpoint import ServeSettings
from preft.serve.guard import allowed_folder
from preft.serve.store import Store
from preft.vllm.identity import CONFIG_FILE
from preft.vllm.mapping import Kind
from shared.intervention_files import JSON_NAME, TENSORS_NAME

FILES = (CONFIG_FILE, WEIGHTS_FILE)
MAX_JSON = 64 * 1024


def _composition(parts: int) -> tuple[str, ...]:
    return (CONFIG_FILE, *(f"part-{part}/{name}" for part in range(parts) for name in FILES))


LAYOUTS = (FILES, (JSON_NAME, TENSORS_NAME), *(_composition(parts + 1) for parts in range(len(Kind))))
MOST_FILES = max(map(len, LAYOUTS))


class Upload(NamedTuple):
    """An adapter's name and the folder of the store in which its files wait."""

    name: str
    staged: Path


async def receive(request: Any, settings: ServeSettings, name: str | None) -> Upload:
    """Read a request's body into a staged folder; Refusal where it is no adapter. `name` is the path's, if any."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind == "multipart/form-data":
        return await _from_form(request, settings.store, settings.max_upload, name)
    if kind == "application/json":
        return await _from_path(request, settings, name)
    raise Refusal(
        f"send multipart/form-data with the files {' and '.join(FILES)}, or application/json; not {kind!r}",
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    )


async def _from_form(request: Any, store: Store, limit: int, name: str | None) -> Upload:
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    parser = MultiPartParser(
        request.headers, _limited(request.stream(), limit), max_files=MOST_FILES, max_fields=4
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(f"the form cannot be read: {error.message}") from error
    try:
        uploads = [item for item in form.getlist("files") if isinstance(item, UploadFile)]
        files = {item.filename or "": item for item in uploads}
        layout = next((names for names in LAYOUTS if sorted(names) == sorted(files)), None)
        if layout is None:
            raise Refusal(
                f"field `files` must bring {' and '.join(FILES)}, or those of interventions, or a composition's with "
                f"its parts'; it brings {sorted(files)}"
            )
        name = _name(name, form.get("name"))
        return Upload(name, await _stage(store, layout, lambda file, to: _write(files[file].file, to)))
    finally:
        await form.close()


async def _from_path(request: Any, settings: ServeSettings, name: str | None) -> Upload:
    raw = b"".join([chunk async for chunk in _limited(request.stream(), MAX_JSON)])
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict) or not isinstance(body.get("path"), str):
        raise Refusal('a JSON body is {"name": ..., "path": folder on the server}')
    folder = allowed_folder(body["path"], settings.local_paths)
    name = _name(name, body.get("name"))
    held = [names for names in LAYOUTS if all((folder / file).is_file() for file in names)]
    if not held:
        raise Refusal(f"{body['path']!r} holds no adapter: it has no {' and no '.join(FILES)}")
    layout = max(held, key=len)
    return Upload(
        name, await _stage(settings.store, layout, lambda file, to: shutil.copyfile(folder / file, to))
    )


async def _stage(store: Store, layout: tuple[str, ...], write: Callable[[str, Path], object]) -> Path:
    """A staged folder with the files of a layout, or none at all; `write` puts one of them to where it is told."""
    staged = store.stage()
    try:
        for file in layout:
            (staged / file).parent.mkdir(exist_ok=True)
            await asyncio.to_thread(write, file, staged / file)
    except BaseException:
        store.discard(staged)
        raise
    return staged


def _name(from_path: str | None, from_body: Any) -> str:
    if from_path is not None:
        return from_path
    if not isinstance(from_body, str):
        raise Refusal("the field `name` is missing")
    return from_body


def _write(source: Any, target: Path) -> None:
    source.seek(0)
    with target.open("wb") as file:
        shutil.copyfileobj(source, file)


async def _limited(stream: AsyncIterator[bytes], limit: int) -> AsyncGenerator[bytes, None]:
    size = 0
    async for chunk in stream:
        size += len(chunk)
        if size > limit:
            raise Refusal(
                f"the upload is larger than {limit / 2**20:g} MiB (--max-upload-mb)",
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            )
        yield chunk
