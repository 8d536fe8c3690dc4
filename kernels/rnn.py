"""`rnn` in Triton: a form of kernels/recurrent.py."""

from __future__ import annotations

from .recurrent import compile_cases_of, launch_backward, launch_forward

__all__ = ["backward", "compile_cases", "forward"]


def forward(x, weight, bias, h0, lengths, nonlinearity, reverse, y, h):
    launch_forward(
        f"rnn_{nonlinearity}", x, weight, bias, h0, None, lengths, reverse, y, h, None, None, None
    )


def backward(dy, dh, weight, h0, lengths, y, nonlinearity, reverse, dx, dweight, dbias, dh0):
    launch_backward(
        f"rnn_{nonlinearity}", dy, dh, None, weight, h0, None, lengths, y, None, None, reverse, dx, dweight, dbias,
        dh0, None,
    )  # fmt: skip


def compile_cases():
    """Both nonlinearities."""
    for nonlinearity in ("tanh", "relu"):
        yield from compile_cases_of("rnn", 1, nonlinearity=nonlinearity)
