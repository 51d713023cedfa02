"""`preft serve MODEL`: the options, the defaults of the machine, everything checked, then vLLM's own server.

What this command does not know of its options goes to vLLM's server as it is; of an option given twice the last holds,
so those win over the defaults here.
"""

import argparse
import os
import re
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

from preft.adapters import AdapterError
from preft.materialise import CACHE_VARIABLE
from preft.parts import highest_rank, read_source
from preft.serve.catalog import NAME
from preft.serve.check import AdapterCheck, Checked, bare_model, fingerprint_of
from preft.serve.endpoint import ARGUMENT, GROUP, ServeSettings
from preft.serve.endpoint import NAME as PLUGIN
from preft.serve.store import Store
from preft.vllm.identity import CONFIG_FILE, holds_interventions
from preft.vllm.requests import folders_in, holds_adapter
from shared.commands import output_folder
from shared.errors import UserError
from shared.generation.vllm_arguments import (
    CPU_KV_CACHE_BYTES,
    adapter_rank,
    lora_rank,
    model_folder,
)
from shared.listening import listen
from shared.models import ModelConfig

API_KEY = "PREFT_API_KEY"
SMALLEST_RANK = 16  # of the engine's buffers where no adapter asks for more, so that uploads have room
DEFAULT_STORE = "runs/served-adapters"
UNSAFE = "lora_filesystem_resolver"  # vLLM's: joins the name that a client gives to its folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options; the others are vLLM's (`--help=all` of `vllm serve` lists them)."""
    parser.epilog = (
        "Every other option goes to vLLM's server, for example --max-model-len 4096. MODEL comes first."
    )
    parser.set_defaults(passed_on=[])
    add = parser.add_argument
    add("model", metavar="MODEL", help="tinyworld, random:FAMILY, a folder, or a Hugging Face id")
    add(
        "--adapters",
        nargs="*",
        default=[],
        metavar="NAME=FOLDER",
        help="adapters to serve from the start; FOLDER alone serves every adapter in it under its folder's name",
    )
    add("--store", type=output_folder, help=f"folder that keeps uploads (default: {DEFAULT_STORE}/MODEL)")
    add("--allow-local-paths", metavar="FOLDER", help="let clients name adapter folders below FOLDER")
    add("--max-upload-mb", type=float, default=1024, help="largest upload in MiB (default: %(default)s)")
    add("--max-lora-rank", type=int, help=f"highest rank (default: of --adapters, at least {SMALLEST_RANK})")
    add(
        "--max-loras", type=int, default=8, help="adapter slots, held while prompts are computed (default: 8)"
    )
    add("--max-cpu-loras", type=int, help="adapters kept in memory (default: at least 64)")
    add("--api-key", help=f"key that requests must bring (or the variable {API_KEY})")
    add("--drain-seconds", type=int, default=30, help="time for running requests at SIGTERM (default: 30)")
    add(
        "--fingerprint", default="auto", help="the base model's: auto, skip, or 16 hex digits (default: auto)"
    )
    add("--revision", help="revision of a Hugging Face id")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")


def main(arguments: Namespace) -> int:
    """Serve until SIGTERM or SIGINT; returns 0 after an orderly end."""
    given = adapter_folders(arguments.adapters)
    _check_installed()
    listen(arguments.host, arguments.port).close()  # said before the model is loaded
    if api_key := arguments.api_key or os.environ.get(API_KEY):
        os.environ["VLLM_API_KEY"] = api_key  # not among vLLM's arguments, which it logs
    with (
        Store(store_folder(arguments)) as store,
        tempfile.TemporaryDirectory(prefix="innerworks-") as scratch,
    ):
        os.environ.setdefault(CACHE_VARIABLE, str(store.sums))
        config = ModelConfig(
            arguments.model,
            dtype="auto",
            device="cpu",
            revision=arguments.revision,
            trust_remote_code="--trust-remote-code" in arguments.passed_on,
        )
        folder = model_folder(config, Path(scratch))
        rank = engine_rank(arguments.max_lora_rank, given)
        config = replace(config, name=folder)
        hf = bare_model(config)
        check = AdapterCheck(hf, _fingerprint(arguments.fingerprint, config, hf), rank)
        kept = check_stored(check, store)
        folders = given | {name: store.current[name].folder for name in kept}
        settings = ServeSettings(
            check,
            store,
            check_all(check, {name: path for name, path in given.items() if name not in kept}) | kept,
            Path(arguments.allow_local_paths).resolve() if arguments.allow_local_paths else None,
            int(arguments.max_upload_mb * 2**20),
        )
        return _serve(vllm_options(arguments, folder, folders, rank), settings)


def adapter_folders(given: Sequence[str]) -> dict[str, Path]:
    """Names and folders of `--adapters`; UserError for one that is none."""
    folders: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        root = Path(path if equals else text).resolve()
        found = {name: root} if equals else _adapters_in(root)
        if twice := sorted(folders.keys() & found.keys()):
            raise UserError(f"--adapters names {', '.join(twice)} twice")
        folders |= found
    for name, folder in folders.items():
        if not NAME.fullmatch(name):
            raise UserError(f"{name!r} is no name for an adapter: letters, digits, '.', '_' and '-'")
        if not holds_adapter(folder):
            raise UserError(f"--adapters {name}={folder}: no {CONFIG_FILE} there; give an adapter's folder")
    return folders


def _adapters_in(root: Path) -> dict[str, Path]:
    if holds_adapter(root):
        return {root.name: root}
    found = folders_in(root) if root.is_dir() else {}
    if not found:
        raise UserError(f"--adapters {root}: neither an adapter nor a folder of adapters")
    return found


def engine_rank(asked: int | None, folders: dict[str, Path]) -> int:
    """The smallest rank vLLM has buffers for that holds what was asked, or else all adapters and `SMALLEST_RANK`."""
    return lora_rank(asked or max([SMALLEST_RANK, *(_rank(name, path) for name, path in folders.items())]))


def _rank(name: str, folder: Path) -> int:
    if holds_interventions(folder):
        return highest_rank(read_source(folder))
    parts = [path.parent for path in folder.glob(f"part-*/{CONFIG_FILE}")]
    return max(adapter_rank(name, path) for path in [folder, *parts])


def store_folder(arguments: Namespace) -> Path:
    """The folder of the uploads: what was asked for, or one for each model."""
    return Path(arguments.store or f"{DEFAULT_STORE}/{re.sub(r'[^A-Za-z0-9._-]+', '-', arguments.model)}")


def check_stored(check: AdapterCheck, store: Store) -> dict[str, Checked]:
    """The uploads that can be served. Others are named and stay in the store: they may fit with other options."""
    checked = {}
    for name, stored in store.current.items():
        try:
            checked[name] = check(stored.folder)
        except AdapterError as error:
            print(f"preft: the upload {name!r} in {stored.folder} is not served: {error}", file=sys.stderr)
    return checked


def check_all(check: AdapterCheck, folders: dict[str, Path]) -> dict[str, Checked]:
    """Check every adapter before the engine is built; UserError names each one that does not fit, with the reason."""
    checked, faults = {}, []
    for name, folder in folders.items():
        try:
            checked[name] = check(folder)
        except AdapterError as error:
            faults.append(f"adapter {name!r} in {folder} cannot be served: {error}")
    if faults:
        raise UserError("\n".join(faults))
    return checked


def _fingerprint(choice: str, config: ModelConfig, hf: object) -> str | None:
    if choice == "auto":
        return fingerprint_of(config, hf)
    return None if choice == "skip" else choice


def vllm_options(arguments: Namespace, folder: str, adapters: dict[str, Path], rank: int) -> list[str]:
    """The command line of vLLM's server."""
    options = [
        *("--model", folder, "--served-model-name", arguments.model),
        *(["--revision", arguments.revision] if arguments.revision else []),
        *("--host", arguments.host, "--port", str(arguments.port)),
        *("--shutdown-timeout", str(arguments.drain_seconds)),
        *("--enable-lora", "--max-loras", str(arguments.max_loras), "--max-lora-rank", str(rank)),
        *("--max-cpu-loras", str(arguments.max_cpu_loras or max(64, arguments.max_loras, 2 * len(adapters)))),
        *_machine_options(),
        *(["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())] if adapters else []),
    ]
    return options + arguments.passed_on


def _machine_options() -> list[str]:
    import torch

    if torch.cuda.is_available():
        return ["--dtype", "bfloat16"]
    memory = ["--kv-cache-memory-bytes", str(CPU_KV_CACHE_BYTES)]
    cache = [] if os.environ.get("VLLM_CPU_KVCACHE_SPACE") else memory
    return ["--dtype", "float32", "--enforce-eager", "--distributed-executor-backend", "uni", *cache]


def _check_installed() -> None:
    """UserError unless vLLM will find the endpoint: the installation may be older than its entry point."""
    if PLUGIN not in entry_points(group=GROUP).names:
        raise UserError(f"the installation has no entry point {PLUGIN!r} of {GROUP}: run `make setup` again")


def _allow_plugins() -> None:
    """vLLM loads an endpoint plugin only by name; name the others too, which it would load without any list."""
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in chosen.split(","):
        raise UserError(
            f"VLLM_PLUGINS={chosen!r} leaves out {PLUGIN!r}, which preft serve needs: add it, or unset it"
        )
    others = {
        entry.name
        for group in entry_points().groups
        if group.startswith("vllm.")
        for entry in entry_points(group=group)
    }
    os.environ.setdefault("VLLM_PLUGINS", ",".join(sorted((others | {PLUGIN}) - {UNSAFE})))


def _serve(options: list[str], settings: ServeSettings) -> int:
    """Run vLLM's server in this process."""
    _allow_plugins()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"  # its routes are guarded (preft.serve.guard)
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser(prog="preft serve")).parse_args(options)
    if args.api_server_count not in (None, 1):
        raise UserError("preft serve runs one API server: leave --api-server-count at 1")
    validate_parsed_serve_args(args)
    setattr(args, ARGUMENT, settings)
    uvloop.run(run_server(args))
    return 0
