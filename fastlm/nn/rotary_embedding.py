"""The tables of a rotary position embedding, and the layer that turns queries and keys by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops

__all__ = ["RotaryEmbedding"]


def _frequencies(rotary_dim: int, base: float, scaling: Mapping[str, Any], device: torch.device) -> Tensor:
    """The angle of each pair between neighbouring positions, float64."""
    f = base ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim)
    match scaling.get("rope_type", "default"):
        case "default":
            return f
        case "linear":
            return f / float(scaling["factor"])
        case "llama3":
            # Slow pairs, which turn less than `low` times in the original context, are slowed; fast ones are not.
            low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
            turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
            keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
            return f * (keep + (1.0 - keep) / float(scaling["factor"]))
    raise ValueError(f"scaling: got rope_type {scaling['rope_type']!r}; allowed: 'default', 'linear', 'llama3'")


class RotaryEmbedding(torch.nn.Module):
    """``rotary(x, positions)`` turns pairs of the first `rotary_dim` columns of queries or keys.

    Args:
        rotary_dim: columns that are turned, even; the others are left.
        max_positions: rows of the tables.
        base: theta; pair i turns by base**(-2 i / rotary_dim) a position.
        interleaved: pairs are columns 2 i and 2 i + 1 (GPT-J) instead of i and rotary_dim / 2 + i (GPT-NeoX, Llama).
        scaling: as "rope_parameters" in a Hugging Face config, of rope_type "default", "linear" or "llama3".

    The angles are computed in float64. The tables are float32 and stay so when the module is cast to a narrower dtype
    (whose positions would run together); they are no part of the state dict.

    Source: Su et al. (2021), arXiv:2104.09864; the scaling of Llama 3.1 as in transformers.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, rotary_dim: int, max_positions: int = 2048, base: float = 10000.0, interleaved: bool = False,
        scaling: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"rotary_dim: got {rotary_dim}; allowed: even, 2 and more")
        self.rotary_dim, self.max_positions, self.base = rotary_dim, max_positions, base
        self.interleaved, self.scaling = interleaved, dict(scaling or {})
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self._fill(torch.get_default_device(), torch.float32)

    def _fill(self, device: torch.device, dtype: torch.dtype) -> None:
        f = _frequencies(self.rotary_dim, self.base, self.scaling, device)
        angles = torch.arange(self.max_positions, dtype=torch.float64, device=device)[:, None] * f
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        before = self.cos, self.sin
        super()._apply(fn, recurse)
        device, dtype = self.cos.device, torch.promote_types(self.cos.dtype, torch.float32)
        if (device, dtype) == (before[0].device, before[0].dtype):
            self.cos, self.sin = before  # layers may share this module, and each passes every change on
        else:
            self._fill(device, dtype)
        return self

    def extra_repr(self) -> str:
        return f"{self.rotary_dim}, {self.max_positions}, base={self.base}, interleaved={self.interleaved}"

    def forward(self, x: Tensor, positions: Tensor | None = None, seq_dim: int = -2, tape: Any = None) -> Tensor:
        """x, positions, seq_dim: as `fastlm.ops.rotary_embedding`'s."""
        return ops.rotary_embedding(
            x, self.cos, self.sin, positions, interleaved=self.interleaved, seq_dim=seq_dim, tape=tape
        )

    def backward(self, dy: Tensor, tape: Any, seq_dim: int = -2, into: Tensor | None = None) -> Tensor:
        """dx: dy turned back. seq_dim: as in forward. into: what dx is written to, of dy's shape; it may be dy."""
        targets = {} if into is None else {"x": _four(into, seq_dim)}
        dx: Tensor = tape.backward("rotary_embedding", _four(dy, seq_dim), into=targets)
        return into if into is not None else (dx.transpose(1, 2) if seq_dim == -3 else dx).view(dy.shape)


def _four(t: Tensor, seq_dim: int) -> Tensor:
    """(batch, heads, seq, dim), a view."""
    t = t.expand((1,) * (4 - t.dim()) + t.shape)
    return t.transpose(1, 2) if seq_dim == -3 else t
