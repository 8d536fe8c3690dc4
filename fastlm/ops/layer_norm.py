"""Layer normalisation over the last dimension.

    mean = sum(x) / N        var = sum((x - mean)**2) / N        rstd = 1 / sqrt(var + eps)
    xhat = (x - mean) * rstd                y = xhat * weight + bias

Gradients, with g = dy * weight and sums over the N columns of a row:
    d xhat_j = g_j;  mean and rstd depend on every x_i, and  d xhat_j / d x_i = rstd * (delta_ij - 1/N - xhat_j xhat_i / N), so
    dx = rstd * (g - sum(g) / N - xhat * sum(g * xhat) / N)
    dweight = sum over rows of dy * xhat            dbias = sum over rows of dy

Saved: x and weight as given, mean and rstd in float32 (float64 for float64), one of each a row.

Edge cases
 1  several rows, N not a power of two            6  N = 1: xhat is 0
 2  no weight and no bias                         7  no rows
 3  weight without bias                           8  constant rows: var = 0
 4  one row, three leading dimensions             9  mean large against the deviation (two passes, no E[x^2] - mean^2)
 5  N wider than one block                       10  float32 parameters with a bfloat16 input

Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), arXiv:1607.06450, equations 3 and 4.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, check_same_device, check_vector
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Normal, Pick, Sample, Values

__all__ = ["layer_norm"]


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., N) -> y like x, mean and rstd (...)."""
    wide = _wide(x)
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = centred * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dy (..., N) -> dx like x, dweight and dbias (N) in float32."""
    n = x.shape[-1]
    dy32, xhat = _wide(dy), (_wide(x) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dx = dweight = dbias = None
    if needs[0]:
        g = dy32 if weight is None else dy32 * weight
        # dx = rstd * (g - sum(g) / N - xhat * sum(g * xhat) / N)
        g_mean, g_dot = g.mean(-1, keepdim=True), (g * xhat).mean(-1, keepdim=True)
        dx = ((g - g_mean - xhat * g_dot) * rstd.unsqueeze(-1)).to(x.dtype)
    if needs[1]:
        dweight = (dy32 * xhat).reshape(-1, n).sum(0)
    if needs[2]:
        dbias = dy32.reshape(-1, n).sum(0)
    return dx, dweight, dbias


def outputs(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Spec, ...]:
    """y; mean, rstd."""
    statistics = Spec(tuple(x.shape[:-1]), torch.float64 if x.dtype == torch.float64 else torch.float32)
    return Spec(tuple(x.shape), x.dtype), statistics, statistics


def gradients(
    dy: Tensor, x: Tensor, weight: Any, mean: Tensor, rstd: Tensor, eps: float, needs: Any
) -> tuple[Spec, ...]:
    """dx, dweight, dbias."""
    parameter = Spec((x.shape[-1],), mean.dtype)
    return Spec(tuple(x.shape), x.dtype), parameter, parameter


def cost(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Cost:
    """Forward reads x and writes y; backward reads x and dy and writes dx. About 8 and 14 operations an element."""
    return Cost(8.0 * x.numel(), 2.0 * x.nbytes, 14.0 * x.numel(), 3.0 * x.nbytes)


def peer(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """What a PyTorch user writes today."""
    if all(p is None or p.dtype == x.dtype for p in (weight, bias)):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    weight, bias = (p if p is None else p.float() for p in (weight, bias))  # torch refuses mixed dtypes
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def terms(
    upstream: list[Tensor], x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> dict[str, float]:
    """dx is a difference of three terms; for N = 1 and 2 almost all of them cancels."""
    _, mean, rstd = forward(x, None, None, eps)
    xhat = (x - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    g = (upstream[0] if weight is None else upstream[0] * weight).abs()
    total = (g + g.mean(-1, keepdim=True) + xhat.abs() * (g * xhat.abs()).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    return {"x": total.max().item() if total.numel() else 0.0}


_f32 = torch.float32
samples = (
    Sample("1 rows", x=Normal((5, 96)), weight=Normal((96,)), bias=Normal((96,))),
    Sample("2 plain", x=Normal((3, 33))),
    Sample("3 weight only", x=Normal((4, 40)), weight=Normal((40,)), eps=1e-3),
    Sample("4 one row, 3-D", x=Normal((1, 1, 64)), weight=Normal((64,)), bias=Normal((64,))),
    Sample("5 wide", x=Normal((3, 5000)), weight=Normal((5000,)), bias=Normal((5000,))),
    Sample("6 N = 1", x=Normal((4, 1)), weight=Normal((1,)), bias=Normal((1,))),
    Sample("7 no rows", x=Normal((0, 16)), weight=Normal((16,)), bias=Normal((16,))),
    Sample("8 constant rows", x=Values([[3.0] * 8, [0.0] * 8]), weight=Normal((8,)), bias=Normal((8,))),
    Sample("9 large mean", x=Normal((4, 256), shift=1e3), weight=Normal((256,)), bias=Normal((256,))),
    Sample(
        "10 float32 parameters",
        x=Normal((7, 48)),
        weight=Normal((48,), dtype=_f32),
        bias=Normal((48,), dtype=_f32),
    ),
)

errors = (
    Bad("x integer", TypeError, r"x: .*int64.*floating", x=Values([[1, 2]], torch.int64)),
    Bad("x scalar", ValueError, r"x: .*0-dimensional", x=Values(1.0)),
    Bad("no columns", ValueError, r"x: .*last dimension.*0", x=Normal((3, 0))),
    Bad("weight shape", ValueError, r"weight: .*\(3,\).*\(4,\)", x=Normal((2, 4)), weight=Normal((3,))),
    Bad("bias shape", ValueError, r"bias: .*\(4, 1\).*\(4,\)", x=Normal((2, 4)), bias=Normal((4, 1))),
    Bad(
        "weight dtype",
        TypeError,
        r"weight: .*float64",
        x=Normal((2, 4), dtype=_f32),
        weight=Normal((4,), dtype=torch.float64),
    ),
    Bad("eps", ValueError, r"eps: .*-1", x=Normal((2, 4)), eps=-1.0),
)

def random(pick: Pick) -> Sample:
    """Any number of leading dimensions, with and without parameters of either dtype."""
    n = pick.integer(1, 300)
    lead = tuple(pick.integer(0, 5) for _ in range(pick.integer(0, 3)))
    parameter = Normal((n,), dtype=pick.one_of(None, _f32))
    return Sample(
        "random", x=Normal((*lead, n), *pick.one_of((1.0, 0.0), (1.0, 3.0), (1e-2, 0.0), (30.0, 0.0))),
        weight=pick.one_of(None, parameter), bias=pick.one_of(None, parameter), eps=pick.one_of(1e-5, 1e-3),
    )  # fmt: skip


def case(rows: int = 2048, columns: int = 768) -> Sample:
    """Activations (rows, columns) with float32 parameters."""
    parameter = Normal((columns,), dtype=_f32)
    return Sample("case", x=Normal((rows, columns)), weight=parameter, bias=parameter)


shapes = {
    "default": ({"rows": 2048, "columns": 768}, {"rows": 8192, "columns": 1024}, {"rows": 512, "columns": 4096}),
    "sweep": tuple({"rows": 2**22 // n, "columns": n} for n in (256, 1024, 4096, 8192, 16384, 65536)),
    "large": tuple({"rows": 2**27 // n, "columns": n} for n in (1024, 4096, 8192, 16384, 65536)),
}


op = register(
    Op(
        name="layer_norm",
        schema="(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
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
        grads=("x", "weight", "bias"),
        accumulates=("weight", "bias"),
        saved=("x", "weight", "mean", "rstd"),
    )
)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    tape: Any = None,
) -> Tensor:
    """Layer normalisation over the last dimension of x.

    Args:
        x: (..., N), floating-point, N >= 1.
        weight, bias: (N,), of x's dtype or float32; None for 1 and 0.
        eps: added to the variance; >= 0.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        y, of x's shape and dtype. Statistics and parameter gradients are computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Ba, Kiros, Hinton (2016), arXiv:1607.06450.
    """
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        given = "a 0-dimensional tensor" if x.dim() == 0 else "a last dimension of 0"
        raise ValueError(f"x: got {given}; allowed: (..., N) with N >= 1")
    check_vector("weight", weight, x)
    check_vector("bias", bias, x)
    check_same_device(x=x, weight=weight, bias=bias)
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}; allowed: >= 0")
    y: Tensor = op(x, weight, bias, float(eps), tape=tape)[0]
    return y
