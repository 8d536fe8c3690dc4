"""Gaussian error linear unit of a sum with a bias, and dropout after it.

    u = x + bias, not rounded
    "none"    a = u * Phi(u)          Phi(u) = erfc(-u / sqrt(2)) / 2, the normal distribution function
    "tanh"    a = u * sigmoid(2 z)    z = sqrt(2 / pi) * (u + 0.044715 * u**3)
              sigmoid(2 z) = (1 + tanh z) / 2
    y = dropout(a), see dropout.py; the elements are numbered as y's in contiguous order

Gradients, with phi(u) = exp(-u**2 / 2) / sqrt(2 pi) the derivative of Phi and s = sigmoid(2 z):
    da = dropout(dy) by the same mask
    "none"    du = da * (Phi(u) + u * phi(u))
    "tanh"    du = da * (s + u * s * (1 - s) * 2 * dz/du)     dz/du = sqrt(2 / pi) * (1 + 3 * 0.044715 * u**2)
    dx = du            dbias = sum over rows of du

Infinities have their limits, which PyTorch turns into NaN: y(-inf) = 0, y(inf) = inf, their derivatives 0 and 1; a
NaN stays a NaN.

Saved: x, bias and the seed as given; u and the mask are computed again.

Edge cases
 1  several rows, N not a power of two      6  float32 bias with a bfloat16 input
 2  no bias, three dimensions               7  far tails
 3  more than one block of rows and columns 8  dropout, rows that share Philox counters and rows that do not
 4  one element                             9  everything dropped
 5  no rows                                10  the form by erf

Source: Hendrycks, Gimpel, "Gaussian error linear units" (2016), arXiv:1606.08415, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..samples import Bad, Normal, Pick, Sample
from .activation_record import TAILS, activate, random_of, register_activation, samples_of, shapes

__all__ = ["gelu"]


def random(pick: Pick) -> Sample:
    """Both forms."""
    return random_of(pick, approximate=pick.one_of("none", "tanh"))


def gelu_case(rows: int = 2048, columns: int = 3072, approximate: str = "tanh") -> Sample:
    """Activations (rows, columns) with a float32 bias, as after a projection."""
    bias = Normal((columns,), dtype=torch.float32)
    return Sample("case", x=Normal((rows, columns)), bias=bias, approximate=approximate)


op = register_activation(
    "gelu",
    F.gelu,
    "str approximate",
    samples=(
        *samples_of(approximate="tanh"),
        Sample("10 erf", x=Normal((5, 37), scale=2.0), bias=Normal((37,))),
        Sample("10 erf, tails", x=TAILS, bias=Normal((11,), scale=0.1)),
    ),
    bad=(Bad("approximate", ValueError, r"approximate: .*erf.*none.*tanh", x=Normal((4,)), approximate="erf"),),
    flops=(20.0, 30.0),
    random=random,
    case=gelu_case,
    shapes={
        "default": (*shapes["default"], {"rows": 2048, "columns": 3072, "approximate": "none"}),
        "sweep": shapes["sweep"],
        "large": (*shapes["large"], {"rows": 2**14, "columns": 16384, "approximate": "none"}),
    },
)


def gelu(
    x: Tensor, bias: Tensor | None = None, approximate: str = "none", *, dropout_p: float = 0.0,
    seed: Tensor | None = None, tape: Any = None,
) -> Tensor:  # fmt: skip
    """dropout(gelu(x + bias)).

    Args:
        x: (..., N), floating-point, with any strides; any shape without a bias.
        bias: (N,), of x's dtype or float32; None for 0.
        approximate: "none" for the normal distribution function, "tanh" for its approximation (GPT-2's).
        dropout_p: probability of dropping an element of the result, 0 to 1.
        seed: of the mask, as `fastlm.ops.dropout`'s; None draws one where it is needed.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        y, of x's shape and dtype. The sum x + bias is taken in float32 (float64 for float64) and not rounded.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Hendrycks, Gimpel (2016), arXiv:1606.08415.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: got {approximate!r}; allowed: 'none', 'tanh'")
    return activate(op, x, bias, (approximate,), dropout_p, seed, tape)
