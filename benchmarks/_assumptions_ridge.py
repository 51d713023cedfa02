"""Nine ridge probes a layer from one streamed factorisation, against scikit-learn's Ridge in a loop.

Every side fits every dimension at every layer at one strength, from the same float32 shards on disk, in double
precision, interleaved by layer; the sides must give equal coefficients (`TOLERANCE`), or the comparison is void.
scikit-learn's loop reads a layer once and fits one Ridge a dimension; a third side hands it all dimensions at once,
which a loop over dimensions does not, so that what the shared factorisation gains is seen apart from the rest.
"""

import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from assumptions.ridge import Factors
from assumptions.rows import gather
from assumptions.store import ActivationStore, Origin

CLAIM = (
    "One streamed pass and one factorisation a layer for all dimensions, against scikit-learn's Ridge fitted dimension "
    "by dimension: double precision on all sides, equal coefficients."
)
KEYS = ("ridge_over_sklearn_loop",)
STRENGTH = 10.0  # the paper's
TOLERANCE = 1e-8  # largest difference of a coefficient, as a share of the largest coefficient
SIDES = ("streamed", "sklearn_loop", "sklearn_all_at_once")


def add_arguments(parser: ArgumentParser) -> None:
    """The sizes; the whole claim is --ratio-rows 100000 --ratio-width 4096 --ratio-layers 32."""
    parser.add_argument("--ratio-rows", type=int, default=10_000)
    parser.add_argument("--ratio-width", type=int, default=1024)
    parser.add_argument("--ratio-layers", type=int, default=4)
    parser.add_argument("--dimensions", type=int, default=9)
    parser.add_argument("--scratch", help="folder for the shards (default: a temporary one)")


def measure(arguments: Namespace) -> dict[str, Any]:
    """Seconds of every side at every layer, and their ratio."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        layers = list(_measured(Path(scratch), arguments))
    total = {side: sum(layer[side] for layer in layers) for side in SIDES}
    single = [layer["sklearn_loop"] / layer["streamed"] for layer in layers]
    return {
        "layers": layers,
        "seconds": total,
        "ridge_over_sklearn_loop": total["sklearn_loop"] / total["streamed"],
        "ratio_by_layer": {"median": statistics.median(single), "low": min(single), "high": max(single)},
        "over_sklearn_all_at_once": total["sklearn_all_at_once"] / total["streamed"],
        "largest_difference": max(layer["difference"] for layer in layers),
    }


def table(measured: dict[str, Any], arguments: Namespace) -> list[dict[str, Any]]:
    """One row a side."""
    rows = []
    for side in SIDES:
        by_layer = [layer[side] / layer["streamed"] for layer in measured["layers"]]
        rows.append(
            {
                "side": side,
                "seconds": measured["seconds"][side],
                "times streamed": measured["seconds"][side] / measured["seconds"]["streamed"],
                "lowest of a layer": min(by_layer),
                "highest": max(by_layer),
                "largest difference": measured["largest_difference"],
            }
        )
    return rows


def _measured(folder: Path, arguments: Namespace) -> Iterator[dict[str, float]]:
    """Seconds of every side at every layer, and the largest difference between their coefficients."""
    from sklearn.linear_model import Ridge

    rows, layers = arguments.ratio_rows, arguments.ratio_layers
    store, labels_BK = planted_store(folder, rows, arguments.ratio_width, layers, arguments.dimensions)

    def streamed(site: str, count: int) -> Any:
        return Factors(store.at([site]), range(count), labels_BK[:count]).solve(STRENGTH).weight_DK.T.numpy()

    def loop(site: str, count: int) -> Any:
        resid = gather(store.at([site]), range(count)).numpy()
        targets = labels_BK[:count].numpy().T
        return np.stack([Ridge(alpha=STRENGTH).fit(resid, target).coef_ for target in targets])

    def all_at_once(site: str, count: int) -> Any:
        resid = gather(store.at([site]), range(count)).numpy()
        return Ridge(alpha=STRENGTH).fit(resid, labels_BK[:count].numpy()).coef_

    sides = dict(zip(SIDES, (streamed, loop, all_at_once), strict=True))
    for fit in sides.values():  # libraries, threads and files are warm before anything counts
        fit(store.sites[0], min(rows, 2048))
    for site in store.sites:
        found, seconds = {}, {}
        for name, fit in sides.items():
            start = time.perf_counter()
            found[name] = fit(site, rows)
            seconds[name] = time.perf_counter() - start
        largest = np.abs(found["sklearn_loop"]).max()
        difference = max(float(np.abs(one - found["sklearn_loop"]).max() / largest) for one in found.values())
        if difference > TOLERANCE:
            raise SystemExit(f"coefficients differ by {difference:.2g} of the largest: nothing was compared")
        yield {**seconds, "difference": difference}


def planted_store(
    folder: Path, rows: int, width: int, layers: int, dimensions: int
) -> tuple[ActivationStore, torch.Tensor]:
    """Shards of random activations that carry the labels (B K), written a shard at a time."""
    draw = torch.Generator().manual_seed(0)
    sites = tuple(f"blocks.{layer}.output" for layer in range(layers))
    store = ActivationStore(folder, Origin(sites, "user", "benchmark", "benchmark"))
    directions_LKD = torch.randn(layers, dimensions, width, generator=draw) / width**0.5
    labels_BK = torch.rand(rows, dimensions, generator=draw)
    for start in range(0, rows, 1024):
        part_BK = labels_BK[start : start + 1024]
        pooled = [
            torch.randn(len(part_BK), width, generator=draw) + part_BK @ directions_KD
            for directions_KD in directions_LKD
        ]
        store.append(pooled, [f"{start + i:016x}" for i in range(len(part_BK))])
    return store, labels_BK.double()
