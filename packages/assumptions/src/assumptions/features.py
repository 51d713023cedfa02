"""Activations of chats, read at the block outputs on the very tokens that are steered later, and pooled over a span.

1. Render the chats (`rendering`) and sort them by length, so that batches carry little padding.
2. One forward pass a batch captures every site; capture and edit share their definition of a site (`shared.hooks`), so
   "block b" means the output of block b when reading and when writing.
3. Pool in float32 over a named span of real tokens; of one token, its mean is the token itself.
A chat longer than the model's context is an error, never cut silently. `store` does the same shard by shard, on disk.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from assumptions.chats import Chat
from assumptions.rendering import Form, Rendered, Span, prompt_of, render, rendering_hash
from assumptions.rows import InMemory, Rows, beside
from assumptions.splits import row_hash
from shared.errors import UserError
from shared.hooks import capture
from shared.models import Model

PaddingSide = Literal["left", "right"]
Progress = Callable[[list[list[int]]], Iterable[list[int]]]


@runtime_checkable
class ActivationSet(Protocol):
    """Pooled activations of chats at some sites, in memory (`Features`) or on disk (`store.ActivationStore`)."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Where the model was read."""
        ...

    @property
    def span(self) -> Span:
        """Which tokens were pooled."""
        ...

    @property
    def form(self) -> Form:
        """How the chats were rendered."""
        ...

    @property
    def row_hashes(self) -> tuple[str, ...]:
        """What each row was read from (`splits.row_hash`)."""
        ...

    @property
    def rendering(self) -> str:
        """Hash of the rendering of a fixed chat (`rendering.rendering_hash`)."""
        ...

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint."""
        ...

    def at(self, sites: Sequence[str]) -> Rows:
        """The rows at a site, or at several sites side by side."""
        ...


@dataclass(frozen=True)
class Features:
    """Pooled activations of B chats at L sites, with what they were read from."""

    sites: tuple[str, ...]
    pooled_LBD: Float[Tensor, "L B D"]
    span: Span
    row_hashes: tuple[str, ...]
    rendering: str
    fingerprint: str
    form: Form = "chat"

    def at(self, sites: Sequence[str]) -> Rows:
        """The rows at a site, or at several sites side by side."""
        return beside([InMemory(self.pooled_LBD[site_index(self.sites, site)]) for site in sites])

    def only(self, sites: Sequence[str]) -> "Features":
        """The same rows at some of the sites."""
        chosen = [site_index(self.sites, site) for site in sites]
        return replace(self, sites=tuple(sites), pooled_LBD=self.pooled_LBD[chosen])

    def rows(self, indices: Sequence[int]) -> "Features":
        """Some of the rows, in the order given."""
        hashes = tuple(self.row_hashes[i] for i in indices)
        return replace(self, pooled_LBD=self.pooled_LBD[:, list(indices)], row_hashes=hashes)


def site_index(sites: Sequence[str], site: str) -> int:
    """Place of a site among those read; UserError names them when it is not one."""
    if site not in sites:
        raise UserError(f"nothing was read at {site}; these features hold {', '.join(sites)}")
    return list(sites).index(site)


def block_outputs(model: Model) -> tuple[str, ...]:
    """The output of every block: where a direction can be read and added."""
    return tuple(f"blocks.{block}.output" for block in range(model.architecture.n_layers))


def capture_features(
    model: Model,
    chats: Sequence[Chat],
    span: Span = "user",
    sites: Sequence[str] | None = None,
    batch_size: int = 32,
    padding_side: PaddingSide = "left",
    form: Form = "chat",
    progress: Progress = iter,
) -> Features:
    """Pooled activations of chats at all block outputs (or the given sites), one forward pass a batch.

    Raises UserError when a chat does not fit the model's context or has no token in the span.
    """
    sites = tuple(sites) if sites is not None else block_outputs(model)
    rendered = render_all(model, chats, form)
    pooled_LBD = pool_chats(model, chats, rendered, span, sites, batch_size, padding_side, form, progress)
    hashes = tuple(row_hash(chat) for chat in chats)
    rendering = rendering_hash(model.tokenizer, form)
    return Features(sites, pooled_LBD, span, hashes, rendering, model.fingerprint, form)


def render_all(model: Model, chats: Sequence[Chat], form: Form) -> list[Rendered]:
    """Every chat's ids; UserError names the chats that do not fit the model's context."""
    rendered = [render(model.tokenizer, chat, form) for chat in chats]
    limit: Any = getattr(model.hf.config, "max_position_embeddings", None)
    long = [chat.id for chat, row in zip(chats, rendered, strict=True) if limit and len(row.ids) > limit]
    if long:
        raise UserError(
            f"{len(long)} of {len(chats)} chats exceed the model's {limit} tokens (first: {long[0]!r}); "
            "shorten or drop them, they are never cut silently"
        )
    return rendered


def pool_chats(
    model: Model,
    chats: Sequence[Chat],
    rendered: Sequence[Rendered],
    span: Span,
    sites: Sequence[str],
    batch_size: int = 32,
    padding_side: PaddingSide = "left",
    form: Form = "chat",
    progress: Progress = iter,
) -> Float[Tensor, "L B D"]:
    """Pooled activations of rendered chats at the sites, batched by length."""
    order = sorted(range(len(chats)), key=lambda i: len(rendered[i].ids))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    pooled = []
    for rows in progress(batches):
        batch = model.encode([prompt_of(chats[i], form) for i in rows], padding_side=padding_side)
        if batch.rows() != [rendered[i].ids for i in rows]:
            raise RuntimeError("the batch holds other ids than the rendering; spans would be misplaced")
        mask_BT = torch.zeros_like(batch.attention_mask_BT, dtype=torch.bool)
        for row, i in enumerate(rows):
            positions = rendered[i].positions(span, model.tokenizer.bos_token_id)
            if not len(positions):
                raise UserError(f"chat {chats[i].id!r} has no token in the span {span!r}")
            first = mask_BT.shape[1] - len(rendered[i].ids) if padding_side == "left" else 0
            mask_BT[row, first + positions.start : first + positions.stop] = True
        with torch.no_grad(), capture(model, list(sites)) as acts:
            model(batch)
        pooled.append(torch.stack([pool(acts[site], mask_BT.to(acts[site].device)).cpu() for site in sites]))
    return torch.cat(pooled, dim=1)[:, torch.tensor(order).argsort()]


def pool(resid_BTD: Float[Tensor, "B T D"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B D"]:
    """Mean over the masked tokens, in float32 whatever the model's dtype; padding never enters, not even as nan."""
    kept_BTD = torch.where(mask_BT.unsqueeze(-1), resid_BTD.float(), 0.0)
    return kept_BTD.sum(1) / mask_BT.sum(1, keepdim=True)


def save_features(path: Path, features: Features) -> None:
    """Write features to one safetensors file, what they were read from in its header."""
    header: dict[str, str] = {name: getattr(features, name) for name in _TEXTS}
    header |= {name: json.dumps(getattr(features, name)) for name in ("sites", "row_hashes")}
    save_file({"pooled_LBD": features.pooled_LBD.contiguous()}, path, metadata=header)


def load_features(path: Path) -> Features:
    """Read what `save_features` wrote."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        pooled_LBD = file.get_tensor("pooled_LBD")
    sites, hashes = (tuple(json.loads(header[name])) for name in ("sites", "row_hashes"))
    texts: dict[str, Any] = {name: header[name] for name in _TEXTS}
    return Features(sites=sites, pooled_LBD=pooled_LBD, row_hashes=hashes, **texts)


_TEXTS = ("span", "rendering", "fingerprint", "form")
