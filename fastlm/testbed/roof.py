"""What this device can do right now: copy bandwidth and GEMM speed, measured beside what is held against them.

A measured roof is what PyTorch's own copy and matrix product reach in this process, on this machine, with whatever
else runs on it: nearer to what a kernel could have reached than a data sheet. A kernel may pass it: by keeping its
data in cache, by a better GEMM, or by updating in place, where a copy first fetches the lines that it overwrites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from .timing import interleaved

__all__ = ["Gemm", "Roof", "measure"]

_COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # of the source: well beyond any cache
_SQUARE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Gemm:
    """(m, k) times (k, n), 2 m n k floating-point operations."""

    m: int
    n: int
    k: int
    seconds: float

    @property
    def flop_per_s(self) -> float:
        return 2.0 * self.m * self.n * self.k / self.seconds


@dataclass(frozen=True)
class Roof:
    """Measured upper rates of a device: medians of interleaved samples."""

    device: str
    dtype: str  # of the GEMMs
    bytes_per_s: float  # a copy: bytes read plus bytes written, both touched before
    gemms: tuple[Gemm, ...]

    @property
    def flop_per_s(self) -> float:
        """That of the fastest GEMM."""
        return max(gemm.flop_per_s for gemm in self.gemms)

    def floor(self, flops: float, moved: float) -> float:
        """Seconds that so many operations and bytes take at the least."""
        return max(flops / self.flop_per_s, moved / self.bytes_per_s)

    def bound(self, flops: float, moved: float) -> str:
        """Which of the two is the floor: "bytes" or "flops"."""
        return "flops" if flops / self.flop_per_s > moved / self.bytes_per_s else "bytes"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"flop_per_s": self.flop_per_s}


def measure(
    device: torch.device | str, dtype: torch.dtype, sizes: Sequence[tuple[int, int, int]] = (), seconds: float = 0.5
) -> Roof:
    """Measure the copy bandwidth and the GEMM speed of a device.

    Args:
        device: "cpu" or "cuda".
        dtype: of the GEMMs' operands and result; float32 runs at torch's current matmul precision.
        sizes: (m, n, k) of GEMMs; none: one square GEMM, 1024 on a CPU, 8192 on a GPU.
        seconds: time for all together.
    """
    device = torch.device(device)
    square = _SQUARE[device.type]
    sizes = tuple(sizes) or ((square, square, square),)
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    candidates: dict[str, Callable[[], object]] = {"copy": partial(torch.zeros_like(source).copy_, source)}
    for m, n, k in sizes:
        # Products of random numbers: zeros draw less power and clock higher.
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        candidates[f"{m} {n} {k}"] = partial(torch.mm, a, b, out=torch.zeros(m, n, device=device, dtype=dtype))
    with torch.no_grad():
        timings = interleaved(candidates, device=device, seconds=seconds, cold=False)
    gemms = tuple(Gemm(m, n, k, timings[f"{m} {n} {k}"].median) for m, n, k in sizes)
    moved = 2.0 * source.nbytes
    return Roof(str(device), str(dtype).removeprefix("torch."), moved / timings["copy"].median, gemms)
