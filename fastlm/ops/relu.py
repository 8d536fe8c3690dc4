"""Rectified linear unit of a sum with a bias, and dropout after it.

    u = x + bias, not rounded
    y = dropout(max(u, 0)), see dropout.py

Gradients, with da = dropout(dy) by the same mask:
    dx = du = da where u > 0, else 0 (also at u = 0)        dbias = sum over rows of du

A NaN stays a NaN, and as in PyTorch its gradient is that of a positive number.

Saved: x, bias and the seed as given; u and the mask are computed again.

Edge cases
 1  several rows, N not a power of two      6  float32 bias with a bfloat16 input
 2  no bias, three dimensions               7  far tails
 3  more than one block of rows and columns 8  dropout, rows that share Philox counters and rows that do not
 4  one element                             9  everything dropped
 5  no rows

Source: Nair, Hinton, "Rectified linear units improve restricted Boltzmann machines" (ICML 2010).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activation_record import activate, register_activation

__all__ = ["relu"]

op = register_activation("relu", torch.relu, flops=(1.0, 1.0))


def relu(
    x: Tensor, bias: Tensor | None = None, *, dropout_p: float = 0.0, seed: Tensor | None = None, tape: Any = None
) -> Tensor:
    """dropout(max(x + bias, 0)).

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

    Source: Nair, Hinton (ICML 2010).
    """
    return activate(op, x, bias, (), dropout_p, seed, tape)
