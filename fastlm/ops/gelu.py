"""Gaussian error linear unit of a sum with a bias.

    u = x + bias, not rounded
    "none"    y = u * Phi(u)          Phi(u) = erfc(-u / sqrt(2)) / 2, the normal distribution function
    "tanh"    y = u * sigmoid(2 z)    z = sqrt(2 / pi) * (u + 0.044715 * u**3)
              sigmoid(2 z) = (1 + tanh z) / 2

Gradients, with phi(u) = exp(-u**2 / 2) / sqrt(2 pi) the derivative of Phi and s = sigmoid(2 z):
    "none"    du = dy * (Phi(u) + u * phi(u))
    "tanh"    du = dy * (s + u * s * (1 - s) * 2 * dz/du)     dz/du = sqrt(2 / pi) * (1 + 3 * 0.044715 * u**2)
    dx = du            dbias = sum over rows of du

erfc and sigmoid keep the relative accuracy of the left tail that 1 + erf and 1 + tanh cancel away. Beyond 40
both factors have their limits, so |u| is clamped there wherever 0 * infinity would give a NaN: y(-inf) = 0,
y(inf) = inf, their derivatives 0 and 1; a NaN stays a NaN.

Saved: x and bias as given; u is recomputed.

Edge cases
 1  several rows, N not a power of two      6  one element
 2  tanh                                    7  no rows
 3  no bias                                 8  float32 bias with a bfloat16 input
 4  tanh without bias, three dimensions     9  far tails
 5  more than one block of rows and columns

Source: Hendrycks, Gimpel, "Gaussian error linear units" (2016), arXiv:1606.08415, section 2.
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

__all__ = ["gelu"]

_LIMIT = 40.0  # Phi and the sigmoid are 0 or 1 beyond it, in float64 too
_CUBIC = 0.044715


def _sum(x: Tensor, bias: Tensor | None) -> Tensor:
    u = x if x.dtype == torch.float64 else x.float()
    return u if bias is None else u + bias


def _sigmoid_2z(u: Tensor) -> Tensor:
    return torch.sigmoid(math.sqrt(8.0 / math.pi) * (u + _CUBIC * u**3))


def _phi_integral(u: Tensor) -> Tensor:
    return 0.5 * torch.erfc(u * -math.sqrt(0.5))


def forward(x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor]:
    """x (..., N) -> y like x."""
    u = _sum(x, bias).clamp(min=-_LIMIT)
    factor = _sigmoid_2z(u) if approximate == "tanh" else _phi_integral(u)
    return ((u * factor).to(x.dtype),)


def backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dy (..., N) -> dx like x, dbias (N) in float32."""
    u = _sum(x, bias).clamp(-_LIMIT, _LIMIT)
    if approximate == "tanh":
        s = _sigmoid_2z(u)
        derivative = s + u * s * _sigmoid_2z(-u) * (math.sqrt(8.0 / math.pi) * (1.0 + 3.0 * _CUBIC * u.square()))
    else:
        derivative = _phi_integral(u) + u * torch.exp(-0.5 * u.square()) * math.sqrt(0.5 / math.pi)
    du = dy * derivative
    dbias = du.reshape(x.shape[:-1].numel(), x.shape[-1]).sum(0) if needs[1] else None
    return du.to(x.dtype) if needs[0] else None, dbias


def outputs(x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Spec]:
    """y."""
    return (Spec(tuple(x.shape), x.dtype),)


def gradients(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, needs: Any) -> tuple[Spec, Spec]:
    """dx, dbias."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return Spec(tuple(x.shape), x.dtype), Spec(() if bias is None else tuple(bias.shape), dtype)


def cost(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Cost:
    """Reads x, writes y; reads x and dy, writes dx. About 20 and 30 operations an element."""
    return Cost(20.0 * x.numel(), 2.0 * x.nbytes, 30.0 * x.numel(), 3.0 * x.nbytes)


def peer(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """What a PyTorch user writes today."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate).to(x.dtype)


_f32 = torch.float32
_tails = Values([[-30.0, -13.0, -10.0, -6.0, -3.0, 0.0, 3.0, 6.0, 13.0, 1e4]])
samples = (
    Sample("1 rows", x=Normal((5, 37), scale=2.0), bias=Normal((37,))),
    Sample("2 tanh", x=Normal((5, 37), scale=2.0), bias=Normal((37,)), approximate="tanh"),
    Sample("3 no bias", x=Normal((3, 33))),
    Sample("4 tanh, no bias, 3-D", x=Normal((2, 3, 20)), approximate="tanh"),
    Sample("5 blocks", x=Normal((70, 300)), bias=Normal((300,)), approximate="tanh"),
    Sample("6 one element", x=Normal((1,)), bias=Normal((1,))),
    Sample("7 no rows", x=Normal((0, 16)), bias=Normal((16,))),
    Sample("8 float32 bias", x=Normal((7, 48)), bias=Normal((48,), dtype=_f32)),
    Sample("9 tails", x=_tails, bias=Normal((10,), scale=0.1)),
    Sample("9 tails, tanh", x=_tails, approximate="tanh"),
)

errors = (
    Bad("x integer", TypeError, r"x: .*int64.*floating", x=Values([1, 2], torch.int64)),
    Bad("bias shape", ValueError, r"bias: .*\(3,\).*\(4,\)", x=Normal((2, 4)), bias=Normal((3,))),
    Bad(
        "bias dtype", TypeError, r"bias: .*float64", x=Normal((2, 4)), bias=Normal((4,), dtype=torch.float64)
    ),
    Bad("scalar and bias", ValueError, r"x: .*0-dimensional.*bias", x=Values(1.0), bias=Values(1.0)),
    Bad("approximate", ValueError, r"approximate: .*erf.*none.*tanh", x=Normal((4,)), approximate="erf"),
)

def random(pick: Pick) -> Sample:
    """Any number of leading dimensions, both forms, with and without a bias of either dtype."""
    n = pick.integer(1, 300)
    lead = tuple(pick.integer(0, 5) for _ in range(pick.integer(0, 3)))
    return Sample(
        "random", x=Normal((*lead, n), pick.one_of(1.0, 6.0)), approximate=pick.one_of("none", "tanh"),
        bias=pick.one_of(None, Normal((n,), dtype=pick.one_of(None, _f32))),
    )  # fmt: skip


def case(rows: int = 2048, columns: int = 3072, approximate: str = "tanh") -> Sample:
    """Activations (rows, columns) with a float32 bias."""
    bias = Normal((columns,), dtype=_f32)
    return Sample("case", x=Normal((rows, columns)), bias=bias, approximate=approximate)


shapes = {
    "default": (
        {"rows": 2048, "columns": 3072},
        {"rows": 2048, "columns": 3072, "approximate": "none"},
        {"rows": 512, "columns": 16384},
    ),
    "sweep": tuple({"rows": rows, "columns": 3072} for rows in (64, 512, 4096, 16384)),
    "large": ({"rows": 2**16, "columns": 3072}, {"rows": 2**14, "columns": 16384, "approximate": "none"}),
}


op = register(
    Op(
        name="gelu",
        schema="(Tensor x, Tensor? bias, str approximate) -> Tensor y",
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
        grads=("x", "bias"),
        accumulates=("bias",),
        saved=("x", "bias"),
    )
)


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none", *, tape: Any = None) -> Tensor:
    """gelu(x + bias).

    Args:
        x: (..., N), floating-point; any shape without a bias.
        bias: (N,), of x's dtype or float32; None for 0.
        approximate: "none" for the normal distribution function, "tanh" for its approximation (GPT-2's).
        tape: the engine's, for a forward pass without autograd.

    Returns:
        y, of x's shape and dtype. The sum x + bias is taken in float32 (float64 for float64) and not rounded.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Hendrycks, Gimpel (2016), arXiv:1606.08415.
    """
    check_floating("x", x)
    if bias is not None and x.dim() == 0:
        raise ValueError("x: got a 0-dimensional tensor; allowed: (..., N) with a bias, any shape without")
    check_vector("bias", bias, x)
    check_same_device(x=x, bias=bias)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: got {approximate!r}; allowed: 'none', 'tanh'")
    y: Tensor = op(x, bias, approximate, tape=tape)[0]
    return y
