"""Gated recurrent unit: one layer in one direction over a whole sequence, from inputs that are projected already.

With x_t = W_ih in_t + b_ih (seq, batch, 3 hidden) = [r | z | n] and p = W h_{t-1} + b, of which q is the part of n,

    r, z = sigmoid(x + p)        n = tanh(x_n + r * q)        (each its own part of x and p)
    h_t = (1 - z) * n + z * h_{t-1}        y_t = h_t

Padding, `reverse` and rounding are as in lstm.py. The bias cannot be added to x: r multiplies its part of n.

Gradients, back through time; dh comes with that of y_t added to it, and starts with that of the last h:

    dx_n = dh * (1 - z) * (1 - n**2)
    dx_r = dx_n * q * r * (1 - r)               dx_z = dh * (h_{t-1} - n) * z * (1 - z)
    dp = [dx_r | dx_z | dx_n * r]
    dh_{t-1} = dh * z + dp W
    dW = sum over t of dp_t^T h_{t-1}           db = sum over t and batch of dp_t

and what is left of dh is the gradient of h0. dW is one product after the loop, as in lstm.py.

Saved: r, z, n, q in x's dtype; y, h0.

Edge cases
 1  a bias and a state, odd sizes             6  more rows and units than a block
 2  neither                                   7  no steps: the last state is the first
 3  reversed                                  8  no rows
 4  lengths, also 0 and more than seq         9  one unit, one row
 5  lengths, reversed                        10  saturated gates

Source: Cho et al., "Learning phrase representations using RNN encoder-decoder" (2014), arXiv:1406.1078, with the reset
gate after the product, as torch.nn.GRU and cuDNN have it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .recurrent_math import CELLS
from .recurrent_record import recurrent, register_recurrent, samples_of

__all__ = ["gru"]

_cell = CELLS["gru"]
op = register_recurrent("gru", samples=samples_of(_cell))


def gru(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, h0: Tensor | None = None, *, lengths: Tensor | None = None,
    reverse: bool = False, tape: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A GRU layer in one direction.

    Args:
        x: (seq, batch, 3 * hidden), floating-point: the inputs times weight_ih plus bias_ih, in the order r, z, n.
        weight, bias, h0, lengths, reverse, tape: as those of `fastlm.ops.lstm`, with 3 * hidden rows.

    Returns:
        y (seq, batch, hidden); h (batch, hidden), the state after the last step; of x's dtype. Products are summed in
        float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Cho et al. (2014), arXiv:1406.1078; torch.nn.GRU.
    """
    y, h = recurrent(op, _cell, x, weight, bias, {"h0": h0}, lengths, (), reverse, tape)
    return y, h
