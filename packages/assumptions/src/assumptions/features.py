"""Activations of chats, read at the block outputs on the very tokens that are steered later, and pooled over a span.

1. Encode the chat through the model's template with the generation prompt: the ids a reply is generated from, so that
   probe and steering see the same rendering.
2. One forward pass captures every site; capture and edit share their definition of a site (`shared.hooks`), so
   "block b" means the output of block b when reading and when writing.
3. Pool in float32 over a named span of real tokens: `user`, the text of the last user message; `last`, the last prompt
   token; `prompt`, everything but a leading BOS.
A chat longer than the model's context is an error, never cut silently.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from assumptions.chats import Chat
from assumptions.splits import row_hash
from shared.errors import UserError
from shared.hooks import capture
from shared.models import Model
from shared.tokens import Encoded, encode_chat

Span = Literal["user", "last", "prompt"]


@dataclass(frozen=True)
class Features:
    """Pooled activations of B chats at L sites, with what they were read from."""

    sites: tuple[str, ...]
    pooled_LBD: Float[Tensor, "L B D"]
    span: Span
    row_hashes: tuple[str, ...]
    rendering: str  # hash of the template's rendering of a fixed chat
    fingerprint: str

    def only(self, sites: Sequence[str]) -> "Features":
        """The same rows at some of the sites."""
        return replace(
            self, sites=tuple(sites), pooled_LBD=self.pooled_LBD[[self.sites.index(site) for site in sites]]
        )

    def rows(self, indices: Sequence[int]) -> "Features":
        """Some of the rows, in the order given."""
        hashes = tuple(self.row_hashes[i] for i in indices)
        return replace(self, pooled_LBD=self.pooled_LBD[:, list(indices)], row_hashes=hashes)


def block_outputs(model: Model) -> tuple[str, ...]:
    """The output of every block: where a direction can be read and added."""
    return tuple(f"blocks.{block}.output" for block in range(model.architecture.n_layers))


def capture_features(
    model: Model,
    chats: Sequence[Chat],
    span: Span = "user",
    sites: Sequence[str] | None = None,
    batch_size: int = 32,
    padding_side: Literal["left", "right"] = "left",
) -> Features:
    """Pooled activations of chats at all block outputs (or the given sites), one forward pass a batch.

    Raises UserError when a chat does not fit the model's context or has no token in the span.
    """
    sites = tuple(sites) if sites is not None else block_outputs(model)
    encoded = [encode_chat(model.tokenizer, chat.messages, add_generation_prompt=True) for chat in chats]
    _check_lengths(model, chats, encoded)
    pooled = []
    for start in range(0, len(chats), batch_size):
        rows = slice(start, start + batch_size)
        pooled.append(_pool_batch(model, chats[rows], encoded[rows], span, sites, padding_side))
    hashes = tuple(row_hash(chat) for chat in chats)
    return Features(sites, torch.cat(pooled, dim=1), span, hashes, rendering_hash(model), model.fingerprint)


def save_features(path: Path, features: Features) -> None:
    """Write features to one safetensors file, what they were read from in its header."""
    header = {name: getattr(features, name) for name in ("span", "rendering", "fingerprint")}
    header |= {name: json.dumps(getattr(features, name)) for name in ("sites", "row_hashes")}
    save_file({"pooled_LBD": features.pooled_LBD.contiguous()}, path, metadata=header)


def load_features(path: Path) -> Features:
    """Read what `save_features` wrote."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        pooled_LBD = file.get_tensor("pooled_LBD")
    sites, hashes = (tuple(json.loads(header[name])) for name in ("sites", "row_hashes"))
    return Features(sites, pooled_LBD, header["span"], hashes, header["rendering"], header["fingerprint"])


def rendering_hash(model: Model) -> str:
    """16 hexadecimal digits that change with the chat template or the tokenizer."""
    ids = encode_chat(
        model.tokenizer, [{"role": "user", "content": "one, two"}], add_generation_prompt=True
    ).ids
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]


def span_positions(encoded: Encoded, span: Span, bos_token_id: int | None) -> range:
    """Positions of the span among a row's real tokens."""
    if span == "last":
        return range(len(encoded.ids) - 1, len(encoded.ids))
    if span == "prompt":
        return range(int(encoded.ids[0] == bos_token_id), len(encoded.ids))
    user = [one for one in encoded.spans if one.role == "user"]
    return range(user[-1].content_start, user[-1].content_end) if user else range(0)


def pool(resid_BTD: Float[Tensor, "B T D"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B D"]:
    """Mean over the masked tokens, in float32 whatever the model's dtype; padding never enters, not even as nan."""
    kept_BTD = torch.where(mask_BT.unsqueeze(-1), resid_BTD.float(), 0.0)
    return kept_BTD.sum(1) / mask_BT.sum(1, keepdim=True)


def _pool_batch(
    model: Model,
    chats: Sequence[Chat],
    encoded: Sequence[Encoded],
    span: Span,
    sites: Sequence[str],
    padding_side: Literal["left", "right"],
) -> Float[Tensor, "L B D"]:
    batch = model.encode([chat.messages for chat in chats], padding_side=padding_side)
    if batch.rows() != [row.ids for row in encoded]:
        raise RuntimeError("the batch encodes chats differently from encode_chat; spans would be misplaced")
    mask_BT = torch.zeros_like(batch.attention_mask_BT, dtype=torch.bool)
    for row, (chat, one) in enumerate(zip(chats, encoded, strict=True)):
        positions = span_positions(one, span, model.tokenizer.bos_token_id)
        if not len(positions):
            raise UserError(f"chat {chat.id!r} has no token in the span {span!r}")
        first = mask_BT.shape[1] - len(one.ids) if padding_side == "left" else 0
        mask_BT[row, first + positions.start : first + positions.stop] = True
    with torch.no_grad(), capture(model, list(sites)) as acts:
        model(batch)
    return torch.stack([pool(acts[site], mask_BT.to(acts[site].device)).cpu() for site in sites])


def _check_lengths(model: Model, chats: Sequence[Chat], encoded: Iterable[Encoded]) -> None:
    limit: Any = getattr(model.hf.config, "max_position_embeddings", None)
    long = [chat.id for chat, row in zip(chats, encoded, strict=True) if limit and len(row.ids) > limit]
    if long:
        raise UserError(
            f"{len(long)} of {len(chats)} chats exceed the model's {limit} tokens (first: {long[0]!r}); "
            "shorten or drop them, they are never cut silently"
        )
