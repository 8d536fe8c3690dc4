"""Matrix products into memory that is there already, adding in float32 where asked.

Who multiplies:
    GPU                                  cuBLAS, with a float32 result where it is added to a float32 buffer
    CPU, float32 and bfloat16            ours (csrc/cpu/gemm.h): as fast as torch's (oneDNN) in bfloat16 and faster in float32,
                                         adds in float32 straight into the buffer, and takes no memory of torch's
    the reference backend, float64, ...  torch's

benchmarks/FACTS.md has the measurement behind these choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, native

__all__ = ["add_column_sums", "add_linear_gradients", "add_product", "product"]


def _ours(a: Tensor) -> bool:
    return (
        backends.device_type(a) == "cpu"
        and a.dtype in (torch.float32, torch.bfloat16)
        and backends.requested() in (None, "cpu")
        and not native.why_not("cpu")
    )


def product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """out (m, n) = a (m, k) @ b (k, n) + bias (n), all of one dtype. Returns out."""
    if _ours(a):
        native.call(native.load("cpu").matmul, a, b, out, False, bias)
        return out
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """total (m, n) = beta * total + a (m, k) @ b (k, n); total is float32 (float64) whatever the dtype of a and b.

    beta: 1, or 0, with which it does not matter what total held, NaN among it.
    """
    if _ours(a):
        native.call(native.load("cpu").matmul, a, b, total, beta == 1, None)
    elif total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif backends.device_type(a) == "cuda":
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    elif beta:
        total.add_(torch.mm(a, b))
    else:
        total.copy_(torch.mm(a, b))


def add_linear_gradients(
    dweight: Tensor, dbias: Tensor | None, dy: Tensor, x: Tensor, one: Tensor, beta: int = 1
) -> None:
    """dweight (m, n) = beta * dweight + dy (k, m).T @ x (k, n), dbias (m) += dy summed over k, as `add_product` does it.

    one: a 1 of dy's dtype, 0-dim.
    """
    if _ours(dy):
        native.call(native.load("cpu").linear_gradients, dy, x, dweight, beta == 1, dbias)
        return
    add_product(dweight, dy.t(), x, beta)
    if dbias is not None:
        add_column_sums(dbias, dy, one)


def add_column_sums(total: Tensor, a: Tensor, one: Tensor) -> None:
    """total (n) += a (m, n) summed over m, as a product with ones. one: a 1 of a's dtype, 0-dim."""
    if backends.device_type(a) == "cuda" or _ours(a):
        add_product(total.view(1, -1), one.expand(1, a.shape[0]), a)
    else:
        total.add_(torch.sum(a, 0, dtype=total.dtype))
