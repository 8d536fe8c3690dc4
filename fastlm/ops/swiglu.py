"""SiLU-gated linear unit: one half of a projection through SiLU, times the other, and dropout after it.

    g = gate + gate_bias        w = up + up_bias        (neither rounded)
    s = sigmoid(g)
    y = dropout(g * s * w), see dropout.py; the elements are numbered as y's in contiguous order

Gradients, with da = dropout(dy) by the same mask and ds/dg = s * (1 - s):
    d_gate = da * w * (s + g * s * (1 - s))
    d_up   = da * g * s
    d_gate_bias, d_up_bias = sums over rows of d_gate, d_up, in float32

Without `up`, gate is packed (..., 2 N) = [gate | up] along the last dimension, its bias and their gradients likewise;
with up_first the halves are [up | gate], the order of torch.nn.functional.glu, which activates the second half.

Saved: the inputs as given and the seed; the activation, its derivative and the mask are computed again.

Edge cases
 1  gate and up apart, N not a power of two    6  a bias of one half only, in float32
 2  packed, three dimensions                   7  no rows
 3  packed with up first                       8  far tails
 4  apart, no biases                           9  dropout, rows that share Philox counters and rows that do not
 5  more than one block of rows and columns

Source: Shazeer, "GLU variants improve transformer" (2020), arXiv:2002.05202, section 2.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .gated_record import gated, register_gated

__all__ = ["swiglu"]

op = register_gated("swiglu", F.silu)


def swiglu(
    gate: Tensor, up: Tensor | None = None, gate_bias: Tensor | None = None, up_bias: Tensor | None = None,
    *, up_first: bool = False, dropout_p: float = 0.0, seed: Tensor | None = None, tape: Any = None,
) -> Tensor:  # fmt: skip
    """dropout(silu(gate + gate_bias) * (up + up_bias)).

    Args:
        gate: (..., N), floating-point, with any strides: the halves of ``x.chunk(2, -1)`` are read where they lie.
            Without up: packed (..., 2 N), [gate | up].
        up: as gate; None if gate is packed.
        gate_bias, up_bias: (N,), of gate's dtype or float32; None for 0. Packed: gate_bias (2 N,) in gate's order.
        up_first: packed as [up | gate] instead, as torch.nn.functional.glu has it.
        dropout_p: probability of dropping an element of the result, 0 to 1.
        seed: of the mask, as `fastlm.ops.dropout`'s; None draws one where it is needed.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        y (..., N), of gate's dtype. All arithmetic in float32 (float64 for float64), rounded once.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Shazeer (2020), arXiv:2002.05202.
    """
    return gated(op, gate, up, gate_bias, up_bias, (), up_first, dropout_p, seed, tape)
