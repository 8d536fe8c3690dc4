"""Philox4x32-10 in Triton: the bits of fastlm/philox.py, a tile at a time."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["keep_tile", "philox_lanes"]


@triton.jit
def philox_lanes(seed, c0, c1, c2, c3):
    """uint32 words [..., 4 N] of the counters c0 [..., N], c1, c2, c3 (tiles of that shape or scalars).

    Word 4 i + j is word j of counter i: all four words of a counter are used, in the order of memory.
    seed: a loaded int64. Counters: integers of any width, whose low 32 bits count.
    """
    b_0, b_1, b_2, b_3 = tl.philox(
        seed, c0.to(tl.uint32), tl.to_tensor(c1).to(tl.uint32), tl.to_tensor(c2).to(tl.uint32),
        tl.to_tensor(c3).to(tl.uint32), n_rounds=10,
    )  # fmt: skip
    return tl.interleave(tl.interleave(b_0, b_2), tl.interleave(b_1, b_3))


@triton.jit
def keep_tile(seed, i_row, N, i_col, most_dropped, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Where dropout keeps the elements [ROWS, BLOCK] of a matrix of N columns, from row i_row and column i_col on.

    The mask of fastlm/ops/dropout.py: an element's word is that of its place in contiguous order.
    seed: the pointer; i_row: int64; i_col: a multiple of BLOCK; most_dropped: the largest word of a dropped element.
    ALIGNED: N and BLOCK are multiples of 4, so that four successive elements of a row share one counter.
    """
    i_start = i_row * N + i_col
    rows = tl.arange(0, ROWS)[:, None]
    if ALIGNED:
        i_counter = i_start // 4 + (rows * (N // 4) + tl.arange(0, BLOCK // 4)[None, :])
        b_words = philox_lanes(tl.load(seed), i_counter, i_counter >> 32, 0, 0)
    else:
        i_element = i_start + (rows * N + tl.arange(0, BLOCK)[None, :])
        i_counter = i_element >> 2
        b_0, b_1, b_2, b_3 = tl.philox(
            tl.load(seed), i_counter.to(tl.uint32), (i_counter >> 32).to(tl.uint32), 0, 0, n_rounds=10
        )
        b_even = tl.where((i_element & 2) == 0, b_0, b_2)
        b_odd = tl.where((i_element & 2) == 0, b_1, b_3)
        b_words = tl.where((i_element & 1) == 0, b_even, b_odd)
    return b_words > tl.cast(most_dropped, tl.uint32)
