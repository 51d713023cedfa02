"""One layer's attention with its pattern frozen, rebuilt from queries and keys a few rows at a time.

A pattern takes H T^2 numbers and is needed twice (check, sweep); queries and keys take H d T. So nothing is stored but
these, and products with the pattern and with its transpose walk over blocks of query rows:

    mix            y_q = sum_t A_qt v_t            transpose      h_t = sum_q A_qt g_q

Row q sees the keys from q - window + 1 (0 without a window) to q only, so that a block of rows takes no more columns
than it needs, and memory grows as O(T) (digest 3.5). Query heads that share a key/value head are rows of one product.

Shape letters: B batch, K targets, T token, Q query rows of a block, S keys they see, G key/value heads, R query heads a
group, H = G R, d head width, X = G d, Y = H d.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ROWS = (
    256  # query rows a block: long enough for full speed, short enough for the triangle above to be skipped
)


Columns = slice | Int[Tensor, " S"]  # a slice gives views, increasing indices copies


@dataclass(frozen=True)
class FrozenAttention:
    """What rebuilds one layer's pattern: rotated queries and keys, scale, soft cap, window, and the real tokens.

    Columns are in causal order; a query row sees real tokens at or before it, `window` of them at most.
    """

    query_BHTd: Float[Tensor, "B H T d"]
    key_BGTd: Float[Tensor, "B G T d"]
    scaling: float
    soft_cap: float | None
    window: int | None
    real_BT: Bool[Tensor, "B T"]
    softmax_dtype: torch.dtype
    held_BGRTT: Float[Tensor, "B G R T T"] | None = None

    @property
    def groups(self) -> int:
        """Query heads a key/value head."""
        return self.query_BHTd.shape[1] // self.key_BGTd.shape[1]

    def select(self, rows: slice, keep: Columns) -> "FrozenAttention":
        """Return the attention of some examples with only the columns `keep` (their real ones)."""
        held_BGRTT = self.held_BGRTT
        return replace(
            self,
            query_BHTd=self.query_BHTd[rows][:, :, keep],
            key_BGTd=self.key_BGTd[rows][:, :, keep],
            real_BT=self.real_BT[rows][:, keep],
            held_BGRTT=None if held_BGRTT is None else held_BGRTT[rows][:, :, :, keep][..., keep],
        )

    def hold(self) -> "FrozenAttention":
        """Return the same with its pattern held, for many uses of a short prompt (a long one is always rebuilt)."""
        if self.query_BHTd.shape[2] > ROWS:
            return self
        rows_Q = torch.arange(self.query_BHTd.shape[2], device=self.query_BHTd.device)
        return replace(self, held_BGRTT=self._pattern(rows_Q)[1].unflatten(2, (self.groups, -1)))

    def pattern(self, start: int = 0, stop: int | None = None) -> Float[Tensor, "B H Q T"]:
        """Return the pattern of query rows start to stop over all keys; rows that may see nothing are zero."""
        n_keys = self.query_BHTd.shape[2]
        rows_Q = torch.arange(n_keys, device=self.query_BHTd.device)[start:stop]
        first, pattern_BGPS = self._pattern(rows_Q)
        shape = (*self.query_BHTd.shape[:2], len(rows_Q), n_keys)
        pattern_BHQT = pattern_BGPS.new_zeros(shape)
        seen = slice(first, first + pattern_BGPS.shape[-1])
        pattern_BHQT[..., seen] = pattern_BGPS.unflatten(2, (self.groups, -1)).flatten(1, 2)
        return pattern_BHQT

    def mix(
        self, value_BKTX: Float[Tensor, "B K T X"], rows_Q: Int[Tensor, " Q"] | None = None
    ) -> Float[Tensor, "B K Q Y"]:
        """Apply the pattern to values, at the given query rows (increasing; all of them without)."""
        n_groups, n_targets = self.key_BGTd.shape[1], value_BKTX.shape[1]
        value_BGTZ = value_BKTX.unflatten(-1, (n_groups, -1)).permute(0, 3, 2, 1, 4).flatten(-2)
        parts = []
        for rows in self._blocks(rows_Q):
            first, pattern_BGPS = self._pattern(rows)
            part_BGPZ = pattern_BGPS @ value_BGTZ[:, :, first : first + pattern_BGPS.shape[-1]]
            part = part_BGPZ.unflatten(2, (self.groups, -1)).unflatten(-1, (n_targets, -1))
            parts.append(part.permute(0, 4, 3, 1, 2, 5).flatten(3))
        return torch.cat(parts, dim=2)

    def mix_transpose(self, g_BKTY: Float[Tensor, "B K T Y"], block: int = ROWS) -> Float[Tensor, "B K T X"]:
        """Pull a cotangent on the heads back to the values, rebuilding the pattern `block` query rows at a time."""
        n_groups, n_targets = self.key_BGTd.shape[1], g_BKTY.shape[1]
        g_BGRTKd = g_BKTY.unflatten(-1, (n_groups, self.groups, -1)).permute(0, 3, 4, 2, 1, 5)
        parts = self._blocks(None, block)
        if len(parts) == 1:
            total_BGTZ = self._pull(g_BGRTKd, parts[0])[1]
        else:
            n_batch, _, _, n_keys, _, width = g_BGRTKd.shape
            total_BGTZ = g_BKTY.new_zeros(n_batch, n_groups, n_keys, n_targets * width)
            for rows in parts:
                first, part_BGSZ = self._pull(g_BGRTKd, rows)
                total_BGTZ[:, :, first : first + part_BGSZ.shape[2]] += part_BGSZ
        return total_BGTZ.unflatten(-1, (n_targets, -1)).permute(0, 3, 2, 1, 4).flatten(-2)

    def _pull(self, g_BGRTKd: Tensor, rows_Q: Tensor) -> tuple[int, Float[Tensor, "B G S Z"]]:
        """Return the first key that a block of consecutive rows sees, and what reaches the keys from these rows."""
        first, pattern_BGPS = self._pattern(rows_Q)
        part_BGPZ = g_BGRTKd[:, :, :, rows_Q[0] : rows_Q[-1] + 1].flatten(2, 3).flatten(-2)
        return first, pattern_BGPS.transpose(-1, -2) @ part_BGPZ

    def scores(self, rows_Q: Int[Tensor, " Q"]) -> tuple[int, Float[Tensor, "B G P S"]]:
        """Return the first key that the rows see and their scores before the softmax, -inf where they may not look.

        P = R Q: the query heads of a group one after the other.
        """
        first, stop = self._span(rows_Q)
        query_BGPd = self.query_BHTd[:, :, rows_Q].unflatten(1, (-1, self.groups)).flatten(2, 3)
        score_BGPS = query_BGPd @ self.key_BGTd[:, :, first:stop].transpose(-1, -2) * self.scaling
        if self.soft_cap is not None:
            score_BGPS = self.soft_cap * torch.tanh(score_BGPS / self.soft_cap)
        blocked = ~self._allowed(rows_Q, first, stop).repeat(1, 1, self.groups, 1)
        return first, score_BGPS.masked_fill_(blocked, -torch.inf)

    def _pattern(self, rows_Q: Tensor) -> tuple[int, Float[Tensor, "B G P S"]]:
        if self.held_BGRTT is not None:
            if len(rows_Q) == self.held_BGRTT.shape[3]:
                return 0, self.held_BGRTT.flatten(2, 3)
            return 0, self.held_BGRTT[:, :, :, rows_Q, : int(rows_Q[-1]) + 1].flatten(2, 3)
        first, score_BGPS = self.scores(rows_Q)
        pattern_BGPS = score_BGPS.softmax(-1, self.softmax_dtype).to(score_BGPS.dtype)
        if not self.real_BT.all():  # a row of padding that sees nothing
            pattern_BGPS = pattern_BGPS.nan_to_num(nan=0.0)
        return first, pattern_BGPS

    def _span(self, rows_Q: Tensor) -> tuple[int, int]:
        first = 0 if self.window is None else max(0, int(rows_Q[0]) - self.window + 1)
        return first, int(rows_Q[-1]) + 1

    def _allowed(self, rows_Q: Tensor, first: int, stop: int) -> Bool[Tensor, "B 1 Q S"]:
        """Causal, within the sliding window, between real tokens."""
        keys_S = torch.arange(first, stop, device=rows_Q.device)
        distance_QS = rows_Q[:, None] - keys_S
        allowed_QS = distance_QS >= 0
        if self.window is not None:
            allowed_QS &= distance_QS < self.window
        real_BT = self.real_BT
        return (allowed_QS & real_BT[:, rows_Q, None] & real_BT[:, None, first:stop])[:, None]

    def _blocks(self, rows_Q: Tensor | None, block: int = ROWS) -> list[Tensor]:
        if rows_Q is None:
            rows_Q = torch.arange(self.query_BHTd.shape[2], device=self.query_BHTd.device)
        return list(rows_Q.split(block))
