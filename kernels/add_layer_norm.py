"""Residual sum and layer normalisation in Triton: layer_norm's kernels, with the sum in the same pass."""

from __future__ import annotations

import torch

from .common import meta
from .layer_norm import launch_backward, launch_forward

__all__ = ["backward", "compile_cases", "forward"]


def forward(x, residual, weight, bias, x_bias, seed, eps, dropout_p, y, residual_out, mean, rstd):
    launch_forward(x, weight, bias, eps, y, mean, rstd, residual=residual, x_bias=x_bias, seed=seed, dropout_p=dropout_p,
                   total=residual_out)  # fmt: skip


def backward(d_y, d_residual_out, weight, residual_out, mean, rstd, seed, eps, dropout_p, dx, d_residual, dweight, dbias,
             d_x_bias):  # fmt: skip
    launch_backward(d_y, residual_out, weight, mean, rstd, dx, dweight, dbias, d_total=d_residual_out,
                    d_residual=d_residual, dx_bias=d_x_bias, seed=seed, dropout_p=dropout_p)  # fmt: skip


def compile_cases():
    """What op.shapes leave out: parameters of x's dtype in many tiles, none, a width that no power of two divides, and
    dropout and bias in each kind of tile."""
    seed = meta(1, dtype=torch.int64)
    for n in (1023, 12288):
        row = meta(8192, n)
        yield {"x": row, "residual": row, "weight": meta(n), "bias": meta(n)}
    yield {"x": meta(8192, 1024), "residual": meta(8192, 1024)}
    for n in (64, 768, 1023, 4096, 12288):
        for dtype in (torch.bfloat16, torch.float32):
            row, parameter = meta(8192, n, dtype=dtype), meta(n, dtype=torch.float32)
            yield {"x": row, "residual": row, "weight": parameter, "bias": parameter, "x_bias": parameter,
                   "dropout_p": 0.1, "seed": seed}  # fmt: skip
    yield {"x": meta(8192, 768), "residual": meta(8192, 768), "weight": meta(768), "bias": meta(768), "x_bias": meta(768)}
