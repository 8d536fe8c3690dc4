"""`gelu` in Triton: two forms of kernels/activation.py."""

from __future__ import annotations

import torch

from . import activation
from .common import meta

__all__ = ["backward", "compile_cases", "forward"]


def forward(x, bias, seed, approximate, dropout_p, y):
    activation.forward(f"gelu_{approximate}", x, bias, seed, dropout_p, y)


def backward(dy, x, bias, seed, approximate, dropout_p, dx, dbias):
    activation.backward(f"gelu_{approximate}", dy, x, bias, seed, dropout_p, dx, dbias)


def compile_cases():
    """Both forms with a bias of either dtype; every width of a tile below the widest; dropout; an odd width."""
    for approximate in ("tanh", "none"):
        yield {"x": meta(8192, 3072), "bias": meta(3072), "approximate": approximate}
        yield {"x": meta(8192, 3072), "bias": meta(3072, dtype=torch.float32), "approximate": approximate}
    for n in (64, 128, 256):
        yield {"x": meta(8192, n), "bias": meta(n), "approximate": "tanh"}
    for n in (3072, 1023):
        dropout = {"dropout_p": 0.1, "seed": meta(1, dtype=torch.int64)}
        yield {"x": meta(8192, n), "bias": meta(n), "approximate": "none"} | dropout
