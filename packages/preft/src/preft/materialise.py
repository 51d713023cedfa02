"""Weighted sums of saved adapters as adapter folders, written once for each content.

The folder's name in the cache is a digest of what it is made from (the files' content and the weights), so it is never
written twice, and processes that need it at once cannot disturb each other: each writes its own copy beside it and
renames that into place; who comes second finds the same content there. The cache is $PREFT_CACHE, by default
~/.cache/innerworks/adapters, and may be deleted while no engine runs.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from preft.adapter_files import FORMAT_VERSION
from preft.adapters import AdapterError
from preft.parts import highest_rank, read_source, save_source, sum_sources
from preft.vllm.identity import content_digest

CACHE_VARIABLE = "PREFT_CACHE"


def cache_folder() -> Path:
    """Where materialised adapters are kept."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "innerworks" / "adapters"


def materialised(terms: Sequence[tuple[Path, float]], max_rank: int | None = None) -> Path:
    """The folder of the sum of saved adapters or interventions with weights; UserError where they do not add up.

    Nothing is written for a sum of a higher rank than `max_rank`, which is an AdapterError too.
    The weight multiplies all that a folder does to an activation. At weight 0 nothing changes, exactly.
    """
    if bad := [weight for _, weight in terms if not math.isfinite(weight)]:
        raise AdapterError(f"a strength must be a finite number, not {bad[0]}")
    content = [FORMAT_VERSION, [[content_digest(folder), float(weight)] for folder, weight in terms]]
    target = cache_folder() / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    if not target.is_dir():
        _write(target, terms, max_rank)
    return target


def _write(target: Path, terms: Sequence[tuple[Path, float]], max_rank: int | None) -> None:
    source = sum_sources([(read_source(folder), weight) for folder, weight in terms])
    if max_rank is not None and (rank := highest_rank(source)) > max_rank:
        raise AdapterError(
            f"the sum has rank {rank}, and this engine holds ranks up to {max_rank} (max_lora_rank)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as scratch:
        built = save_source(source, Path(scratch) / "adapter")
        try:
            built.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same content
                raise
