"""Residual sum and root-mean-square normalisation in Triton: layer_norm's kernels, with the sum in the same pass."""

from __future__ import annotations

import torch

from .common import meta
from .layer_norm import launch_backward, launch_forward

__all__ = ["backward", "compile_cases", "forward"]


def forward(x, residual, weight, x_bias, seed, eps, offset, casting, dropout_p, y, residual_out, rstd):
    launch_forward(x, weight, None, eps, y, None, rstd, residual=residual, x_bias=x_bias, seed=seed, dropout_p=dropout_p,
                   total=residual_out, offset=offset, llama=casting == "llama")  # fmt: skip


def backward(d_y, d_residual_out, weight, residual_out, rstd, seed, eps, offset, casting, dropout_p, dx, d_residual,
             dweight, d_x_bias):  # fmt: skip
    launch_backward(d_y, residual_out, weight, None, rstd, dx, dweight, d_total=d_residual_out, d_residual=d_residual,
                    dx_bias=d_x_bias, seed=seed, dropout_p=dropout_p, offset=offset, llama=casting == "llama")  # fmt: skip


def compile_cases():
    """Both orders of rounding, no weight, a width that no power of two divides, and dropout in each kind of tile."""
    seed = meta(1, dtype=torch.int64)
    for n in (768, 1023, 12288):
        row = meta(8192, n)
        yield {"x": row, "residual": row, "weight": meta(n), "casting": "llama"}
        yield {"x": row, "residual": row, "weight": meta(n), "offset": 1.0}
    yield {"x": meta(8192, 1024), "residual": meta(8192, 1024)}
    for n in (64, 768, 1023, 4096, 12288):
        row, parameter = meta(8192, n), meta(n, dtype=torch.float32)
        yield {"x": row, "residual": row, "weight": parameter, "x_bias": parameter, "dropout_p": 0.1, "seed": seed}
    yield {"x": meta(8192, 768), "residual": meta(8192, 768), "weight": meta(768), "x_bias": meta(768)}
