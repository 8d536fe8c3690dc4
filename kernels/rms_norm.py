"""Root-mean-square normalisation in Triton: layer_norm's kernels without a mean and a bias."""

from __future__ import annotations

import torch

from .common import meta
from .layer_norm import launch_backward, launch_forward

__all__ = ["backward", "compile_cases", "forward"]


def forward(x, weight, eps, offset, casting, y, rstd):
    launch_forward(x, weight, None, eps, y, None, rstd, offset=offset, llama=casting == "llama")


def backward(dy, x, weight, rstd, eps, offset, casting, dx, dweight):
    launch_backward(dy, x, weight, None, rstd, dx, dweight, offset=offset, llama=casting == "llama")


def compile_cases():
    """Narrow tiles, no weight, one of x's dtype, each order of casting, widths that 16, 8 and nothing divides."""
    yield {"x": meta(8192, 128), "weight": meta(128)}
    yield {"x": meta(8192, 1600), "weight": meta(1600, dtype=torch.float32)}
    for n in (1024, 4096, 12288):
        for more in ({"casting": "llama"}, {"offset": 1.0}):
            yield {"x": meta(8192, n), "weight": meta(n), **more}
    yield {"x": meta(8192, 4096)}
    yield {"x": meta(8192, 1000), "weight": meta(1000)}
    yield {"x": meta(8192, 1023), "weight": meta(1023)}
