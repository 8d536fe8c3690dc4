"""Rotary position embedding in Triton.

One program a block of tokens of one sequence and a few of its heads: the rows of the tables are read once for all these
heads. Both members of a pair are in one thread's hands before either is written, so y may be x. Backward is forward with
the angle's sign changed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import meta

__all__ = ["backward", "compile_cases", "forward"]

_TILE = 1024  # pairs a program holds at once
_HEADS = 4  # that a program turns, one after the other


@triton.jit
def _turn_kernel(x, cos, sin, positions, y, sign, H, S, P, xb, xh, xs, yb, yh, ys, pb, ps,
                 HALF: tl.constexpr, REST: tl.constexpr, HAS_POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr,
                 HEADS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    i_token = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    i_batch = tl.program_id(2).to(tl.int64)
    i_pair = tl.arange(0, BLOCK_P)
    m_token = i_token < S
    m = m_token[:, None] & (i_pair < HALF)[None, :]
    if HAS_POSITIONS:
        i_place = tl.load(positions + i_batch * pb + i_token * ps, mask=m_token, other=0)
        m_place = m & ((i_place >= 0) & (i_place < P))[:, None]
    else:
        i_place = i_token
        m_place = m
    i_table = i_place[:, None] * HALF + i_pair[None, :]
    b_c = tl.load(cos + i_table, mask=m_place, other=float("nan"))  # [BLOCK_S, BLOCK_P]
    b_s = tl.load(sin + i_table, mask=m_place, other=float("nan")) * sign
    x += i_batch * xb + i_token[:, None] * xs
    y += i_batch * yb + i_token[:, None] * ys
    for i in range(HEADS):
        i_head = tl.program_id(1).to(tl.int64) * HEADS + i
        m_head = m & (i_head < H)
        p_x = x + i_head * xh
        p_y = y + i_head * yh
        if INTERLEAVED:
            i_both = tl.arange(0, 2 * BLOCK_P)
            m_both = m_token[:, None] & (i_both < 2 * HALF)[None, :] & (i_head < H)
            b_x = tl.load(p_x + i_both[None, :], mask=m_both, other=0.0).to(tl.float32)
            b_1, b_2 = tl.split(tl.reshape(b_x, [BLOCK_S, BLOCK_P, 2]))
            b_y = tl.interleave(b_1 * b_c - b_2 * b_s, b_2 * b_c + b_1 * b_s)
            tl.store(p_y + i_both[None, :], b_y.to(y.dtype.element_ty), mask=m_both)
        else:
            b_1 = tl.load(p_x + i_pair[None, :], mask=m_head, other=0.0).to(tl.float32)
            b_2 = tl.load(p_x + HALF + i_pair[None, :], mask=m_head, other=0.0).to(tl.float32)
            tl.store(p_y + i_pair[None, :], (b_1 * b_c - b_2 * b_s).to(y.dtype.element_ty), mask=m_head)
            tl.store(p_y + HALF + i_pair[None, :], (b_2 * b_c + b_1 * b_s).to(y.dtype.element_ty), mask=m_head)
        if REST > 0:
            i_rest = tl.arange(0, BLOCK_R)
            m_rest = m_token[:, None] & (i_rest < REST)[None, :] & (i_head < H)
            b_rest = tl.load(p_x + 2 * HALF + i_rest[None, :], mask=m_rest, other=0.0)
            tl.store(p_y + 2 * HALF + i_rest[None, :], b_rest, mask=m_rest)


def _turn(x, cos, sin, positions, interleaved, y, sign):
    if x.numel() == 0:
        return
    batch, heads, seq, dim = x.shape
    half = cos.shape[1]
    rest = dim - 2 * half
    block_p = triton.next_power_of_2(half)
    block_s = max(1, min(_TILE // block_p, triton.next_power_of_2(seq)))
    cos, sin = cos.contiguous(), sin.contiguous()
    pb, ps = (0, 0) if positions is None else positions.stride()
    _turn_kernel[(triton.cdiv(seq, block_s), triton.cdiv(heads, _HEADS), batch)](
        x, cos, sin, positions, y, sign, heads, seq, cos.shape[0], *x.stride()[:3], *y.stride()[:3], pb, ps,
        HALF=half, REST=rest, HAS_POSITIONS=positions is not None, INTERLEAVED=interleaved, HEADS=_HEADS,
        BLOCK_S=block_s, BLOCK_P=block_p, BLOCK_R=triton.next_power_of_2(max(rest, 1)), num_warps=4,
    )  # fmt: skip


def forward(x, cos, sin, positions, interleaved, y):
    _turn(x, cos, sin, positions, interleaved, y, 1.0)


def backward(dy, cos, sin, positions, interleaved, dx):
    if dx is not None:
        _turn(dy, cos, sin, positions, interleaved, dx, -1.0)


def compile_cases():
    """Partial, with positions, wide heads, and a number of pairs that no power of two is."""
    for dim, rotary, interleaved in ((128, 32, False), (256, 64, True), (256, 256, False), (96, 96, True)):
        tables = {name: meta(2048, rotary // 2, dtype=torch.float32) for name in ("cos", "sin")}
        positions = meta(4, 2048, dtype=torch.int64)
        yield {"x": meta(4, 16, 2048, dim), **tables, "positions": positions, "interleaved": interleaved}
