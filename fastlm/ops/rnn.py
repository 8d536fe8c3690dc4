"""Elman's recurrent layer: one layer in one direction over a whole sequence, from inputs that are projected already.

With x_t = W_ih in_t + b_ih (seq, batch, hidden),

    h_t = act(x_t + W h_{t-1} + b)        y_t = h_t        act = tanh or relu

Padding, `reverse` and rounding are as in lstm.py.

Gradients, back through time; dh comes with that of y_t added to it, and starts with that of the last h:

    dx_t = dh * (1 - h_t**2)        relu: dh where h_t > 0
    dh_{t-1} = dx_t W
    dW = sum over t of dx_t^T h_{t-1}           db = sum over t and batch of dx_t

and what is left of dh is the gradient of h0. dW is one product after the loop, as in lstm.py.

Saved: y, h0.

Edge cases
 1  a bias and a state, odd sizes             6  more rows and units than a block
 2  neither                                   7  no steps: the last state is the first
 3  reversed                                  8  no rows
 4  lengths, also 0 and more than seq         9  one unit, one row
 5  lengths, reversed                        10  saturated gates
11  relu, as far as 1 and 5

Source: Elman, "Finding structure in time" (1990), as torch.nn.RNN has it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..samples import Bad, Normal, Sample
from .recurrent_math import CELLS
from .recurrent_record import recurrent, register_recurrent, samples_of

__all__ = ["rnn"]

_NONLINEARITIES = ("tanh", "relu")
_cell = CELLS["rnn_tanh"]
_tanh = samples_of(_cell)
samples = (
    *_tanh,
    *(Sample(f"11 relu, {s.edge}", **s.args, nonlinearity="relu") for s in (_tanh[0], _tanh[4])),
)
errors = (
    Bad("nonlinearity", ValueError, r"nonlinearity: .*'gelu'.*tanh, relu", x=Normal((3, 2, 4)), weight=Normal((4, 4)),
        nonlinearity="gelu"),
)  # fmt: skip

op = register_recurrent("rnn", "str nonlinearity", samples=samples, errors=errors, choices=_NONLINEARITIES)


def rnn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, h0: Tensor | None = None, *, nonlinearity: str = "tanh",
    lengths: Tensor | None = None, reverse: bool = False, tape: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """An Elman layer in one direction.

    Args:
        x: (seq, batch, hidden), floating-point: the inputs times weight_ih plus bias_ih.
        weight, bias, h0, lengths, reverse, tape: as those of `fastlm.ops.lstm`, with hidden rows.
        nonlinearity: "tanh" or "relu".

    Returns:
        y (seq, batch, hidden); h (batch, hidden), the state after the last step; of x's dtype. Products are summed in
        float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Elman (1990); torch.nn.RNN.
    """
    if nonlinearity not in _NONLINEARITIES:
        raise ValueError(f"nonlinearity: got {nonlinearity!r}; allowed: {', '.join(_NONLINEARITIES)}")
    y, h = recurrent(op, _cell, x, weight, bias, {"h0": h0}, lengths, (nonlinearity,), reverse, tape)
    return y, h
