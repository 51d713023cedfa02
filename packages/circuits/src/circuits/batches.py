"""Scores of many prompts: in batches, over several processes, and resumed where they stopped.

1. Prompts are ordered by length and cut into batches, the same way in every process.
2. Process r of w (RANK and WORLD_SIZE of torchrun and accelerate, or given) takes batches r, r + w, ...; each batch is
   one file, whole or absent, so that a run that stopped goes on with what is missing.
3. `read_scores` merges the files of all processes, padding cut off, in the order of the prompts.

The folder states what its files were made from; another model, estimator or list of prompts is refused.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution import Settings, attribute, pose
from circuits.memory import require_memory
from circuits.problem import MakeMetric
from circuits.relp import relp
from shared.errors import UserError
from shared.runs import config_hash
from shared.serialize import atomic_path, read_json, write_json

if TYPE_CHECKING:
    from shared.models import Model
    from shared.tokens import TokenBatch

HEADER = "scores.json"
MetricOf = Callable[[Sequence[int]], MakeMetric]


@dataclass(frozen=True)
class Share:
    """Which process this is, of how many."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UserError(f"rank {self.rank} is not below the number of processes, {self.world}")

    @classmethod
    def from_environment(cls) -> "Share":
        """Return what torchrun or accelerate set for this process; one process where they set nothing."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@dataclass(frozen=True)
class ScoresHeader:
    """What the files of a folder were made from."""

    model: str
    prompts: str
    n_prompts: int
    metric: str
    estimator: str
    basis: str
    batch_size: int
    settings: dict[str, int]


@dataclass(frozen=True)
class PromptScores:
    """One prompt's scores, its targets' values and the worst conservation error of its batch."""

    prompt: int
    scores_KLTN: Float[Tensor, "K L T N"]
    value_K: Float[Tensor, " K"]
    conservation_error: float


def score_prompts(
    folder: Path | str,
    model: "Model",
    prompts: Sequence[Any],
    metric_of: MetricOf,
    metric_name: str,
    estimator: str = "relp",
    *,
    basis: str = "neurons",
    batch_size: int = 8,
    share: Share | None = None,
    settings: Settings | None = None,
    memory_limit: int | None = None,
) -> Path:
    """Score every prompt against zero references into the folder, the batches of this process that are not there yet.

    `metric_of(indices)` gives the metric of the prompts with these indices, `metric_name` identifies it in the header.
    Memory is estimated before each batch (NotEnoughMemoryError above `memory_limit` bytes).
    """
    folder, share, settings = Path(folder), share or Share.from_environment(), settings or Settings()
    _claim(folder, _header(model, prompts, metric_name, estimator, basis, batch_size, settings))
    mine = list(enumerate(_batches(model, prompts, batch_size)))[share.rank :: share.world]
    missing = [(number, rows) for number, rows in mine if not _part(folder, number).exists()]
    for number, rows in _progress(settings, missing):
        batch = model.encode([prompts[i] for i in rows])
        n_targets = _count_targets(model, batch, metric_of(rows))
        require_memory(model, batch, memory_limit, estimator, basis, n_targets)
        problem = pose(model, batch, metric_of(rows), basis=basis)
        scores_BKLTN = attribute(problem, estimator, settings=settings)
        ledger = relp(problem.network, problem.metric).ledger
        tensors = {"value_BK": ledger.value_BK, "real_BT": problem.network.real_BT, "scores": scores_BKLTN}
        _save(_part(folder, number), tensors, rows, ledger.error())
    return folder


def missing_batches(folder: Path | str) -> list[int]:
    """Return the numbers of the batches that no process has written yet."""
    return _missing(Path(folder))[0]


def read_scores(folder: Path | str) -> list[PromptScores]:
    """Return all prompts' scores in order, padding cut off; UserError names the batches that are missing."""
    return sorted(each_score(folder), key=lambda one: one.prompt)


def each_score(folder: Path | str) -> Iterator[PromptScores]:
    """Yield the same one batch's file at a time, in the order of the files: of a large model, all do not fit."""
    folder = Path(folder)
    missing, numbers = _missing(folder)
    if missing:
        raise UserError(f"{folder}: batches {missing} of {len(numbers)} are missing; run score_prompts again")
    for number in numbers:
        yield from _load(_part(folder, number))


def _missing(folder: Path) -> tuple[list[int], range]:
    if not (folder / HEADER).is_file():
        raise UserError(
            f"{folder} holds no {HEADER}: it is no folder of scores (circuits.batches.score_prompts)"
        )
    header = read_json(folder / HEADER)
    numbers = range(-(-header["n_prompts"] // header["batch_size"]))
    return [number for number in numbers if not _part(folder, number).exists()], numbers


def _count_targets(model: "Model", batch: "TokenBatch", make_metric: MakeMetric) -> int:
    """Return how many targets a metric has on a batch, from logits that are all equal and take no memory."""
    shape = (*batch.input_ids_BT.shape, model.architecture.vocab_size)
    logits_BTV = torch.zeros((), dtype=model.dtype, device=model.device).expand(shape)
    return make_metric(logits_BTV, batch.last_columns_B).positions_BK.shape[1]


def _header(
    model: "Model",
    prompts: Sequence[Any],
    metric: str,
    estimator: str,
    basis: str,
    size: int,
    settings: Settings,
) -> ScoresHeader:
    numbers = {name: getattr(settings, name) for name in ("seed", "steps", "chunk")}
    hashed = config_hash(list(prompts))
    return ScoresHeader(model.fingerprint, hashed, len(prompts), metric, estimator, basis, size, numbers)


def _claim(folder: Path, header: ScoresHeader) -> None:
    path = folder / HEADER
    if not path.is_file():
        write_json(path, asdict(header))
    found, wanted = read_json(path), asdict(header)
    other = [name for name in wanted if found.get(name) != wanted[name]]
    if other:
        raise UserError(
            f"{folder} holds scores of another {', '.join(other)}: give another folder, or delete it"
        )


def _batches(model: "Model", prompts: Sequence[Any], size: int) -> list[list[int]]:
    lengths = [model.encode([prompt]).input_ids_BT.shape[1] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (lengths[i], i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _progress(settings: Settings, items: list[Any]) -> Iterable[Any]:
    return settings.progress(items, "batches of prompts")


def _part(folder: Path, number: int) -> Path:
    return folder / f"scores-{number:05d}.safetensors"


def _save(path: Path, tensors: dict[str, Tensor], rows: list[int], error: float) -> None:
    from safetensors.torch import save_file

    metadata = {"rows": " ".join(map(str, rows)), "conservation_error": repr(error)}
    with atomic_path(path) as partial:
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, partial, metadata)


def _load(path: Path) -> Iterator[PromptScores]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        scores_BKLTN, value_BK, real_BT = (
            file.get_tensor(name) for name in ("scores", "value_BK", "real_BT")
        )
    for row, prompt in enumerate(map(int, metadata["rows"].split())):
        kept_KLTN = scores_BKLTN[row]
        if kept_KLTN.shape[2] == real_BT.shape[1]:
            kept_KLTN = kept_KLTN[:, :, real_BT[row]]
        yield PromptScores(prompt, kept_KLTN, value_BK[row], float(metadata["conservation_error"]))
