"""Philox4x32-10 in Triton: the bits of fastlm/philox.py, a tile at a time."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["philox_lanes"]


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
