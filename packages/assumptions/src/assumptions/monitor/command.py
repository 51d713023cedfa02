"""`assumptions monitor`: talk with a model on a local page, see what it assumes, steer it."""

import argparse
import contextlib
import socket
import webbrowser
from dataclasses import replace
from pathlib import Path

from assumptions.monitor.server import LOOPBACK
from shared.commands import output_folder
from shared.errors import UserError
from shared.listening import listen
from shared.models import ModelConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `assumptions monitor`."""
    parser.add_argument("--model", help="tinyworld (the default), a local folder, or a Hugging Face id")
    parser.add_argument("--study", type=Path, help="folder of a study: its model, probes and directions")
    parser.add_argument("--dtype", default="float32", help="torch dtype of the weights, or auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--probes", type=Path, help="folder of `assumptions probe`; the embedded model needs none"
    )
    parser.add_argument(
        "--directions", type=Path, help="folder with one folder of saved interventions a dimension"
    )
    parser.add_argument(
        "--instrument", help="what the model is asked with; default: what labelled the probes"
    )
    parser.add_argument(
        "--sessions", type=output_folder, default="runs/monitor", help="where transcripts are kept"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; there is no log-in")
    parser.add_argument("--port", type=int, default=8760, help="0 takes any that is free")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def main(arguments: argparse.Namespace) -> None:
    """Serve the page until interrupted."""
    from assumptions.monitor.prepare import prepare
    from assumptions.monitor.server import build
    from assumptions.monitor.session import Store

    with contextlib.closing(listen(arguments.host, arguments.port)) as listener:
        config, probes, directions = chosen(arguments)
        subject, talk = prepare(config, probes, directions, arguments.instrument)
        local = arguments.host in LOOPBACK
        app = build(subject, Store(arguments.sessions), talk, LOOPBACK if local else ("*",))
        port = listener.getsockname()[1]
        address = f"http://{arguments.host}:{port}/"
        if not local:
            print("warning: anyone who reaches this address can use the model and read the transcripts")
        print(f"monitor of {config.name}: {address} (Ctrl-C ends it)", flush=True)
        if arguments.open:
            webbrowser.open(address)
        serve(app, listener)


def chosen(arguments: argparse.Namespace) -> tuple[ModelConfig, Path | None, Path | None]:
    """The model, its probes and its directions: those named, else the study's."""
    probes, directions = arguments.probes, arguments.directions
    name = arguments.model or "tinyworld"
    if arguments.study is None:
        return ModelConfig(name, dtype=arguments.dtype, device=arguments.device), probes, directions
    from assumptions.commands.study import load_study

    study = load_study(arguments.study)
    if study.last == "elicit":
        raise UserError(f"{arguments.study} has no probes yet: run `assumptions probe {arguments.study}`")
    own = arguments.study / "directions"
    # Directions of an earlier step were made of other probes.
    directions = directions or (own if study.last == "steer" and own.is_dir() else None)
    config = study.model if arguments.model is None else replace(study.model, name=name)
    return config, probes or arguments.study / "probes", directions


def serve(app: object, listener: socket.socket) -> None:
    """Run the application on the socket until interrupted."""
    import uvicorn

    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)  # type: ignore[arg-type]
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listener])
