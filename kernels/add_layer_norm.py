"""Residual sum and layer normalisation in Triton: layer_norm's kernels, with the sum in the same pass."""

from __future__ import annotations

from .layer_norm import compile_cases as cases_of_layer_norm
from .layer_norm import launch_backward, launch_forward

__all__ = ["backward", "compile_cases", "forward"]


def forward(x, residual, weight, bias, eps, y, residual_out, mean, rstd):
    launch_forward(x, residual, weight, bias, eps, y, residual_out, mean, rstd)


def backward(d_y, d_residual_out, weight, residual_out, mean, rstd, eps, dx, dweight, dbias):
    if d_y is not None:
        launch_backward(d_y, d_residual_out, residual_out, weight, mean, rstd, dx, dweight, dbias)
    elif dx is not None:
        dx.copy_(d_residual_out)


def compile_cases():
    """Those of layer_norm."""
    for case in cases_of_layer_norm():
        yield case | {"residual": case["x"]}
