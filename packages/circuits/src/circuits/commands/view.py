"""`circuits view`: serve a folder of graphs on this machine, trace new prompts, steer live."""

import argparse
from argparse import Namespace
from pathlib import Path

from circuits.commands.trace import add_model
from shared.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="graphs, or folders of graphs; new ones go there too")
    add_model(parser, default=None)
    add("--port", type=int, default=8770, help="port; 0 takes a free one (default: %(default)s)")


def main(arguments: Namespace) -> int:
    """Serve until Ctrl-C."""
    import uvicorn

    from circuits.serve import HOST, Library, create_app
    from shared.listening import listen
    from shared.models import ModelConfig

    if not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder} is no folder: `circuits trace` and `make circuits` write graphs")
    config = ModelConfig(arguments.model or "", dtype=arguments.dtype, device=arguments.device)
    library = Library(arguments.folder, config)
    if not library.graphs() and not arguments.model:
        raise UserError(f"{arguments.folder} holds no graph; trace one, or give --model to trace here")
    socket = listen(HOST, arguments.port)
    socket.listen()  # a browser that is faster than the server waits for it
    print(f"{len(library.graphs())} graphs at http://{HOST}:{socket.getsockname()[1]}/ (Ctrl-C ends)")
    server = uvicorn.Server(uvicorn.Config(create_app(library), log_level="warning"))
    server.run(sockets=[socket])
    return 0
