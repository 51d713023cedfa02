"""Which model a command asks, and through which engine: options, and the engine they name."""

import argparse
from typing import NamedTuple

from assumptions.asking import OnDemand
from assumptions.engines import start_engine
from shared.errors import UserError
from shared.generation import Generator, OpenAIGenerator
from shared.models import Model, ModelConfig, load


class Asked(NamedTuple):
    """The model (None behind a server), what identifies it in files, and the engine, started at the first request."""

    model: Model | None
    name: str
    engine: OnDemand


def add_engine(parser: argparse.ArgumentParser) -> None:
    """The options of a command that asks a model."""
    parser.add_argument(
        "--model", required=True, help="a folder, a Hugging Face id, tinyworld, or a server's model"
    )
    parser.add_argument(
        "--engine",
        choices=("vllm", "hf"),
        default="vllm",
        help="vllm (default) guides answers by a grammar; hf, Hugging Face in this process, needs --free",
    )
    parser.add_argument("--replicas", type=int, default=1, help="vLLM processes that share the GPUs or cores")
    parser.add_argument(
        "--server", help="address of an OpenAI-compatible server, ending in /v1, in place of --engine"
    )
    parser.add_argument("--requests-per-minute", type=float, help="rate limit of the server")
    parser.add_argument("--concurrency", type=int, default=64, help="requests to the server at a time")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds that an answer of the server may take"
    )
    parser.add_argument("--dtype", default="float32", help="of the weights: float32, bfloat16, ... or auto")
    parser.add_argument("--free", action="store_true", help="no grammar: the answer is read leniently")


def check_engine(arguments: argparse.Namespace) -> None:
    """UserError where the engine has no grammar and one is wanted, or a number is none."""
    if min(arguments.concurrency, arguments.timeout) <= 0:
        raise UserError("--concurrency and --timeout must be positive")
    if arguments.engine == "hf" and not (arguments.free or arguments.server):
        raise UserError("--engine hf has no grammar: add --free, or take vllm")


def named(arguments: argparse.Namespace) -> str:
    """Where answers come from: the server's address, or the name of the engine."""
    return str(arguments.server or arguments.engine)


def open_engine(arguments: argparse.Namespace) -> Asked:
    """Load the model that is asked, where it is in this process; the engine starts when it is needed.

    vLLM loads the weights itself: the copy here, which identifies them, stays on the CPU and leaves it the GPU.
    """
    device = "cpu" if arguments.engine == "vllm" else "auto"
    config = ModelConfig(arguments.model, dtype=arguments.dtype, device=device)
    model = None if arguments.server else load(config)
    name = arguments.model if model is None else model.fingerprint
    return Asked(model, name, OnDemand(lambda: _start(arguments, model)))


def _start(arguments: argparse.Namespace, model: Model | None) -> Generator:
    if model is None:
        return OpenAIGenerator(
            arguments.server,
            arguments.model,
            concurrency=arguments.concurrency,
            timeout=arguments.timeout,
            requests_per_minute=arguments.requests_per_minute,
        )
    return start_engine(arguments.engine, model, arguments.replicas)
