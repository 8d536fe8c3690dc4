"""The formulas of the recurrent layers in plain PyTorch: a table of cells, and the loop over time that they share.

Of a cell, (batch, hidden) each and in float32 (float64):

    step   (x's parts, recurrent parts, state)                -> new state, what backward needs of it
    back   (gradient of the new state, state before, what step kept) -> gradients of x's parts, of the recurrent parts,
                                                                        of the state before, where it is read as it is

A state is (h,), of LSTM (h, c). Time runs from 0 up, or with `reverse` from seq - 1 down; at a place that is padding
(time >= lengths of the row) the state goes by unchanged and the output is 0, so that a reversed row starts at its last
element, whatever follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__: list[str] = []

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Cell:
    """A row of the table. gates: parts of x and of the recurrent product; kept: parts that `step` keeps; c: of h and c."""

    gates: int
    kept: int
    c: bool
    step: Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]
    back: Callable[[Tensors, Tensors, Tensors, Tensors], tuple[Tensors, Tensors, Tensors]]


def _lstm_step(x: Tensors, r: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    i, f, g, o = (a + b for a, b in zip(x, r, strict=True))
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * state[1] + i * g
    return (o * c.tanh(), c), (i, f, g, o)


def _lstm_back(d: Tensors, before: Tensors, after: Tensors, kept: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    i, f, g, o = kept
    squashed = after[1].tanh()
    dc = d[1] + d[0] * o * (1 - squashed * squashed)
    dx = (
        dc * g * i * (1 - i),
        dc * before[1] * f * (1 - f),
        dc * i * (1 - g * g),
        d[0] * squashed * o * (1 - o),
    )
    return dx, dx, (torch.zeros_like(dc), dc * f)


def _gru_step(x: Tensors, r: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    reset, update = (x[0] + r[0]).sigmoid(), (x[1] + r[1]).sigmoid()
    new = (x[2] + reset * r[2]).tanh()
    return ((1 - update) * new + update * state[0],), (reset, update, new, r[2])


def _gru_back(d: Tensors, before: Tensors, after: Tensors, kept: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    reset, update, new, q = kept
    d_new = d[0] * (1 - update) * (1 - new * new)
    d_reset = d_new * q * reset * (1 - reset)
    d_update = d[0] * (before[0] - new) * update * (1 - update)
    return (d_reset, d_update, d_new), (d_reset, d_update, d_new * reset), (d[0] * update,)


def _tanh_step(x: Tensors, r: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    return ((x[0] + r[0]).tanh(),), ()


def _tanh_back(d: Tensors, before: Tensors, after: Tensors, kept: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    dx = (d[0] * (1 - after[0] * after[0]),)
    return dx, dx, (torch.zeros_like(d[0]),)


def _relu_step(x: Tensors, r: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    return ((x[0] + r[0]).relu(),), ()


def _relu_back(d: Tensors, before: Tensors, after: Tensors, kept: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    dx = (d[0].masked_fill(after[0] <= 0, 0.0),)
    return dx, dx, (torch.zeros_like(d[0]),)


CELLS = {
    "lstm": Cell(4, 4, True, _lstm_step, _lstm_back),
    "gru": Cell(3, 4, False, _gru_step, _gru_back),
    "rnn_tanh": Cell(1, 0, False, _tanh_step, _tanh_back),
    "rnn_relu": Cell(1, 0, False, _relu_step, _relu_back),
}


def wide(t: Tensor) -> Tensor:
    """In the dtype that sums are made in."""
    return t if t.dtype == torch.float64 else t.float()


def _start(given: Tensor | None, like: Tensor, batch: int, hidden: int) -> Tensor:
    return wide(like.new_zeros(batch, hidden) if given is None else given)


def forward(
    cell: Cell, x: Tensor, weight: Tensor, bias: Tensor | None, starts: tuple[Tensor | None, ...],
    lengths: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensors, Tensor, Tensor]:  # fmt: skip
    """x (seq, batch, gates * hidden) -> y (seq, batch, hidden); the last state; what step kept (seq, batch, kept * hidden)
    in x's dtype; the state c after every place (seq, batch, hidden), in float32."""
    (seq, batch, _), hidden = x.shape, weight.shape[1]
    w, b = wide(weight), None if bias is None else wide(bias)
    state = tuple(_start(s, x, batch, hidden) for s in starts)
    y = [x.new_zeros(batch, hidden)] * seq
    kept, cells = [x.new_zeros(batch, cell.kept * hidden)] * seq, [w.new_zeros(batch, hidden)] * seq
    for t in reversed(range(seq)) if reverse else range(seq):
        product = torch.nn.functional.linear(state[0], w, b)
        new, keep = cell.step(wide(x[t]).chunk(cell.gates, -1), product.chunk(cell.gates, -1), state)
        new = (wide(new[0].to(x.dtype)), *new[1:])
        h = new[0]
        if lengths is not None:
            here = (t < lengths)[:, None]
            new = tuple(torch.where(here, n, s) for n, s in zip(new, state, strict=True))
            h = torch.where(here, h, 0.0)
            keep = tuple(torch.where(here, k, 0.0) for k in keep)
        y[t], state = h.to(x.dtype), new
        if keep:
            kept[t] = torch.cat(keep, -1).to(x.dtype)
        if cell.c:
            cells[t] = state[1]
    return (
        torch.stack(y) if seq else x.new_zeros(0, batch, hidden),
        tuple(s.to(x.dtype) for s in state),
        torch.stack(kept) if seq else x.new_zeros(0, batch, cell.kept * hidden),
        torch.stack(cells) if seq else w.new_zeros(0, batch, hidden),
    )


def backward(
    cell: Cell, dy: Tensor | None, d_state: tuple[Tensor | None, ...], weight: Tensor, starts: tuple[Tensor | None, ...],
    lengths: Tensor | None, y: Tensor, kept: Tensor | None, cells: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensors]:  # fmt: skip
    """Gradients of x (seq, batch, gates * hidden), of weight, of bias, of the first state; in float32 (float64)."""
    seq, batch, hidden = y.shape
    w = wide(weight)
    first = tuple(_start(s, y, batch, hidden) for s in starts)
    d = tuple(_start(s, y, batch, hidden) for s in d_state)
    dx = [w.new_zeros(batch, cell.gates * hidden)] * seq
    d_recurrent, h_before = list(dx), [first[0]] * seq
    for t in range(seq) if reverse else reversed(range(seq)):
        before, last = first, t == (seq - 1 if reverse else 0)
        if not last:
            s = t + 1 if reverse else t - 1
            h = wide(y[s])
            if reverse and lengths is not None:  # the output is 0 at padding, where the state went by
                h = torch.where((s < lengths)[:, None], h, first[0])
            before = (h,) if cells is None else (h, cells[s])
        after = (wide(y[t]),) if cells is None else (wide(y[t]), cells[t])
        full = d if dy is None else (d[0] + wide(dy[t]), *d[1:])
        keep = () if kept is None else wide(kept[t]).chunk(cell.kept, -1)
        x_parts, r_parts, passed = cell.back(full, before, after, keep)
        dx[t], d_recurrent[t], h_before[t] = torch.cat(x_parts, -1), torch.cat(r_parts, -1), before[0]
        new = (passed[0] + d_recurrent[t] @ w, *passed[1:])
        if lengths is not None:
            here = (t < lengths)[:, None]
            dx[t], d_recurrent[t] = (torch.where(here, part, 0.0) for part in (dx[t], d_recurrent[t]))
            new = tuple(torch.where(here, n, old) for n, old in zip(new, d, strict=True))
        d = new
    if not seq:
        return w.new_zeros(0, batch, w.shape[0]), torch.zeros_like(w), w.new_zeros(w.shape[0]), d
    rows = torch.cat(d_recurrent)  # (seq * batch, gates * hidden)
    return torch.stack(dx), rows.t() @ torch.cat(h_before), rows.sum(0), d
