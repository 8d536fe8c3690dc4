"""Root-mean-square normalisation over the last dimension.

    rstd = 1 / sqrt(sum(x**2) / N + eps)        xhat = x * rstd        y = xhat * weight

Gradients, with g = dy * weight and sums over the N columns of a row: rstd depends on every x_i,
d rstd / d x_i = -rstd**3 x_i / N, so  d xhat_j / d x_i = rstd * (delta_ij - xhat_j xhat_i / N), and
    dx = rstd * (g - xhat * sum(g * xhat) / N)
    dweight = sum over rows of dy * xhat

Saved: x and weight as given, rstd in float32 (float64 for float64), one a row. The product with weight is made in
float32 and rounded once (Gemma's order; Llama's rounds xhat to the input's dtype first).

Edge cases
 1  several rows, N not a power of two            5  N = 1: xhat is the sign of x
 2  no weight                                     6  no rows
 3  one row, three leading dimensions             7  rows of 0: rstd = 1 / sqrt(eps)
 4  N wider than one block                        8  float32 weight with a bfloat16 input
 9  elements whose squares leave the range of float16

Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019), arXiv:1910.07467, equation 4.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, check_same_device, check_vector
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Normal, Pick, Sample, Values

__all__ = ["rms_norm"]


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., N) -> y like x, rstd (...)."""
    wide = _wide(x)
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = wide * rstd if weight is None else wide * rstd * weight
    return y.to(x.dtype), rstd.squeeze(-1)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, eps: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dy (..., N) -> dx like x, dweight (N) in float32."""
    dy, xhat = _wide(dy), _wide(x) * rstd.unsqueeze(-1)
    dx = dweight = None
    if needs[0]:
        g = dy if weight is None else dy * weight
        dx = ((g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)).to(x.dtype)
    if needs[1]:
        dweight = (dy * xhat).reshape(-1, x.shape[-1]).sum(0)
    return dx, dweight


def outputs(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Spec, Spec]:
    """y; rstd."""
    statistic = torch.float64 if x.dtype == torch.float64 else torch.float32
    return Spec(tuple(x.shape), x.dtype), Spec(tuple(x.shape[:-1]), statistic)


def gradients(dy: Tensor, x: Tensor, weight: Any, rstd: Tensor, eps: float, needs: Any) -> tuple[Spec, Spec]:
    """dx, dweight."""
    return Spec(tuple(x.shape), x.dtype), Spec((x.shape[-1],), rstd.dtype)


def cost(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Cost:
    """Forward reads x and writes y; backward reads x and dy and writes dx. About 4 and 9 operations an element."""
    return Cost(4.0 * x.numel(), 2.0 * x.nbytes, 9.0 * x.numel(), 3.0 * x.nbytes)


def peer(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """What a PyTorch user writes today."""
    if weight is None or weight.dtype == x.dtype:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def terms(
    upstream: list[Tensor], x: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> dict[str, float]:
    """dx is the difference of two terms; for N = 1 almost all of them cancels."""
    _, rstd = forward(x, weight, eps)
    xhat = x * rstd.unsqueeze(-1)
    g = upstream[0] if weight is None else upstream[0] * weight
    total = (g.abs() + xhat.abs() * (g * xhat).abs().mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    return {"x": total.max().item() if total.numel() else 0.0}


_f32 = torch.float32
samples = (
    Sample("1 rows", x=Normal((5, 96)), weight=Normal((96,))),
    Sample("2 plain", x=Normal((3, 33)), eps=1e-3),
    Sample("3 one row, 3-D", x=Normal((1, 1, 64)), weight=Normal((64,))),
    Sample("4 wide", x=Normal((3, 9000)), weight=Normal((9000,))),
    Sample("5 N = 1", x=Normal((4, 1)), weight=Normal((1,))),
    Sample("6 no rows", x=Normal((0, 16)), weight=Normal((16,))),
    Sample("7 rows of 0", x=Values([[0.0] * 8, [1.0] * 8]), weight=Normal((8,))),
    Sample("8 float32 weight", x=Normal((7, 48)), weight=Normal((48,), dtype=_f32)),
    Sample("9 large", x=Normal((3, 40), scale=1e3), weight=Normal((40,))),
)

errors = (
    Bad("x integer", TypeError, r"x: .*int64.*floating", x=Values([[1, 2]], torch.int64)),
    Bad("x scalar", ValueError, r"x: .*0-dimensional", x=Values(1.0)),
    Bad("no columns", ValueError, r"x: .*last dimension.*0", x=Normal((3, 0))),
    Bad("weight shape", ValueError, r"weight: .*\(3,\).*\(4,\)", x=Normal((2, 4)), weight=Normal((3,))),
    Bad("eps", ValueError, r"eps: .*-1", x=Normal((2, 4)), eps=-1.0),
)


def random(pick: Pick) -> Sample:
    """Any number of leading dimensions, with and without a weight of either dtype."""
    n = pick.integer(1, 300)
    lead = tuple(pick.integer(0, 5) for _ in range(pick.integer(0, 3)))
    return Sample(
        "random", x=Normal((*lead, n), *pick.one_of((1.0, 0.0), (1.0, 3.0), (1e-2, 0.0), (30.0, 0.0))),
        weight=pick.one_of(None, Normal((n,), dtype=pick.one_of(None, _f32))), eps=pick.one_of(1e-6, 1e-3),
    )  # fmt: skip


def case(rows: int = 2048, columns: int = 768) -> Sample:
    """Activations (rows, columns) with a float32 weight."""
    return Sample("case", x=Normal((rows, columns)), weight=Normal((columns,), dtype=_f32))


shapes = {
    "default": (
        {"rows": 2048, "columns": 768},
        {"rows": 8192, "columns": 1024},
        {"rows": 512, "columns": 4096},
    ),
    "sweep": tuple({"rows": 2**22 // n, "columns": n} for n in (256, 1024, 4096, 8192, 16384, 65536)),
    "large": tuple({"rows": 2**27 // n, "columns": n} for n in (1024, 4096, 8192, 16384, 65536)),
}


op = register(
    Op(
        name="rms_norm",
        schema="(Tensor x, Tensor? weight, float eps) -> (Tensor y, Tensor rstd)",
        forward=forward,
        backward=backward,
        outputs=outputs,
        gradients=gradients,
        cost=cost,
        peer=peer,
        samples=samples,
        errors=errors,
        random=random,
        case=case,
        shapes=shapes,
        terms=terms,
        grads=("x", "weight"),
        accumulates=("weight",),
        saved=("x", "weight", "rstd"),
    )
)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, tape: Any = None) -> Tensor:
    """Root-mean-square normalisation over the last dimension of x.

    Args:
        x: (..., N), floating-point, N >= 1.
        weight: (N,), of x's dtype or float32; None for 1.
        eps: added to the mean square; >= 0.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        y, of x's shape and dtype. Statistics and the weight's gradient are computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Zhang, Sennrich (2019), arXiv:1910.07467.
    """
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        given = "a 0-dimensional tensor" if x.dim() == 0 else "a last dimension of 0"
        raise ValueError(f"x: got {given}; allowed: (..., N) with N >= 1")
    check_vector("weight", weight, x)
    check_same_device(x=x, weight=weight)
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}; allowed: >= 0")
    y: Tensor = op(x, weight, float(eps), tape=tape)[0]
    return y
