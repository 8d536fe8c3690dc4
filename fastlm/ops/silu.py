"""Sigmoid linear unit (swish) of a sum with a bias, and dropout after it.

    u = x + bias, not rounded        s = sigmoid(u)
    y = dropout(u * s), see dropout.py

Gradients, with da = dropout(dy) by the same mask and ds/du = s * (1 - s):
    dx = du = da * (s + u * s * (1 - s))        dbias = sum over rows of du

Infinities have their limits, which PyTorch turns into NaN: y(-inf) = 0, y(inf) = inf, their derivatives 0 and 1; a
NaN stays a NaN.

Saved: x, bias and the seed as given; u and the mask are computed again.

Edge cases
 1  several rows, N not a power of two      6  float32 bias with a bfloat16 input
 2  no bias, three dimensions               7  far tails
 3  more than one block of rows and columns 8  dropout, rows that share Philox counters and rows that do not
 4  one element                             9  everything dropped
 5  no rows

Source: Hendrycks, Gimpel, "Gaussian error linear units" (2016), arXiv:1606.08415, section 4, which names it; Elfwing,
Uchibe, Doya, "Sigmoid-weighted linear units" (2017), arXiv:1702.03118.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .activation_record import activate, register_activation

__all__ = ["silu"]

op = register_activation("silu", F.silu)


def silu(
    x: Tensor, bias: Tensor | None = None, *, dropout_p: float = 0.0, seed: Tensor | None = None, tape: Any = None
) -> Tensor:
    """dropout(silu(x + bias)), with silu(u) = u * sigmoid(u).

    Args:
        x: (..., N), floating-point, with any strides; any shape without a bias.
        bias: (N,), of x's dtype or float32; None for 0.
        dropout_p: probability of dropping an element of the result, 0 to 1.
        seed: of the mask, as `fastlm.ops.dropout`'s; None draws one where it is needed.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        y, of x's shape and dtype. The sum x + bias is taken in float32 (float64 for float64) and not rounded.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Elfwing, Uchibe, Doya (2017), arXiv:1702.03118.
    """
    return activate(op, x, bias, (), dropout_p, seed, tape)
