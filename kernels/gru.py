"""`gru` in Triton: a form of kernels/recurrent.py."""

from __future__ import annotations

from functools import partial

from .recurrent import compile_cases_of, launch_backward, launch_forward

__all__ = ["backward", "compile_cases", "forward"]


def forward(x, weight, bias, h0, lengths, reverse, y, h, gates):
    launch_forward("gru", x, weight, bias, h0, None, lengths, reverse, y, h, None, gates, None)


def backward(dy, dh, weight, h0, lengths, y, gates, reverse, dx, dweight, dbias, dh0):
    launch_backward(
        "gru", dy, dh, None, weight, h0, None, lengths, y, gates, None, reverse, dx, dweight, dbias, dh0, None
    )  # fmt: skip


compile_cases = partial(compile_cases_of, "gru", 3)
