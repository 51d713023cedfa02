"""What vLLM's OpenAI server takes in (entry point `vllm.endpoint_plugins`): routes, metrics, the gate.

vLLM asks for it while it builds its server, in the front process: once for the routes, once with the engine. It acts
only in a server that `preft serve` started, which leaves its settings in the arguments (`ServeSettings`).
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preft.serve.catalog import Catalog
from preft.serve.check import AdapterCheck, Checked
from preft.serve.store import Store

GROUP, NAME = "vllm.endpoint_plugins", "preft"
ARGUMENT = "preft"  # of vLLM's namespace of arguments, by which the settings reach this module


@dataclass(frozen=True)
class ServeSettings:
    """What `preft serve` has prepared: the check, the store, the adapters given, the folder whose adapters clients may
    name (None: none), and the largest upload in bytes."""

    check: AdapterCheck
    store: Store
    given: dict[str, Checked]
    local_paths: Path | None
    max_upload: int


class AdapterEndpoint:
    """vLLM's endpoint plugin."""

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add /v1/adapters, and the gate before every route."""
        if not hasattr(app.state.args, ARGUMENT):
            return
        from vllm import envs

        from preft.serve.gate import Drain, Gate
        from preft.serve.routes import make_router

        app.state.drain = Drain()
        app.add_middleware(Gate, drain=app.state.drain, key=envs.VLLM_API_KEY)
        app.include_router(make_router())

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Take in the adapters of the start, and put the counts on the page of metrics."""
        if not hasattr(args, ARGUMENT):
            return
        from preft.serve.guard import guard
        from preft.serve.prometheus import EngineCollector
        from preft.serve.sums import Sums
        from preft.serve.turns import find_turns

        given = settings(args)
        state.adapters = Catalog(state.openai_serving_models, engine_client, given.check, given.store)
        await state.adapters.start(given.given)
        state.adapter_counts = EngineCollector(state.adapters, state.drain)
        state.adapter_counts.register()
        state.drain.watch(engine_client)
        guard(state.adapters, given.local_paths)
        find_turns(state.openai_serving_models, state.online_renderer)
        state.openai_serving_models.resolve_lora = Sums(state.adapters).resolve


def settings(args: Namespace) -> ServeSettings:
    """The settings that `preft serve` left in vLLM's arguments."""
    return getattr(args, ARGUMENT)
