"""What attention keeps between the steps of generation: keys and values, preallocated, for rows of different length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["KVCache", "LayerCache", "MemoryCache"]


class KVCache:
    """Keys and values of every layer of a decoder.

    Row b holds its tokens in columns 0 to lengths[b] - 1, whatever the length of the others; what lies behind is never
    read. So a batch of prompts is padded on the right and prefilled by one causal forward pass, and a step appends one
    token to each row. The tokens of a forward pass count once `advance` is called behind its last layer.

    Args:
        layers: how many `LayerCache`s there are, in ``layers``.
        capacity: the most tokens of a row; memory for them is taken when the first arrive.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: got {capacity}; allowed: 1 and more")
        self.capacity = capacity
        self.lengths: Tensor | None = None  # (rows,), int64 on the device
        self.longest, self.ragged = 0, False
        self.layers = [LayerCache(self) for _ in range(layers)]

    def positions(self, rows: int, tokens: int, device: torch.device) -> Tensor:
        """(rows, tokens) int64: where the next tokens of each row stand."""
        ahead = torch.arange(tokens, device=device)
        return ahead.expand(rows, tokens) if self.lengths is None else self.lengths[:, None] + ahead

    def advance(self, tokens: int | Sequence[int], rows: int, device: torch.device) -> None:
        """Count the tokens that the last forward pass appended: as many for all rows, or for each."""
        if self.lengths is None:
            self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        if isinstance(tokens, int):
            self.lengths += tokens
            self.longest += tokens
        else:
            self.ragged = min(tokens) != max(tokens)
            self.lengths += torch.tensor(tokens, device=device)
            self.longest += max(tokens)

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was, of all layers; fewer or more rows than before may come out.

        Afterwards `longest` may be an upper bound only.
        """
        if self.lengths is not None:
            self.lengths = self.lengths[rows]
        for layer in self.layers:
            layer.reorder(rows)


class LayerCache:
    """One layer's part: k, v (rows, capacity, kv_heads, head_dim), what is written beyond `lengths` being of no account."""

    def __init__(self, whole: KVCache) -> None:
        self.whole = whole
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Append k and v, (rows, tokens, kv_heads, head_dim); all keys and values, and attention's options for them."""
        whole, tokens = self.whole, k.shape[1]
        first, last = whole.longest, whole.longest + tokens
        if last > whole.capacity:
            raise ValueError(f"cache: got {last} tokens in a row; allowed: its capacity, {whole.capacity}")
        if self.k is None or self.v is None:
            self.k, self.v = (t.new_empty((t.shape[0], whole.capacity, *t.shape[2:])) for t in (k, v))
        if not whole.ragged:
            self.k[:, first:last], self.v[:, first:last] = k, v
            return self.k[:, :last], self.v[:, :last], options
        if tokens != 1 or options.get("relative_bias") is not None or whole.lengths is None:
            given = f"{tokens} tokens at once" if tokens != 1 else "relative_bias"
            raise ValueError(f"cache: got {given} for rows of different length; allowed: one token, no relative_bias")
        rows = torch.arange(k.shape[0], device=k.device)
        self.k[rows, whole.lengths], self.v[rows, whole.lengths] = k[:, 0], v[:, 0]
        return self.k[:, :last], self.v[:, :last], options | {"key_lengths": whole.lengths + 1}

    def reorder(self, rows: Tensor) -> None:
        """See KVCache.reorder."""
        self.k, self.v = (None if t is None else _reordered(t, rows, self.whole.longest) for t in (self.k, self.v))


def _reordered(t: Tensor, rows: Tensor, used: int) -> Tensor:
    if rows.shape[0] == t.shape[0]:
        t[:, :used] = t[:, :used][rows]
        return t
    out = t.new_empty((rows.shape[0], *t.shape[1:]))
    out[:, :used] = t[:, :used][rows]
    return out


class MemoryCache:
    """Keys and values of the memory that one layer of cross-attention reads, (rows, memory_seq, kv_heads, head_dim)."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def get(self, make: Callable[[], Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        """Both, made by the first call."""
        if self.k is None or self.v is None:
            self.k, self.v = make()
        return self.k, self.v

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was."""
        if self.k is not None and self.v is not None:
            self.k, self.v = self.k[rows], self.v[rows]
