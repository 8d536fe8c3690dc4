"""What the optimizer ops share in Triton: the norm, the decision, and how a sweep reads gradients and rounds.

Norm: a number of programs that the sizes alone decide, each over every P-th tile of a segment of the gradient (the
whole of it without offsets); squares are taken in float64, so none overflows, and each program writes one partial sum.
Reads the gradient once. No atomics: the same bits every time.

Segment (with offsets only): a program for each adds its partials in order and leaves its clip factor.

Decide: one program sums the partials in order and decides: the norm, whether it is finite, the clip factor, bias
corrections and rates, and then, only if the step is applied, counts it.

Factors for the sweep: lr * weight_decay, lr / (1 - beta1**t), 1 / sqrt(1 - beta2**t), 1 - dampening (1 at the first
step), then a clip factor for each segment. A sweep is one tile a program; a skipped step reads one number and writes
nothing but the zeros of the gradient.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .common import INTERPRETING, meta
from .philox import philox_lanes

__all__ = ["TILE", "cases", "clipped", "decide", "decays", "finish", "joined", "random_words", "store", "store_halves"]

TILE = 1024  # elements a program holds: two 16-byte vectors a thread and buffer, with four warps
_PARTIALS = 1024  # programs of the norm: 31 warps for each of an H100's 132 multiprocessors
_SEGMENT_PARTIALS = 64  # of one segment's
_MASK_RUN = 64  # elements that a flag of a short decay_mask stands for
_CLIPS = tl.constexpr(4)  # where the clip factors begin


@triton.jit
def _norm_kernel(grad, offsets, partial, n, PROGRAMS, BY_SEGMENT: tl.constexpr, TILE: tl.constexpr):
    i_program, i_segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_begin = tl.zeros([], tl.int64)
    i_end = i_begin + n
    if BY_SEGMENT:  # nobody has checked what is in offsets
        i_end = tl.minimum(tl.load(offsets + i_segment + 1), i_end)
        i_begin = tl.maximum(tl.load(offsets + i_segment), i_begin)
    i_lane = tl.arange(0, TILE)
    b_sum = tl.zeros([TILE], tl.float64)
    for i in range(i_begin + i_program * TILE, i_end, PROGRAMS * TILE):
        b_g = tl.load(grad + i + i_lane, mask=i + i_lane < i_end, other=0.0).to(tl.float64)
        b_sum += b_g * b_g
    tl.store(partial + i_segment * PROGRAMS + i_program, tl.sum(b_sum, 0))


@triton.jit
def _segment_kernel(partial, total, factors, PROGRAMS, max_norm, CLIPPING: tl.constexpr, PARTIALS: tl.constexpr):
    i_segment = tl.program_id(0)
    i_lane = tl.arange(0, PARTIALS)
    b_sum = tl.sum(tl.load(partial + i_segment * PROGRAMS + i_lane, mask=i_lane < PROGRAMS, other=0.0), 0)
    tl.store(total + i_segment, b_sum)
    b_clip = 1.0
    if CLIPPING:
        b_clip = tl.minimum(max_norm / (tl.sqrt(b_sum).to(tl.float32) + 1e-6), 1.0)
    tl.store(factors + _CLIPS + i_segment, b_clip)


@triton.jit
def _decide_kernel(partial, norm, step, lr, grad_norm, skipped, factors, PARTS, log_beta1, log_beta2, dampening,
                   weight_decay, max_norm, GIVEN: tl.constexpr, CLIPPING: tl.constexpr, BY_SEGMENT: tl.constexpr,
                   PARTIALS: tl.constexpr):  # fmt: skip
    if GIVEN:
        b_norm = tl.load(norm)
    else:
        b_sum = tl.zeros([PARTIALS], tl.float64)
        for i in range(0, PARTS, PARTIALS):
            i_lane = i + tl.arange(0, PARTIALS)
            b_sum += tl.load(partial + i_lane, mask=i_lane < PARTS, other=0.0)
        b_norm = tl.sqrt(tl.sum(b_sum, 0)).to(tl.float32)
    b_applied = b_norm < float("inf")  # false for NaN too
    tl.store(grad_norm, b_norm)
    tl.store(skipped, tl.where(b_applied, 0.0, 1.0))
    b_count = tl.load(step)
    b_t = b_count.to(tl.float64) + 1.0
    b_lr = tl.load(lr).to(tl.float64)
    # beta**t from log(beta): a float32 beta is off by 3e-8, which is 3e-5 of 1 - 0.999
    b_correction1 = 1.0 - tl.exp(b_t * log_beta1)
    b_correction2 = 1.0 - tl.exp(b_t * log_beta2)
    tl.store(factors, (b_lr * weight_decay).to(tl.float32))
    tl.store(factors + 1, (b_lr / b_correction1).to(tl.float32))
    tl.store(factors + 2, (1.0 / tl.sqrt(b_correction2)).to(tl.float32))
    tl.store(factors + 3, tl.where(b_t == 1.0, 1.0, 1.0 - dampening).to(tl.float32))
    if not BY_SEGMENT:
        b_clip = 1.0
        if CLIPPING:
            b_clip = tl.minimum(max_norm / (b_norm + 1e-6), 1.0)
        tl.store(factors + _CLIPS, b_clip)
    tl.store(step, tl.where(b_applied, b_t.to(step.dtype.element_ty), b_count))


@triton.jit
def clipped(grad, i, m, factors, offsets, SEGMENTS, SEARCH: tl.constexpr):
    """The clipped gradient [TILE] in float32. SEARCH: halvings that find one of SEGMENTS, 0 without offsets."""
    b_g = tl.load(grad + i, mask=m, other=0.0).to(tl.float32)
    i_segment = tl.zeros_like(i)
    i_end = i_segment + SEGMENTS
    for _ in tl.static_range(SEARCH):  # offsets[i_segment] <= i < offsets[i_end]
        i_middle = (i_segment + i_end) // 2
        b_right = tl.load(offsets + i_middle, mask=m, other=0) <= i
        i_segment = tl.where(b_right, i_middle, i_segment)
        i_end = tl.where(b_right, i_end, i_middle)
    if SEARCH == 0:
        b_g *= tl.load(factors + _CLIPS)
    else:
        b_g *= tl.load(factors + _CLIPS + i_segment, mask=m, other=0.0)
    return b_g


@triton.jit
def decays(decay_mask, i, m, b_decay, MASK_RUN: tl.constexpr):
    """The decay [TILE] or of all. MASK_RUN: elements that a flag stands for, 0 without a mask."""
    if MASK_RUN > 0:
        b_decay = tl.where(tl.load(decay_mask + i // MASK_RUN, mask=m, other=0) != 0, b_decay, 0.0)
    return b_decay


@triton.jit
def random_words(seed, step, pair, TILE: tl.constexpr):
    """Words [TILE] for this program's tile at the step just counted."""
    i_counter = tl.program_id(0).to(tl.int64) * (TILE // 4) + tl.arange(0, TILE // 4)
    b_t = tl.load(step).to(tl.int64)
    return philox_lanes(tl.load(seed), i_counter, i_counter >> 32, b_t, pair)


@triton.jit
def store(pointer, i, m, b_x, b_words, STOCHASTIC: tl.constexpr, UPPER: tl.constexpr = False):
    """b_x in the pointer's dtype: to nearest, or in bfloat16 stochastically by one half of each word."""
    if pointer.dtype.element_ty == tl.bfloat16 and (STOCHASTIC or INTERPRETING):
        b_bits = b_x.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            b_r = (b_words >> 16) if UPPER else (b_words & 0xFFFF)
        else:  # Triton's interpreter would truncate
            b_r = 0x7FFF + ((b_bits >> 16) & 1)
        b_up = ((b_bits + b_r) & 0xFFFF0000).to(tl.float32, bitcast=True)
        b_x = tl.where(tl.abs(b_x) < float("inf"), b_up, b_x)
    tl.store(pointer + i, b_x.to(pointer.dtype.element_ty), mask=m)


@triton.jit
def joined(master, trail, i, m, HAS_TRAIL: tl.constexpr):
    """The weights [TILE] in float32."""
    b_p = tl.load(master + i, mask=m, other=0.0)
    if HAS_TRAIL:
        b_low = tl.load(trail + i, mask=m, other=0).to(tl.int32)
        return ((b_p.to(tl.int16, bitcast=True).to(tl.int32) << 16) + b_low).to(tl.float32, bitcast=True)
    return b_p.to(tl.float32)


@triton.jit
def store_halves(master, trail, i, m, b_p):
    """The weights in two halves: the upper rounded to nearest, halves away from zero."""
    b_bits = b_p.to(tl.int32, bitcast=True)
    b_high = (b_bits + 0x8000) >> 16
    tl.store(master + i, b_high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=m)
    tl.store(trail + i, (b_bits - (b_high << 16)).to(tl.int16), mask=m)


@triton.jit
def finish(grad, i, m, ZERO_GRAD: tl.constexpr):
    """What a skipped step does too."""
    if ZERO_GRAD:
        tl.store(grad + i, tl.zeros_like(i).to(grad.dtype.element_ty), mask=m)


def decide(grad, step, param, decay_mask, seed, norm, offsets, lr, weight_decay, max_norm, zero_grad, grad_norm, skipped,
           beta1=0.0, beta2=0.0, dampening=0.0):  # fmt: skip
    """Take the norm, decide and count; returns what every sweep is launched with beside its own buffers and numbers."""
    n, device = grad.numel(), grad.device
    by_segment = offsets is not None
    segments = offsets.numel() - 1 if by_segment else 1
    programs = min(triton.cdiv(n, TILE), _SEGMENT_PARTIALS if by_segment else _PARTIALS)
    clipping = 0.0 < max_norm < math.inf
    factors = torch.empty(4 + segments, dtype=torch.float32, device=device)  # as _decide_kernel stores them
    parts = torch.empty(max(programs * segments, 1), dtype=torch.float64, device=device)
    count = programs * segments
    if programs and norm is None:
        _norm_kernel[(programs, segments)](
            grad, offsets, parts, n, programs, BY_SEGMENT=by_segment, TILE=TILE, num_warps=4
        )
        if by_segment:
            total = torch.empty(segments, dtype=torch.float64, device=device)
            _segment_kernel[(segments,)](
                parts, total, factors, programs, max_norm, CLIPPING=clipping, PARTIALS=_SEGMENT_PARTIALS, num_warps=1
            )
            parts, count = total, segments
    _decide_kernel[(1,)](
        parts, norm, step, lr, grad_norm, skipped, factors, count, _log(beta1), _log(beta2), dampening, weight_decay,
        max_norm, GIVEN=norm is not None, CLIPPING=clipping, BY_SEGMENT=by_segment, PARTIALS=_PARTIALS, num_warps=4,
    )  # fmt: skip
    return {
        "param": param, "decay_mask": decay_mask.view(torch.uint8) if decay_mask is not None else None, "seed": seed,
        "step": step, "skipped": skipped, "factors": factors, "offsets": offsets, "n": n, "SEGMENTS": segments,
        "SEARCH": segments.bit_length() if by_segment else 0, "HAS_PARAM": param is not None,
        "MASK_RUN": _run_of(decay_mask, n), "STOCHASTIC": seed is not None, "ZERO_GRAD": zero_grad, "TILE": TILE,
        "num_warps": 4,
    }  # fmt: skip


def _run_of(decay_mask, n):
    if decay_mask is None:
        return 0
    return 1 if decay_mask.numel() == n else _MASK_RUN


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -math.inf


def cases(*states):
    """GPT-2 124M with every option and a bfloat16 copy; a float32 model; bfloat16 throughout; segments; float16."""
    n, f32 = 124_439_808, torch.float32
    scalars = {"step": meta(dtype=f32), "lr": meta(dtype=f32)}
    plain = {k: meta(n, dtype=f32) for k in ("master", "grad", *states)} | scalars
    narrow = {k: meta(n) for k in ("master", "grad", *states)} | scalars
    seed = {"seed": meta(1, dtype=torch.int64)}
    options = {"decay_mask": meta(n // _MASK_RUN, dtype=torch.bool), "weight_decay": 0.1, "max_norm": 1.0, "zero_grad": True}
    yield plain | options | {"param": meta(n)}
    yield plain
    yield plain | {"step": meta(dtype=torch.int64), "param": meta(n, dtype=torch.float16), "norm": meta(dtype=f32)}
    yield narrow | options | seed
    yield narrow | {"norm": meta(dtype=f32)}
    yield plain | {k: meta(n) for k in states} | seed | {"param": meta(n)} | options
    yield plain | options | {"offsets": meta(149, dtype=torch.int64)}
    yield plain | {"offsets": meta(149, dtype=torch.int64)}
