"""THE definition of a prompt token and of a generated token, batches of tokens, and the masks of the phases.

A row has real tokens at positions t = 0, 1, ... (padding has none) and a prompt of n tokens (preft digest 1.2):

    prefill          t < n       the last prompt token, which yields the first generated one, included
    decode           t >= n      the exact complement
    decode_boundary  t >= n - 1
    all              every real token

n is a property of the request, never of a column, a chunk or a batch, so masks are the same under left and right
padding. Where documents are packed into one row, positions and n restart with every document. In a chat of several
turns `History` says what earlier assistant text counts as (preft digest 1.3): RECOMPUTE, all of it is prompt; STICKY,
tokens that were generated stay generated.

Shape letters: B batch, T token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from shared.chat import (
    ChatTemplateError,
    Encoded,
    Message,
    Span,
    TrainingRow,
    encode_chat,
    encode_text,
    training_row,
)
from shared.errors import UserError
from shared.history import History

__all__ = [
    "ChatTemplateError",
    "Encoded",
    "History",
    "Message",
    "Phase",
    "Span",
    "TokenBatch",
    "TrainingRow",
    "collate",
    "encode_chat",
    "encode_rows",
    "encode_text",
    "pack",
    "pad",
    "phase_mask",
    "training_row",
]


class Phase(StrEnum):
    """The tokens an edit or an adapter acts on."""

    PREFILL = "prefill"
    DECODE = "decode"
    DECODE_BOUNDARY = "decode_boundary"
    ALL = "all"


def phase_mask(
    phase: Phase | str,
    position_ids_BT: Int[Tensor, "B T"],
    prompt_lengths_B: Int[Tensor, " B"] | Int[Tensor, "B T"],
    attention_mask_BT: Int[Tensor, "B T"] | Bool[Tensor, "B T"],
    generated_BT: Bool[Tensor, "B T"] | None = None,
) -> Bool[Tensor, "B T"]:
    """True at the real tokens of a phase.

    `prompt_lengths` is one n a row, or one a token where documents are packed (each token's own document's n).
    `generated_BT` (STICKY chats) marks tokens with t < n that were generated in an earlier turn: they count as decode,
    and the token before each such stretch as a boundary.
    """
    phase = Phase(phase)
    real_BT = attention_mask_BT.bool()
    n_BT = prompt_lengths_B[:, None] if prompt_lengths_B.ndim == 1 else prompt_lengths_B
    decode_BT = position_ids_BT >= n_BT
    boundary_BT = position_ids_BT >= n_BT - 1
    if generated_BT is not None:
        decode_BT = decode_BT | generated_BT
        before_BT = torch.zeros_like(generated_BT)
        before_BT[:, :-1] = generated_BT[:, 1:] & (position_ids_BT[:, 1:] > 0)
        boundary_BT = boundary_BT | generated_BT | before_BT
    chosen = {
        Phase.PREFILL: ~decode_BT,
        Phase.DECODE: decode_BT,
        Phase.DECODE_BOUNDARY: boundary_BT,
        Phase.ALL: real_BT,
    }
    return chosen[phase] & real_BT


@dataclass(frozen=True)
class TokenBatch:
    """Padded rows of token ids; positions count real tokens only (0 at padding).

    `prompt_lengths_B` is n of each row (packed: of its first document). Packed rows also have `document_ids_BT`
    (0, 1, ... within the row, -1 at padding) and `token_prompt_lengths_BT`. STICKY chats have `generated_BT`.
    `labels_BT` is -100 where there is no loss.
    """

    input_ids_BT: Int[Tensor, "B T"]
    attention_mask_BT: Int[Tensor, "B T"]
    position_ids_BT: Int[Tensor, "B T"]
    prompt_lengths_B: Int[Tensor, " B"]
    document_ids_BT: Int[Tensor, "B T"] | None = None
    token_prompt_lengths_BT: Int[Tensor, "B T"] | None = None
    generated_BT: Bool[Tensor, "B T"] | None = None
    labels_BT: Int[Tensor, "B T"] | None = None

    def __len__(self) -> int:
        return self.input_ids_BT.shape[0]

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents."""
        return self.document_ids_BT is not None

    @property
    def lengths_B(self) -> Int[Tensor, " B"]:
        """Number of real tokens of each row."""
        return self.attention_mask_BT.sum(1)

    @property
    def last_columns_B(self) -> Int[Tensor, " B"]:
        """Column of each row's last real token, whichever side is padded."""
        columns_T = torch.arange(self.input_ids_BT.shape[1], device=self.input_ids_BT.device)
        return torch.where(self.attention_mask_BT.bool(), columns_T, -1).amax(1)

    def phase_mask(self, phase: Phase | str) -> Bool[Tensor, "B T"]:
        """True at the real tokens of a phase (`phase_mask`)."""
        n = self.prompt_lengths_B if self.token_prompt_lengths_BT is None else self.token_prompt_lengths_BT
        return phase_mask(phase, self.position_ids_BT, n, self.attention_mask_BT, self.generated_BT)

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        moved = {key: value.to(device) for key, value in vars(self).items() if value is not None}
        return replace(self, **moved)

    def rows(self) -> list[list[int]]:
        """The real token ids of each row."""
        pairs = zip(self.input_ids_BT.tolist(), self.attention_mask_BT.tolist())
        return [[token for token, real in zip(ids, mask) if real] for ids, mask in pairs]


def pad(
    rows: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    pad_id: int,
    padding_side: str = "left",
    labels: Sequence[Sequence[int]] | None = None,
    generated: Sequence[Sequence[bool]] | None = None,
) -> TokenBatch:
    """Rows of ids to a batch, padded on one side; `labels` and `generated` are aligned with the rows."""
    _check_rows(rows, prompt_lengths, padding_side)
    width = max(len(row) for row in rows)

    def fill(values: Sequence[Sequence[Any]], empty: Any, dtype: torch.dtype = torch.long) -> Tensor:
        filled = []
        for row in values:
            gap = [empty] * (width - len(row))
            filled.append([*gap, *row] if padding_side == "left" else [*row, *gap])
        return torch.tensor(filled, dtype=dtype)

    return TokenBatch(
        input_ids_BT=fill(rows, pad_id),
        attention_mask_BT=fill([[1] * len(row) for row in rows], 0),
        position_ids_BT=fill([range(len(row)) for row in rows], 0),
        prompt_lengths_B=torch.tensor(list(prompt_lengths), dtype=torch.long),
        labels_BT=None if labels is None else fill(labels, -100),
        generated_BT=None if generated is None else fill(generated, False, torch.bool),
    )


def collate(rows: Sequence[TrainingRow], pad_id: int, padding_side: str = "right") -> TokenBatch:
    """Training rows to a batch with labels; earlier generated turns are kept where the rows are STICKY."""
    generated = [row.generated for row in rows] if any(any(row.generated) for row in rows) else None
    return pad(
        [row.input_ids for row in rows],
        [row.prompt_length for row in rows],
        pad_id,
        padding_side,
        [row.labels for row in rows],
        generated,
    )


def pack(rows: Sequence[TrainingRow], pad_id: int, max_length: int) -> TokenBatch:
    """Training rows packed first-fit into rows of at most `max_length` tokens, padded on the right.

    Attention stays within each document: the model is called without a padding mask and with restarting positions,
    from which transformers derives the documents. `UserError` when one document is longer than `max_length`.
    """
    if not rows:
        raise UserError("There is nothing to pack: the list of rows is empty.")
    longest = max(len(row.input_ids) for row in rows)
    if longest > max_length:
        raise UserError(
            f"A row of {longest} tokens does not fit: raise max_length ({max_length}) or truncate."
        )
    bins: list[list[TrainingRow]] = []
    for row in rows:
        for content in bins:
            if sum(len(other.input_ids) for other in content) + len(row.input_ids) <= max_length:
                content.append(row)
                break
        else:
            bins.append([row])

    def join(values: str) -> list[list[Any]]:
        return [[value for row in content for value in getattr(row, values)] for content in bins]

    def repeat(value_of: Any) -> list[list[int]]:
        return [[v for i, row in enumerate(c) for v in value_of(i, row)] for c in bins]

    ids, generated = join("input_ids"), join("generated")
    batch = pad(ids, [c[0].prompt_length for c in bins], pad_id, "right", join("labels"), generated)
    width = batch.input_ids_BT.shape[1]

    def fill(values: list[list[int]], empty: int) -> Tensor:
        return torch.tensor([row + [empty] * (width - len(row)) for row in values])

    return replace(
        batch,
        position_ids_BT=fill(repeat(lambda i, row: range(len(row.input_ids))), 0),
        document_ids_BT=fill(repeat(lambda i, row: [i] * len(row.input_ids)), -1),
        token_prompt_lengths_BT=fill(repeat(lambda i, row: [row.prompt_length] * len(row.input_ids)), 0),
        generated_BT=batch.generated_BT if any(map(any, generated)) else None,
    )


def encode_rows(
    tokenizer: Any,
    rows: Sequence[str | list[Message]],
    padding_side: str = "left",
    history: History = History.RECOMPUTE,
) -> TokenBatch:
    """Texts and chats to a batch: of a text every token is prompt, of a chat all up to the last assistant content.

    A chat that does not end with an assistant message gets the template's generation prompt.
    """
    if isinstance(rows, str) or (rows and isinstance(rows[0], dict)):
        raise UserError("encode takes a list of rows (each a text or a list of messages), not a single row.")
    encoded = [_encode_row(tokenizer, row, history) for row in rows]
    generated = [g for _, _, g in encoded]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return pad(
        [ids for ids, _, _ in encoded],
        [n for _, n, _ in encoded],
        pad_id or 0,
        padding_side,
        generated=generated if any(map(any, generated)) else None,
    )


def _encode_row(
    tokenizer: Any, row: str | list[Message], history: History
) -> tuple[list[int], int, list[bool]]:
    if isinstance(row, str):
        ids = encode_text(tokenizer, row)
        return ids, len(ids), [False] * len(ids)
    answered = row[-1]["role"] == "assistant" if row else False
    encoded = encode_chat(tokenizer, row, add_generation_prompt=not answered)
    n = encoded.spans[-1].content_start if answered else len(encoded.ids)
    return encoded.ids, n, encoded.generated(history)


def _check_rows(rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int], padding_side: str) -> None:
    if padding_side not in ("left", "right"):
        raise UserError(f"padding_side must be 'left' or 'right', not {padding_side!r}.")
    if not rows:
        raise UserError("A batch needs at least one row.")
    if len(rows) != len(prompt_lengths):
        raise UserError(f"{len(rows)} rows but {len(prompt_lengths)} prompt lengths.")
    for index, (row, n) in enumerate(zip(rows, prompt_lengths)):
        if not row:
            raise UserError(f"Row {index} is empty: give it at least one token.")
        if not 0 <= n <= len(row):
            raise UserError(f"Row {index}: prompt length {n} is not within its {len(row)} tokens.")
