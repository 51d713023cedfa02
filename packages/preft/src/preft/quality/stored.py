"""Results that outlive a change of settings: a file is known by what determines its content, and by nothing else.

A stage of a run is done anew when any setting changes. Here an adapter's losses depend on its users, training and rate,
but not on which other ranks are studied or where speeds are read: a study that is extended trains what is new only.
"""

from collections.abc import Callable
from typing import Any

from shared.runs import Run, config_hash
from shared.serialize import read_json, write_json


def stored(run: Run, name: str, identity: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """JSON content of NAME-HASH.json in the run's folder, computed unless a former run left it (and may be resumed)."""
    path = run.path(f"{name}-{config_hash(identity)}.json")
    if not (run.resume and path.exists()):
        write_json(path, compute())
    return read_json(path)
