"""Dropout in Triton.

One program a block of _BLOCK successive elements, of which each four share one Philox counter. Backward is
forward with dy for x: the words depend on nothing but the seed and the place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import philox_lanes

__all__ = ["backward", "forward"]

_BLOCK = 2048


@triton.jit
def _fwd_kernel(x, seed, y, n, threshold, scale, BLOCK: tl.constexpr):
    i_start = tl.program_id(0).to(tl.int64) * BLOCK
    i_counter = i_start // 4 + tl.arange(0, BLOCK // 4)
    b_words = philox_lanes(tl.load(seed), i_counter, i_counter >> 32, 0, 0)  # [BLOCK]
    i_x = i_start + tl.arange(0, BLOCK)
    m_x = i_x < n
    b_x = tl.load(x + i_x, mask=m_x, other=0.0).to(tl.float32)
    b_y = tl.where(b_words >= tl.cast(threshold, tl.uint32), b_x * scale, 0.0)
    tl.store(y + i_x, b_y.to(y.dtype.element_ty), mask=m_x)


def forward(x, seed, p, y):
    threshold = int(p * 2.0**32)
    if x.numel() == 0:
        return
    if threshold == 2**32:
        y.zero_()
        return
    n = x.numel()
    _fwd_kernel[(triton.cdiv(n, _BLOCK),)](
        x, seed, y, n, threshold, 1.0 / (1.0 - p), BLOCK=_BLOCK, num_warps=4
    )


def backward(dy, seed, p, dx):
    forward(dy, seed, p, dx)
