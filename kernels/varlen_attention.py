"""Attention over packed sequences in Triton: the kernels of attention.py, each program in one sequence.

The grid is that of a batch of the longest lengths; programs beyond a sequence's end return at once.
"""

from __future__ import annotations

import torch

from .attention import launch_forward
from .attention_backward import launch_backward
from .attention_terms import prepare
from .common import meta

__all__ = ["backward", "compile_cases", "forward"]


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


def compile_cases():
    """What the op's own shapes do not have: dropout and T5's bias."""
    for d in (64, 128):
        ends = meta(17, dtype=torch.int32)
        packed = {n: meta(16384, 16, d) for n in "qkv"} | {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        packed |= {"max_seqlen_q": 2048, "max_seqlen_k": 2048, "causal": True}
        yield packed | {
            "relative_bias": meta(32, 16, dtype=torch.float32), "dropout_p": 0.1,
            "dropout_seed": meta(1, dtype=torch.int64),
        }  # fmt: skip
