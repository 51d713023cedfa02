"""Activations of more chats than memory holds: a folder of safetensors shards, appended to and read in chunks.

    manifest.json              format, sites, span, form, rendering, fingerprint, dtype: what every shard holds
    rows-000000000.safetensors one tensor (B D) a site; the header names its rows (`splits.row_hash`)
    rows-000001024.safetensors ...

A shard is written whole or not at all, and never again, so a capture that was killed goes on after its last shard. The
folder knows what it was read from: another model, template, span or order of chats is refused. Reading a site touches
that site's part of each shard alone, one shard at a time.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from assumptions.chats import Chat
from assumptions.features import Progress, block_outputs, pool_chats, render_all, site_index
from assumptions.rendering import Form, Span, rendering_hash
from assumptions.rows import Rows, beside
from assumptions.splits import row_hash
from shared.errors import UserError
from shared.models import Model
from shared.serialize import atomic_path, read_json, write_json

FORMAT = 1
SHARD_ROWS = 1024
DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Origin:
    """What the activations of a store were read from, and how they are kept."""

    sites: tuple[str, ...]
    span: Span
    rendering: str
    fingerprint: str
    form: Form = "chat"
    dtype: DType = "float32"


class Shard(NamedTuple):
    """One file, the row it begins with and the hashes of its rows."""

    path: Path
    first: int
    row_hashes: tuple[str, ...]


class ActivationStore:
    """An open store; like `Features`, it is an `ActivationSet` that probes are fitted and evaluated on."""

    def __init__(self, folder: Path | str, origin: Origin | None = None) -> None:
        """Open a folder, or begin one with `origin`; UserError when it holds activations of another origin."""
        self.folder = Path(folder)
        manifest = self.folder / "manifest.json"
        if origin is None and not manifest.exists():
            raise UserError(f"{self.folder} holds no activations: give a folder written by capture_to_store")
        if origin is not None and not manifest.exists():
            write_json(manifest, {"format": FORMAT, **vars(origin)})
        self.origin = _read_origin(manifest)
        if origin is not None and origin != self.origin:
            mine, theirs = vars(self.origin), vars(origin)
            name = next(name for name in mine if mine[name] != theirs[name])
            raise UserError(
                f"{self.folder} holds activations with {name} {mine[name]!r}, asked for {theirs[name]!r}: "
                "take another folder"
            )

    sites = property(lambda self: self.origin.sites)
    span = property(lambda self: self.origin.span)
    form = property(lambda self: self.origin.form)
    rendering = property(lambda self: self.origin.rendering)
    fingerprint = property(lambda self: self.origin.fingerprint)

    @cached_property
    def shards(self) -> list[Shard]:
        """The shards in order; UserError when one is missing or damaged."""
        shards: list[Shard] = []
        rows = 0
        for path in sorted(self.folder.glob("rows-*.safetensors")):
            if int(path.stem.removeprefix("rows-")) != rows:
                raise UserError(
                    f"{self.folder}: the shard with row {rows} is missing; capture the chats anew"
                )
            try:
                with safe_open(path, framework="pt") as file:
                    hashes = tuple(json.loads(file.metadata()["row_hashes"]))
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path} is damaged ({error}); remove it and those after it, then go on"
                ) from error
            shards.append(Shard(path, rows, hashes))
            rows += len(hashes)
        return shards

    @cached_property
    def row_hashes(self) -> tuple[str, ...]:
        """What each row was read from."""
        return tuple(name for shard in self.shards for name in shard.row_hashes)

    def __len__(self) -> int:
        return len(self.row_hashes)

    def append(self, pooled_LBD: Sequence[Float[Tensor, "B D"]], row_hashes: Sequence[str]) -> None:
        """Add one shard of rows: a matrix (B D) a site, in the order of `sites`."""
        if len(pooled_LBD) != len(self.sites) or {len(one) for one in pooled_LBD} != {len(row_hashes)}:
            raise ValueError(f"a shard holds {len(row_hashes)} rows at each of {len(self.sites)} sites")
        dtype = getattr(torch, self.origin.dtype)
        tensors = {
            site: one_BD.to(dtype).contiguous() for site, one_BD in zip(self.sites, pooled_LBD, strict=True)
        }
        first = len(self)
        path = self.folder / f"rows-{first:09}.safetensors"
        with atomic_path(path) as partial:
            save_file(tensors, partial, metadata={"row_hashes": json.dumps(list(row_hashes))})
        self.shards.append(Shard(path, first, tuple(row_hashes)))
        self.__dict__.pop("row_hashes")

    def at(self, sites: Sequence[str]) -> Rows:
        """The rows at a site, or at several sites side by side."""
        return beside([Stored(self, self.sites[site_index(self.sites, site)]) for site in sites])


@dataclass(frozen=True)
class Stored:
    """The rows of a store at one site."""

    store: ActivationStore
    site: str

    @property
    def width(self) -> int:
        """D, the number of columns."""
        with safe_open(self.store.shards[0].path, framework="pt") as file:
            return int(file.get_slice(self.site).get_shape()[1])

    def chunks(self, rows: Sequence[int]) -> Iterator[Float[Tensor, "B D"]]:
        """Yield the given rows, ascending, a shard at a time; ValueError when they are not ascending."""
        wanted = torch.tensor(list(rows), dtype=torch.long)
        if len(wanted) > 1 and not (wanted.diff() > 0).all():
            raise ValueError("rows of a store are read in ascending order")
        if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < len(self.store):
            raise IndexError(f"rows {int(wanted[0])} to {int(wanted[-1])} of a store of {len(self.store)}")
        for shard in self.store.shards:
            first, last = torch.searchsorted(
                wanted, torch.tensor([shard.first, shard.first + len(shard.row_hashes)])
            ).tolist()
            if last > first:
                with safe_open(shard.path, framework="pt") as file:
                    yield file.get_tensor(self.site)[wanted[first:last] - shard.first]


def capture_to_store(
    folder: Path | str,
    model: Model,
    chats: Sequence[Chat],
    span: Span = "user",
    sites: Sequence[str] | None = None,
    batch_size: int = 32,
    form: Form = "chat",
    dtype: DType = "float32",
    shard_rows: int = SHARD_ROWS,
    progress: Progress = iter,
) -> ActivationStore:
    """Capture pooled activations shard by shard; rows that the folder holds already are not read again.

    The chats must begin with those of the folder, in their order; more may follow. Raises UserError before anything is
    read when they do not, when a chat does not fit the model's context, or when the folder is of another origin.
    """
    rendering = rendering_hash(model.tokenizer, form)
    read = tuple(sites) if sites is not None else block_outputs(model)
    store = ActivationStore(folder, Origin(read, span, rendering, model.fingerprint, form, dtype))
    hashes = [row_hash(chat) for chat in chats]
    held = len(store)
    if tuple(hashes[:held]) != store.row_hashes:
        raise UserError(f"{store.folder} holds other chats, or in another order: take another folder")
    rendered = render_all(model, chats, form)
    starts = [list(range(i, min(i + shard_rows, len(chats)))) for i in range(held, len(chats), shard_rows)]
    for rows in progress(starts):
        part = slice(rows[0], rows[-1] + 1)
        pooled_LBD = pool_chats(model, chats[part], rendered[part], span, read, batch_size, form=form)
        store.append(list(pooled_LBD), hashes[part])
    return store


def _read_origin(manifest: Path) -> Origin:
    fields: dict[str, Any] = read_json(manifest)
    version = fields.pop("format")
    if version != FORMAT:
        raise UserError(
            f"{manifest} has format {version}, this version reads {FORMAT}: capture the chats anew"
        )
    return Origin(**{**fields, "sites": tuple(fields["sites"])})
