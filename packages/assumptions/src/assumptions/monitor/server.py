"""The monitor's server: the page, the sessions, and the turns as server-sent events.

    GET  /                                   the page; its script and style under /assets
    GET  /api/subject                        model, dimensions with their probes, defaults
    GET  /api/sessions    POST               list; a new one
    GET  /api/sessions/ID POST DELETE        one; rename it or change what it remembers; delete it
    POST /api/sessions/ID/turns              say something: `queued`, `scores`, `piece`..., `turn` or `error`
    POST /api/sessions/ID/stop               end the reply that is being written
    POST /api/sessions/ID/turns/N/ask        have the model state its scores of turn N
    POST /api/sessions/ID/turns/N/keep       go on with the other reply
    POST /api/sessions/ID/read               scores of a message that is still being written
    GET  /api/sessions/ID/transcript.json, .md

Everything that touches the model or writes a session goes through the `Desk`, in line. There is no log-in: the server
listens on loopback, takes requests for the names it was started under only (so that no foreign page reaches it by
rebinding a name), and refuses requests that a page of another origin sends.
"""

import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from assumptions.dimensions import dimension
from assumptions.monitor.conversation import Said, keep_reply, open_session, state_scores, take_turn
from assumptions.monitor.desk import Desk
from assumptions.monitor.prepare import Talk
from assumptions.monitor.session import Arm, Store, as_json, as_markdown, new_session
from assumptions.monitor.subject import RANGES, Setting, Subject
from shared.errors import UserError
from shared.generation.hf import context_length
from shared.mounted_save import without_mounted_save
from shared.serialize import plain

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI

ASSETS = Path(__file__).parent / "assets"
LOOPBACK = ("127.0.0.1", "localhost")
POLICY = (
    "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """What of a session is changed."""

    title: str | None = None
    remember: bool | None = None


@dataclass(frozen=True)
class Draft:
    """A message that is still being written, and the settings it would be answered under."""

    text: str
    settings: list[Setting] = field(default_factory=list)


@dataclass(frozen=True)
class Stop:
    """Which turn is ended: the one that was sent under this ticket."""

    ticket: str = ""


@dataclass(frozen=True)
class Keep:
    """Which reply the conversation goes on with."""

    arm: Arm


def build(subject: Subject, store: Store, talk: Talk, hosts: Sequence[str] = LOOPBACK) -> "FastAPI":
    """The application; `hosts` are the names it answers to ("*" for any)."""
    from fastapi import Depends, FastAPI
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse
    from fastapi.staticfiles import StaticFiles
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    with without_mounted_save():
        import anyio._backends._asyncio  # noqa: F401  (else imported at the first request)

    desk = Desk()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        desk.close()

    app = FastAPI(
        title="assumptions monitor", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_exception_handler(UserError, lambda _, error: JSONResponse({"error": str(error)}, 400))
    app.add_exception_handler(
        RequestValidationError, lambda _, error: JSONResponse({"error": _sentence(error)}, 422)
    )
    app.mount("/assets", StaticFiles(directory=ASSETS), "assets")
    app.get("/")(lambda: FileResponse(ASSETS / "index.html", headers={"Content-Security-Policy": POLICY}))
    routers = (_about(subject, talk), _sessions(subject, store, talk, desk), _turns(subject, store, desk))
    for router in routers:
        app.include_router(router, prefix="/api", dependencies=[Depends(_same_origin())])
    return app


def _same_origin() -> Any:
    """A dependency that refuses what a page of another origin sends."""
    from fastapi import HTTPException, Request

    def check(request: Request) -> None:
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise HTTPException(403, "another origin may not use the monitor")

    return check


def _about(subject: Subject, talk: Talk) -> "APIRouter":
    from fastapi import APIRouter

    router = APIRouter()
    about = describe(subject, talk)
    router.get("/subject")(lambda: about)
    return router


def describe(subject: Subject, talk: Talk) -> dict[str, Any]:
    """What the page needs to know of the subject, in JSON types."""
    probes = subject.probes.probes
    dimensions = [
        plain(dimension(name))
        | {
            "block": probe.block,
            "r2": probe.r2_validation,
            "pushed_at": [p.site for p in subject.pushes[name]],
        }
        for name, probe in probes.items()
    ]
    return {
        "model": subject.model.config.name,
        "fingerprint": subject.model.fingerprint,
        "context": context_length(subject.model),
        "labeller": subject.probes.labeller,
        "instrument": subject.instrument.id,
        "dimensions": dimensions,
        "ranges": RANGES,
        "talk": plain(talk),
    }


def _sessions(subject: Subject, store: Store, talk: Talk, desk: Desk) -> "APIRouter":
    """List, make, show, change, delete and export sessions."""
    from fastapi import APIRouter
    from fastapi.responses import PlainTextResponse, Response

    router = APIRouter(prefix="/sessions")
    fingerprint = subject.model.fingerprint

    @router.get("")
    def listed() -> list[dict[str, Any]]:
        return [summary(store, name, fingerprint) for name in store.names()]

    @router.post("")
    async def made() -> dict[str, Any]:
        session = new_session(subject.model.config.name, fingerprint, talk.remember)
        return as_json(await desk.call(lambda: store.save(session)))

    @router.get("/{name}")
    def shown(name: str) -> dict[str, Any]:
        return as_json(store.load(name))

    @router.post("/{name}")
    async def changed(name: str, change: Change) -> dict[str, Any]:
        values = {key: value for key, value in vars(change).items() if value is not None}
        return as_json(await desk.call(lambda: store.save(replace(store.load(name), **values))))

    @router.delete("/{name}")
    async def deleted(name: str) -> None:
        await desk.call(lambda: store.delete(name))

    @router.get("/{name}/transcript.json")
    def as_json_file(name: str) -> Response:
        text = json.dumps(as_json(store.load(name)), indent=2)
        return Response(text, media_type="application/json", headers=_download(name, "json"))

    @router.get("/{name}/transcript.md")
    def as_markdown_file(name: str) -> Response:
        return PlainTextResponse(as_markdown(store.load(name)), headers=_download(name, "md"))

    return router


def _turns(subject: Subject, store: Store, desk: Desk) -> "APIRouter":
    """Say something, stop it, read a draft, ask for stated scores, choose a reply."""
    from fastapi import APIRouter
    from fastapi.responses import StreamingResponse

    router = APIRouter(prefix="/sessions/{name}")

    async def told(name: str, said: Said) -> AsyncIterator[str]:
        yield sse("queued", {"ahead": desk.waiting})
        try:
            async for event in desk.stream(_key(name, said), partial(take_turn, subject, store, name, said)):
                yield sse(event.name, event.content)
        except UserError as error:
            yield sse("error", {"error": str(error)})
        except Exception:
            log.exception("a turn failed")
            yield sse("error", {"error": "the server failed at this turn; its terminal says how"})

    @router.post("/turns")
    async def say(name: str, said: Said) -> StreamingResponse:
        if not said.text.strip():
            raise UserError("the message is empty")
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(told(name, said), media_type="text/event-stream", headers=headers)

    @router.post("/stop")
    async def stop(name: str, which: Stop) -> dict[str, bool]:
        return {"stopped": desk.stop(_key(name, which))}

    @router.post("/read")
    async def read(name: str, draft: Draft) -> dict[str, dict[str, float]]:
        def scores() -> dict[str, dict[str, float]]:
            messages = open_session(subject, store, name).messages(draft.text)
            edits = subject.edits(draft.settings)
            steered = {"steered": subject.read(messages, edits)} if edits else {}
            return {"plain": subject.read(messages)} | steered

        return await desk.call(scores)

    @router.post("/turns/{number}/ask")
    async def ask(name: str, number: int) -> dict[str, Any]:
        stated: dict[str, Any] = plain(await desk.call(lambda: state_scores(subject, store, name, number)))
        return stated

    @router.post("/turns/{number}/keep")
    async def keep(name: str, number: int, choice: Keep) -> dict[str, Any]:
        return as_json(await desk.call(lambda: keep_reply(store, name, number, choice.arm)))

    return router


def _key(name: str, turn: Said | Stop) -> str:
    """What a turn is called in the line: two tabs may have one of the same session in it."""
    return f"{name}/{turn.ticket}"


def summary(store: Store, name: str, fingerprint: str) -> dict[str, Any]:
    """One line of the list of sessions; a file that cannot be read says so in its title and stops nothing."""
    try:
        session = store.load(name)
    except UserError as error:
        return {"id": name, "title": str(error), "created": "", "turns": 0, "usable": False}
    return {
        "id": name,
        "title": session.title,
        "created": session.created,
        "turns": len(session.turns),
        "usable": session.fingerprint == fingerprint,
    }


def sse(name: str, content: Any) -> str:
    """One server-sent event with JSON content."""
    return f"event: {name}\ndata: {json.dumps(plain(content))}\n\n"


def _download(name: str, suffix: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="conversation-{name}.{suffix}"'}


def _sentence(error: Any) -> str:
    """The first thing that is wrong with a request."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
