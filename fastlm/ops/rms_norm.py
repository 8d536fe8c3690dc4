"""Root-mean-square normalisation over the last dimension.

    rstd = 1 / sqrt(sum(x**2) / N + eps)        xhat = x * rstd        y = xhat * (weight + offset)

Two orders of rounding are in use, of which `casting` names one:
    "gemma"  the product in float32, rounded once (torch.nn.RMSNorm, Gemma; Gemma's offset is 1)
    "llama"  xhat rounded to x's dtype, then multiplied, then rounded (Llama, Mistral, Qwen, T5)

Gradients, with g = dy * (weight + offset) and sums over the N columns of a row: rstd depends on every x_i,
d rstd / d x_i = -rstd**3 x_i / N, so  d xhat_j / d x_i = rstd * (delta_ij - xhat_j xhat_i / N), and
    dx = rstd * (g - xhat * sum(g * xhat) / N)
    dweight = sum over rows of dy * xhat
Rounding counts as the identity; what weight was multiplied with is, in Llama's order, the rounded xhat, and so dweight
is made of that, while dx is made of xhat before it was rounded.

Saved: x and weight as given, rstd in float32 (float64 for float64), one a row.

Edge cases
 1  several rows, N not a power of two            8  float32 weight with a bfloat16 input
 2  no weight                                     9  elements whose squares leave the range of float16
 3  one row, three leading dimensions            10  Gemma's offset
 4  N wider than one block                       11  Llama's order
 5  N = 1: xhat is the sign of x                 12  Llama's order, an offset, N wider than one block
 6  no rows                                      13  more rows than share a program
 7  rows of 0: rstd = 1 / sqrt(eps)

Sources: Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019), arXiv:1910.07467, equation 4; the two orders
as in LlamaRMSNorm and GemmaRMSNorm of Hugging Face's transformers.
"""

from __future__ import annotations

import math
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


def scale_of(weight: Tensor, offset: float) -> Tensor:
    """weight + offset, the sum never in bfloat16."""
    return _wide(weight) + offset if offset else weight


def forward(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """x (..., N) -> y like x, rstd (...)."""
    wide = _wide(x)
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = wide * rstd
    if casting == "llama":
        y = _wide(y.to(x.dtype))
    if weight is not None:
        y = y * scale_of(weight, offset)
    return y.to(x.dtype), rstd.squeeze(-1)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    eps: float,
    offset: float,
    casting: str,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dy (..., N) -> dx like x, dweight (N) in float32."""
    dx, dweight = unrounded_backward(dy, x, weight, rstd, offset, casting, needs)
    return None if dx is None else dx.to(x.dtype), dweight


def unrounded_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, casting: str,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """`backward` with dx in rstd's dtype, for add_rms_norm, which adds to it."""
    dy, xhat = _wide(dy), _wide(x) * rstd.unsqueeze(-1)
    dx = dweight = None
    if needs[0]:
        g = dy if weight is None else dy * scale_of(weight, offset)
        dx = (g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    if needs[1]:
        factor = xhat.to(x.dtype) if casting == "llama" else xhat
        dweight = (dy * factor).reshape(-1, x.shape[-1]).sum(0)
    return dx, dweight


def outputs(x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str) -> tuple[Spec, Spec]:
    """y; rstd."""
    statistic = torch.float64 if x.dtype == torch.float64 else torch.float32
    return Spec(tuple(x.shape), x.dtype), Spec(tuple(x.shape[:-1]), statistic)


def gradients(
    dy: Tensor, x: Tensor, weight: Any, rstd: Tensor, eps: float, offset: float, casting: str, needs: Any
) -> tuple[Spec, Spec]:
    """dx, dweight."""
    return Spec(tuple(x.shape), x.dtype), Spec((x.shape[-1],), rstd.dtype)


def cost(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, **options: Any) -> Cost:
    """Forward reads x and writes y; backward reads x and dy and writes dx. About 4 and 9 operations an element."""
    return Cost(4.0 * x.numel(), 2.0 * x.nbytes, 9.0 * x.numel(), 3.0 * x.nbytes)


def peer(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "gemma"
) -> Tensor:
    """What a PyTorch user writes today; for an offset and Llama's order, what transformers does."""
    wide = _wide(x)
    if offset or casting == "llama":
        xhat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        xhat = xhat.to(x.dtype) if casting == "llama" else xhat
        return (xhat if weight is None else xhat * scale_of(weight, offset)).to(x.dtype)
    if weight is None or weight.dtype == x.dtype:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.rms_norm(wide, x.shape[-1:], weight.float(), eps).to(x.dtype)


def terms(
    upstream: list[Tensor], x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0,
    casting: str = "gemma",
) -> dict[str, float]:  # fmt: skip
    """dx is the difference of two terms; for N = 1 almost all of them cancels."""
    _, rstd = forward(x, None, eps, 0.0, "gemma")
    xhat = x * rstd.unsqueeze(-1)
    g = upstream[0] if weight is None else upstream[0] * scale_of(weight, offset)
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
    Sample("10 offset", x=Normal((4, 56)), weight=Normal((56,), scale=0.1), offset=1.0),
    Sample("11 Llama", x=Normal((5, 36)), weight=Normal((36,)), casting="llama"),
    Sample("12 Llama, offset, wide", x=Normal((2, 8300)), weight=Normal((8300,), dtype=_f32), offset=1.0,
           casting="llama"),
    Sample("13 many rows", x=Normal((140, 24)), weight=Normal((24,))),
)  # fmt: skip

errors = (
    Bad("x integer", TypeError, r"x: .*int64.*floating", x=Values([[1, 2]], torch.int64)),
    Bad("x scalar", ValueError, r"x: .*0-dimensional", x=Values(1.0)),
    Bad("no columns", ValueError, r"x: .*last dimension.*0", x=Normal((3, 0))),
    Bad("weight shape", ValueError, r"weight: .*\(3,\).*\(4,\)", x=Normal((2, 4)), weight=Normal((3,))),
    Bad("eps", ValueError, r"eps: .*-1", x=Normal((2, 4)), eps=-1.0),
    Bad("casting", ValueError, r"casting: .*'mistral'.*gemma, llama", x=Normal((2, 4)), casting="mistral"),
    Bad("offset alone", ValueError, r"offset: .*1\.0 without a weight", x=Normal((2, 4)), offset=1.0),
    Bad("offset infinite", ValueError, r"offset: .*inf.*finite", x=Normal((2, 4)), weight=Normal((4,)),
        offset=float("inf")),
)  # fmt: skip


def random(pick: Pick) -> Sample:
    """Any number of leading dimensions, with and without a weight of either dtype, in both orders of rounding."""
    n = pick.integer(1, 300)
    lead = tuple(pick.integer(0, 5) for _ in range(pick.integer(0, 3)))
    weight = pick.one_of(None, Normal((n,), dtype=pick.one_of(None, _f32)))
    return Sample(
        "random", x=Normal((*lead, n), *pick.one_of((1.0, 0.0), (1.0, 3.0), (1e-2, 0.0), (30.0, 0.0))),
        weight=weight, eps=pick.one_of(1e-6, 1e-3), offset=pick.one_of(0.0, 1.0) if weight is not None else 0.0,
        casting=pick.one_of("gemma", "llama"),
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
        schema="(Tensor x, Tensor? weight, float eps, float offset, str casting) -> (Tensor y, Tensor rstd)",
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


def check_scale(weight: Tensor | None, offset: float, casting: str) -> None:
    """offset must be finite, and 0 without a weight; casting must be known."""
    if casting not in ("gemma", "llama"):
        raise ValueError(f"casting: got {casting!r}; allowed: gemma, llama")
    if not math.isfinite(offset):
        raise ValueError(f"offset: got {offset}; allowed: a finite number")
    if offset and weight is None:
        raise ValueError(f"offset: got {offset} without a weight; allowed: 0.0")


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: str = "gemma",
    tape: Any = None,
) -> Tensor:
    """Root-mean-square normalisation over the last dimension of x: xhat * (weight + offset).

    Args:
        x: (..., N), floating-point, N >= 1.
        weight: (N,), of x's dtype or float32; None for 1.
        eps: added to the mean square; >= 0.
        offset: added to weight in float32, as Gemma adds 1; only with a weight.
        casting: "gemma" makes the product in float32 and rounds once, as torch.nn.RMSNorm and Gemma do; "llama" rounds
            xhat to x's dtype before the product, as Llama and most others do. The same in float32.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        y, of x's shape and dtype (also where transformers' Llama, with a float32 weight, returns float32). Statistics and
        the weight's gradient are computed in float32 (float64 for float64).

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
    check_scale(weight, offset, casting)
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}; allowed: >= 0")
    y: Tensor = op(x, weight, float(eps), float(offset), casting, tape=tape)[0]
    return y
