"""Attention over packed sequences in Triton: the kernels of attention.py, each program in one sequence.

The grid is that of a batch of the longest lengths; programs beyond a sequence's end return at once.
"""

from __future__ import annotations

import torch

from .attention import launch_forward
from .attention_backward import launch_backward
from .attention_terms import prepare

__all__ = ["backward", "forward"]


def forward(q, k, v, *rest):
    *terms, longest_q, longest_k, out, lse = rest
    out.zero_()  # rows of no sequence, and of queries beyond the longest length that was told
    lse.fill_(-torch.inf)
    launch_forward(q, k, v, out, lse, prepare(q, k, v, *terms, (longest_q, longest_k), "forward"))


def backward(dout, dlse, q, k, v, *rest):
    *terms, longest_q, longest_k, dq, dk, dv, d_bias, d_relative_bias, d_sinks = rest
    out, lse = terms[8:10]
    for gradient in (dq, dk, dv):
        if gradient is not None:
            gradient.zero_()
    call = prepare(q, k, v, *terms[:8], *terms[10:], (longest_q, longest_k), "backward")
    launch_backward(dout, dlse, q, k, v, out, lse, call, dq, dk, dv, d_bias, d_relative_bias, d_sinks)
