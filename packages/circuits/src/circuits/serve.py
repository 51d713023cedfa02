"""The web side of `circuits view`: an index, the graphs' pages, supernodes saved, live steering, live traces.

    GET  /                              index with a thumbnail of each graph, and a form for a new prompt
    GET  /graphs/NAME                   the page, live
    POST /graphs/NAME/edit              {"nodes": [[kind, layer, position, index]], "factor": x} -> Outcome
    POST /graphs/NAME/supernodes        the content of supernodes.json -> {"saved": n}
    POST /traces                        {"prompt": ..., "answer": ..., "wrong": ...} -> {"job": n}
    GET  /traces/N                      {"stage": ..., "name": ..., "error": ...}

For this machine alone: it listens on the loopback address, answers to no other host name (so that no page from
elsewhere can reach it by a name that points here), and takes only what is called JSON, which a page from elsewhere
cannot send unasked (FastAPI's `strict_content_type`, from 0.132 on).
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

from circuits.library import Library, Place
from circuits.view import asset, embedded, fill, page, palette, policy, script_of
from shared.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

HOST = "127.0.0.1"
HOSTS = [HOST, "localhost"]


def create_app(library: Library) -> "FastAPI":
    """Return the application over a library."""
    from fastapi import Body, FastAPI
    from fastapi.requests import Request
    from fastapi.responses import HTMLResponse, JSONResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(title="circuits view", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)

    @app.exception_handler(UserError)
    def refuse(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=400)

    @app.get("/", response_class=HTMLResponse)
    def index() -> str:
        return index_page(library)

    @app.get("/graphs/{name:path}", response_class=HTMLResponse)
    def graph_page(name: str) -> str:
        content = library.open(name)
        return page(
            content.graph,
            content.graph.header.prompt,
            supernodes=content.supernodes,
            effects=content.effects,
            live=f"/graphs/{quote(name)}",
        )

    @app.post("/graphs/{name:path}/edit")
    def scale(
        name: str, nodes: Annotated[list[Place], Body()], factor: Annotated[float, Body()]
    ) -> dict[str, Any]:
        return dict(library.scale(name, nodes, factor))

    @app.post("/graphs/{name:path}/supernodes")
    def save(name: str, content: Annotated[dict[str, Any], Body()]) -> dict[str, int]:
        return {"saved": library.save_supernodes(name, content)}

    @app.post("/traces")
    def start(
        prompt: Annotated[str, Body()],
        answer: Annotated[str | None, Body()] = None,
        wrong: Annotated[str | None, Body()] = None,
    ) -> dict[str, int]:
        return {"job": library.start_trace(prompt, answer or None, wrong or None)}

    @app.get("/traces/{number}")
    def job(number: int) -> dict[str, Any]:
        if not 0 <= number < len(library.jobs):
            raise UserError(f"there is no job {number}")
        return asdict(library.jobs[number])

    return app


def index_page(library: Library) -> str:
    """Return the index as one string of HTML."""
    style = palette() + asset("base.css") + asset("index.css")
    script = script_of(("index.js",))
    graphs = [library.summary(name) for name in library.graphs()]
    return fill(
        asset("index.html"),
        CSP=policy(style, script, connect=True),
        CSS=style,
        DATA=embedded({"graphs": graphs, "model": library.config.name}),
        JS=script,
    )
