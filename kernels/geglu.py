"""`geglu` in Triton: two forms of kernels/activation.py."""

from __future__ import annotations

import torch

from . import activation
from .common import meta

__all__ = ["backward", "compile_cases", "forward"]


def forward(gate, up, gate_bias, up_bias, seed, approximate, up_first, dropout_p, y):
    form = f"gelu_{approximate}"
    activation.gated_forward(form, gate, up, gate_bias, up_bias, seed, up_first, dropout_p, y)


def backward(dy, gate, up, gate_bias, up_bias, seed, approximate, up_first, dropout_p, *gradients):
    form = f"gelu_{approximate}"
    activation.gated_backward(form, dy, gate, up, gate_bias, up_bias, seed, up_first, dropout_p, *gradients)


def compile_cases():
    """Packed and apart, with biases and dropout, which hold the most at once, and an odd width."""
    for approximate in ("tanh", "none"):
        packed = {"gate": meta(8192, 6144), "gate_bias": meta(6144), "approximate": approximate}
        yield packed
        yield packed | {"dropout_p": 0.1, "seed": meta(1, dtype=torch.int64)}
    yield {"gate": meta(8192, 3072), "up": meta(8192, 3072), "up_bias": meta(3072)}
    yield {"gate": meta(8192, 2046), "gate_bias": meta(2046), "dropout_p": 0.1, "seed": meta(1, dtype=torch.int64)}
