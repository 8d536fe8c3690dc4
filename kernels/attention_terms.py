"""What shapes the scores of attention beside q and k, for its kernels: who sees whom, and what is added.

A kernel gets the options as one constexpr `F` of flags, so that what is not asked for costs nothing, and their tensors
and numbers as one tuple `t` (Terms). i and j are positions of queries and keys, counted from the start of their
sequence; in tiles they broadcast, [M, 1] and [1, N], or the other way round where scores are transposed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..ops.attention_math import relative_position_bucket
from ..philox import drop_threshold
from .attention_tiles import padded
from .common import INTERPRETING, tanh

__all__ = [
    "ALIBI", "ANY_GENERAL", "BIAS", "CAP", "DROPOUT", "LEFT", "LENGTHS", "MASK", "NEGATIVE", "PACKED", "RELATIVE", "RIGHT",
    "SEGMENTS", "SHAPED", "SINKS", "TOP_LEFT", "Call", "Sizes", "Terms", "cuts", "head_terms", "ids_of", "prepare",
    "runs", "scores", "seen", "sequence", "spans",
]  # fmt: skip

BIAS = tl.constexpr(1)  # a floating-point bias
MASK = tl.constexpr(2)  # a boolean one
RELATIVE = tl.constexpr(4)  # T5's bias, as a table by distance
ALIBI = tl.constexpr(8)
CAP = tl.constexpr(16)
SHAPED = tl.constexpr(1 + 4 + 8 + 16)  # a score is more than scale times a product
LEFT = tl.constexpr(32)  # windows
RIGHT = tl.constexpr(64)
SEGMENTS = tl.constexpr(128)
LENGTHS = tl.constexpr(256)
TOP_LEFT = tl.constexpr(512)
DROPOUT = tl.constexpr(1024)
SINKS = tl.constexpr(2048)
PACKED = tl.constexpr(4096)
NEGATIVE = tl.constexpr(8192)  # of a score that is not shaped: -scale is given
ANY_GENERAL = tl.constexpr(2 + 4 + 32 + 64 + 128)  # for a tile of keys, steps over queries may not be interior


class Terms(NamedTuple):
    """Tensors and numbers of the options; None and 0 for those not in use."""

    bias: torch.Tensor | None
    bias_b: int  # strides, 0 where broadcast
    bias_h: int
    bias_i: int
    bias_j: int
    table: torch.Tensor | None  # (heads, 2 clip + 1) float32: the bias of distances -clip to clip
    clip: int
    sinks: torch.Tensor | None
    slopes: torch.Tensor | None
    slopes_b: int
    lengths: torch.Tensor | None
    q_ids: torch.Tensor | None
    q_ids_b: int
    k_ids: torch.Tensor | None
    k_ids_b: int
    cu_q: torch.Tensor | None
    cu_k: torch.Tensor | None
    seed: torch.Tensor | None
    left: int
    right: int
    scale: float
    softcap: float
    threshold: int
    keep_scale: float


class Sizes(NamedTuple):
    """batches, query heads, heads that read one key head, lengths (the longest where packed), head dims."""

    batches: int
    heads: int
    group: int
    queries: int
    keys: int
    d: int
    dv: int


@triton.jit
def sequence(t, n, i_batch, F: tl.constexpr):
    """First row of queries and of keys, their numbers, the keys that exist, and the position of query 0."""
    if PACKED & F:
        i_q, i_k = tl.load(t.cu_q + i_batch).to(tl.int64), tl.load(t.cu_k + i_batch).to(tl.int64)
        queries = (tl.load(t.cu_q + i_batch + 1) - i_q).to(tl.int32)
        keys = (tl.load(t.cu_k + i_batch + 1) - i_k).to(tl.int32)
    else:
        i_q, i_k, queries, keys = 0, 0, n.queries, n.keys
    n_keys = keys
    if LENGTHS & F:
        n_keys = tl.minimum(tl.maximum(tl.load(t.lengths + i_batch), 0), keys).to(tl.int32)
    shift = 0
    if not (TOP_LEFT & F):
        shift = keys - queries
    return i_q, i_k, queries, keys, n_keys, shift


@triton.jit
def head_terms(t, i_batch, i_head, F: tl.constexpr):
    """(address of the head's bias, address of its table at distance 0, its slope); 0 for what is not in use."""
    p_bias, p_table, slope = 0, 0, 0.0
    if (BIAS | MASK) & F:
        p_bias = t.bias + i_batch * t.bias_b + i_head * t.bias_h
    if RELATIVE & F:
        p_table = t.table + i_head * (2 * t.clip + 1) + t.clip
    if ALIBI & F:
        slope = tl.load(t.slopes + i_batch * t.slopes_b + i_head)
    return p_bias, p_table, slope


@triton.jit
def scores(b_x, i, j, before, t, here, shift, n_rows, n_keys, NEAR: tl.constexpr, F: tl.constexpr):
    """Scores from products, to be multiplied by t.scale unless SHAPED; and the soft cap's derivative, if there is one.

    NEAR: distances may be less than clip; else all keys are farther off, before the queries or not.
    """
    b_slope = 1.0
    if NEGATIVE & F:
        b_x = -b_x
    if SHAPED & F:
        b_x = b_x * t.scale
        if CAP & F:
            b_bent = tanh(b_x / t.softcap)
            b_x = b_bent * t.softcap
            b_slope = 1.0 - b_bent * b_bent
        if BIAS & F:
            p_tile = here[0] + i.to(tl.int64) * t.bias_i + j.to(tl.int64) * t.bias_j
            b_x += tl.load(p_tile, mask=(i < n_rows) & (j < n_keys), other=0.0).to(tl.float32)
        if RELATIVE & F:
            if NEAR:
                b_x += tl.load(here[1] + tl.minimum(tl.maximum(j - i - shift, -t.clip), t.clip))
            else:
                b_x += tl.load(here[1] + tl.where(before, -t.clip, t.clip))
        if ALIBI & F:
            b_x -= here[2] * tl.abs(j - i - shift).to(tl.float32)
    return b_x, b_slope


@triton.jit
def seen(i, j, b_qi, b_kj, t, here, shift, n_rows, n_keys, F: tl.constexpr):
    """Which keys each query sees. b_qi, b_kj: their segments."""
    m_seen = j < n_keys
    if LEFT & F:
        m_seen = m_seen & (j >= i + shift - t.left)
    if RIGHT & F:
        m_seen = m_seen & (j <= i + shift + t.right)
    if SEGMENTS & F:
        m_seen = m_seen & (b_qi == b_kj)
    if MASK & F:
        p_tile = here[0] + i.to(tl.int64) * t.bias_i + j.to(tl.int64) * t.bias_j
        m_seen = m_seen & (tl.load(p_tile, mask=(i < n_rows) & (j < n_keys), other=0) != 0)
    return m_seen


@triton.jit
def ids_of(ids, stride, i_batch, i, n, F: tl.constexpr):
    """Segments of positions i; 0 where there are none."""
    b_ids = 0
    if SEGMENTS & F:
        b_ids = tl.load(ids + i_batch * stride + i, mask=i < n, other=0)
    return b_ids


@triton.jit
def cuts(some, every, every_end, some_end, near, near_end, span, i_batch, i_tile, tiles, STEP: tl.constexpr,
         INTERIOR_FIRST: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Where a program's steps change: (begin, interior, near, far, rest, end), all but the end multiples of STEP.

    From `some` to `some_end` a step may matter, from `every` to `every_end` every pair is seen; between near and
    near_end distances may be less than clip. In between, that is from interior to near and from far to rest, steps
    are interior: no mask, no table.
    """
    if SEGMENTS & F:
        p_span = span + (i_batch * tiles + i_tile) * 3
        first, last = tl.load(p_span), tl.load(p_span + 1)
        uniform = tl.load(p_span + 2) != 0
        some, some_end = tl.maximum(some, first), tl.minimum(some_end, last)
        every, every_end = tl.maximum(every, first), tl.where(uniform, tl.minimum(every_end, last), 0)
    begin = some // STEP * STEP
    i_in, i_out = tl.cdiv(tl.maximum(every, begin), STEP) * STEP, tl.maximum(every_end, 0) // STEP * STEP
    any_inside = i_in < i_out
    if MASK & F:
        any_inside = False
    # Without interior steps all are general: those that `runs` has after interior ones, or before.
    nowhere = begin if INTERIOR_FIRST else tl.maximum(tl.cdiv(some_end, STEP) * STEP, begin)
    i_in, i_out = tl.where(any_inside, i_in, nowhere), tl.where(any_inside, i_out, nowhere)
    i_near, i_far = i_out, i_out
    if RELATIVE & F:
        i_near = tl.minimum(tl.maximum(near, 0) // STEP * STEP, i_out)
        i_near = tl.maximum(i_near, i_in)
        i_far = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(near_end, 0), STEP) * STEP, i_near), i_out)
    return begin, i_in, i_near, i_far, i_out, some_end


@triton.jit
def runs(part, c, PARTS: tl.constexpr, INTERIOR_FIRST: tl.constexpr):
    """(a, b, c) of one of PARTS runs: interior steps from a to b and general ones from b to c, or the other way round."""
    x, y, z = c[0], c[4] if INTERIOR_FIRST else c[1], c[5]
    if PARTS == 2:
        if INTERIOR_FIRST:
            x, y, z = tl.where(part == 0, c[0], c[1]), tl.where(part == 0, c[0], c[4]), tl.where(part == 0, c[1], c[5])
        else:
            x, y, z = tl.where(part == 0, c[0], c[4]), tl.where(part == 0, c[1], c[5]), tl.where(part == 0, c[4], c[5])
    if PARTS == 3:
        if INTERIOR_FIRST:
            x = tl.where(part == 0, c[0], tl.where(part == 1, c[1], c[3]))
            y = tl.where(part == 0, c[0], tl.where(part == 1, c[2], c[4]))
            z = tl.where(part == 0, c[1], tl.where(part == 1, c[3], c[5]))
        else:
            x = tl.where(part == 0, c[0], tl.where(part == 1, c[2], c[4]))
            y = tl.where(part == 0, c[1], tl.where(part == 1, c[3], c[5]))
            z = tl.where(part == 0, c[2], tl.where(part == 1, c[4], c[5]))
    return x, y, z


@triton.jit
def _span_kernel(own, own_b, other, other_b, span, n_own, n_other, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Of a tile of rows: the first and last rows of the other side whose segment may be theirs, and whether all are."""
    i_batch, i_tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    rows = i_tile * BLOCK + tl.arange(0, BLOCK)
    # A row beyond the end takes the place of the last.
    b_own = tl.load(own + i_batch * own_b + tl.minimum(rows, n_own - 1))
    least, most = tl.min(b_own, 0), tl.max(b_own, 0)
    first, last, count = n_other, 0, 0
    for i in range(0, n_other, CHUNK):
        c = i + tl.arange(0, CHUNK)
        b_other = tl.load(other + i_batch * other_b + c, mask=c < n_other, other=0)
        m = (c < n_other) & (b_other >= least) & (b_other <= most)
        first = tl.minimum(first, tl.min(tl.where(m, c, n_other), 0))
        last = tl.maximum(last, tl.max(tl.where(m, c + 1, 0), 0))
        count += tl.sum(m.to(tl.int32), 0)
    p_span = span + (i_batch * tl.num_programs(0) + i_tile) * 3
    tl.store(p_span, first)
    tl.store(p_span + 1, last)
    tl.store(p_span + 2, ((least == most) & (count == last - first)).to(tl.int32))


def spans(own: torch.Tensor | None, other: torch.Tensor | None, block: int) -> torch.Tensor | None:
    """For `cuts`: int32 (batch, tiles, 3) of segment ids (batch, rows); None without segments."""
    if own is None or other is None:
        return None
    tiles = triton.cdiv(own.shape[1], block)
    out = torch.empty((own.shape[0], tiles, 3), dtype=torch.int32, device=own.device)
    if out.numel():
        _span_kernel[(tiles, own.shape[0])](
            own, own.stride(0), other, other.stride(0), out, own.shape[1], other.shape[1], BLOCK=block,
            CHUNK=64 if INTERPRETING.value else 1024,
        )  # fmt: skip
    return out


class Call(NamedTuple):
    """What every launch of one call of the op takes."""

    terms: Terms
    sizes: Sizes
    flags: int
    ids: tuple[torch.Tensor | None, torch.Tensor | None]
    buckets: torch.Tensor | None  # of distances -clip to clip
    switches: dict[str, Any]

    @property
    def extras(self) -> int:
        """How much masks and additions take of the registers in every step: 0 and more."""
        one = (BIAS, MASK, DROPOUT, ALIBI, RELATIVE, SEGMENTS)
        return sum(bool(self.flags & flag.value) for flag in one) + 2 * bool(self.flags & CAP.value)

    def parts(self, ends: int) -> int:
        """Runs of steps of a program, for `runs`. ends: flags that cut steps off where there is else one run."""
        return 3 if self.flags & RELATIVE.value else 2 if self.flags & (ends | SEGMENTS.value | MASK.value) else 1


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, relative_bias: torch.Tensor | None,
    sinks: torch.Tensor | None, slopes: torch.Tensor | None, lengths: torch.Tensor | None,
    rows: torch.Tensor | None, columns: torch.Tensor | None, seed: torch.Tensor | None, left: int, right: int,
    top_left: bool, scale: float, softcap: float, bidirectional: bool, max_distance: int, dropout_p: float,
    longest: tuple[int, int] | None, direction: str,
) -> Call:  # fmt: skip
    """The op's arguments for kernels. rows, columns: segment ids, or where sequences begin if `longest` is given."""
    packed = longest is not None
    if longest is not None:
        assert rows is not None
        queries, keys = longest
        sizes = Sizes(rows.numel() - 1, q.shape[1], q.shape[1] // k.shape[1], queries, keys, q.shape[2], v.shape[2])
    else:
        queries, keys = q.shape[2], k.shape[2]
        sizes = Sizes(q.shape[0], q.shape[1], q.shape[1] // k.shape[1], queries, keys, q.shape[3], v.shape[3])
    ids = (None, None) if packed or rows is None else (rows, columns)
    shaped = any(x is not None for x in (relative_bias, slopes)) or softcap > 0.0
    shaped = shaped or (bias is not None and bias.dtype != torch.bool)
    given = (
        (BIAS, bias is not None and bias.dtype != torch.bool), (MASK, bias is not None and bias.dtype == torch.bool),
        (RELATIVE, relative_bias is not None), (ALIBI, slopes is not None), (CAP, softcap > 0.0), (LEFT, left >= 0),
        (RIGHT, right >= 0), (SEGMENTS, ids[0] is not None), (LENGTHS, lengths is not None), (TOP_LEFT, top_left),
        (DROPOUT, seed is not None), (SINKS, sinks is not None), (PACKED, packed),
        (NEGATIVE, scale < 0.0 and not shaped and direction == "forward"),
    )  # fmt: skip
    if direction == "forward" and not shaped:
        # A masked score is -inf, and 0 * -inf would be NaN: so small a scale gives the very weights of scale 0.
        scale = abs(scale) or 1e-30
    table = buckets = None
    clip = 0
    if relative_bias is not None:
        clip = min(max_distance, max(queries, keys))  # no distance is larger
        distances = torch.arange(-clip, clip + 1, device=q.device)
        buckets = relative_position_bucket(distances, relative_bias.shape[0], bidirectional, max_distance)
        table = relative_bias.float()[buckets].t().contiguous()
    steps = [0, 0, 0, 0]
    if bias is not None:
        steps = [0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True)]
    terms = Terms(
        None if bias is None else bias.view(torch.uint8) if bias.dtype == torch.bool else bias,
        steps[0], steps[1], steps[2], steps[3], table, clip,
        None if sinks is None else sinks.float(), None if slopes is None else slopes.float().contiguous(),
        slopes.shape[-1] if slopes is not None and slopes.dim() == 2 else 0, lengths, ids[0],
        0 if ids[0] is None else ids[0].stride(0), ids[1], 0 if ids[1] is None else ids[1].stride(0),
        rows if packed else None, columns if packed else None, seed, left, right, scale, softcap,
        drop_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
    )  # fmt: skip
    block_d, block_dv = padded(sizes.d), padded(sizes.dv)
    switches = {
        "EVEN_D": sizes.d == block_d, "EVEN_DV": sizes.dv == block_dv, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
    }  # fmt: skip
    return Call(terms, sizes, sum(flag.value for flag, on in given if on), ids, buckets, switches)
