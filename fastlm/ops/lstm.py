"""Long short-term memory: one layer in one direction over a whole sequence, from inputs that are projected already.

With x_t = W_ih in_t + b_ih (seq, batch, 4 hidden) = [i | f | g | o] and r = W h_{t-1} + b,

    i, f, o = sigmoid(x + r)        g = tanh(x + r)        (each its own part of x and r)
    c_t = f * c_{t-1} + i * g
    h_t = o * tanh(c_t)        y_t = h_t

At time t >= lengths of a row, padding, the state goes by unchanged and y is 0. With `reverse` time runs from seq - 1 down
to 0, so that a row starts at its last element that is not padding. h is rounded to x's dtype at every step, since the next
product reads it; c never is while the sequence runs.

Gradients, back through time; dh comes with that of y_t added to it, and both start with those of the last h and c:

    dc += dh * o * (1 - tanh(c_t)**2)
    dx_i = dc * g * i * (1 - i)                 dx_f = dc * c_{t-1} * f * (1 - f)
    dx_g = dc * i * (1 - g**2)                  dx_o = dh * tanh(c_t) * o * (1 - o)
    dh_{t-1} = dx_t W                           dc_{t-1} = dc * f
    dW = sum over t of dx_t^T h_{t-1}           db = sum over t and batch of dx_t

and what is left of dh and dc is the gradient of h0 and c0. The sum over t of dW is one product, after the loop, over all
rows of all steps; the rows whose h_{t-1} is h0 are a second, small one. At padding dx is 0 and dh, dc go by unchanged.

Saved: i, f, g, o in x's dtype; c after every step in float32 (float64), which is also what the next step reads; y, h0, c0.

Edge cases
 1  a bias and a state, odd sizes             6  more rows and units than a block
 2  neither                                   7  no steps: the last state is the first
 3  reversed                                  8  no rows
 4  lengths, also 0 and more than seq         9  one unit, one row
 5  lengths, reversed                        10  saturated gates

Sources: Hochreiter, Schmidhuber, "Long short-term memory" (1997); Gers, Schmidhuber, Cummins, "Learning to forget" (2000);
the gates and their order as in torch.nn.LSTM.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..samples import Bad, Normal
from .recurrent_math import CELLS
from .recurrent_record import recurrent, register_recurrent, samples_of

__all__ = ["lstm"]

_cell = CELLS["lstm"]

errors = (
    Bad("c0 alone", ValueError, r"h0: .*None with c0", x=Normal((3, 2, 16)), weight=Normal((16, 4)), c0=Normal((2, 4))),
)

op = register_recurrent("lstm", samples=samples_of(_cell), errors=errors)


def lstm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, h0: Tensor | None = None, c0: Tensor | None = None, *,
    lengths: Tensor | None = None, reverse: bool = False, tape: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """An LSTM layer in one direction.

    Args:
        x: (seq, batch, 4 * hidden), floating-point: the inputs times weight_ih plus bias_ih, in the order i, f, g, o.
        weight: (4 * hidden, hidden), of x's dtype: weight_hh.
        bias: (4 * hidden,), of x's dtype: bias_hh; None for 0.
        h0, c0: (batch, hidden), of x's dtype: the first state; None, both, for 0.
        lengths: (batch,) int64, elements of each row that are not padding; None for all. More than seq counts as seq.
        reverse: from the last element of each row to its first; y stays in the order of x.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        y (seq, batch, hidden); h and c (batch, hidden), the state after the last step; all of x's dtype. Products are
        summed, and c is kept, in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Hochreiter, Schmidhuber (1997); torch.nn.LSTM.
    """
    y, h, c = recurrent(op, _cell, x, weight, bias, {"h0": h0, "c0": c0}, lengths, (), reverse, tape)
    return y, h, c
