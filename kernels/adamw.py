"""AdamW over flat buffers in Triton: three launches, and the host waits for none of them.

Norm: a number of programs that n alone decides, each over every P-th tile of the gradient; squares are taken
in float64, so none overflows, and each program writes one partial sum. Reads 4 bytes an element. No atomics:
the same bits every time.

Finish: one program sums the partials in order and decides: the norm, whether it is finite, the clip factor,
both bias corrections, and then, only if the step is applied, counts it.

Sweep: one tile a program. Reads gradient, master and moments (16 bytes an element, 17 with a mask), writes
master and moments (12), the model-dtype copy (2 or 4) and the zeroed gradient (4 if wanted). A skipped step
reads one number and writes nothing but the zeros.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .common import meta

__all__ = ["compile_cases", "forward"]

_TILE = 1024  # elements a program holds: two 16-byte vectors a thread and buffer, with four warps
_PARTIALS = 1024  # programs of the norm: 31 warps for each of an H100's 132 multiprocessors


@triton.jit
def _norm_kernel(grad, partial, n, PROGRAMS, TILE: tl.constexpr):
    i_program = tl.program_id(0).to(tl.int64)
    i_lane = tl.arange(0, TILE)
    b_sum = tl.zeros([TILE], tl.float64)
    for i in range(i_program * TILE, n, PROGRAMS * TILE):
        b_g = tl.load(grad + i + i_lane, mask=i + i_lane < n, other=0.0).to(tl.float64)
        b_sum += b_g * b_g
    tl.store(partial + i_program, tl.sum(b_sum, 0))


@triton.jit
def _finish_kernel(partial, step, lr, grad_norm, skipped, factors, PROGRAMS, log_beta1, log_beta2,
                   weight_decay, max_norm, CLIP: tl.constexpr, PARTIALS: tl.constexpr):  # fmt: skip
    i_lane = tl.arange(0, PARTIALS)
    b_norm = tl.sqrt(tl.sum(tl.load(partial + i_lane, mask=i_lane < PROGRAMS, other=0.0), 0)).to(tl.float32)
    b_applied = b_norm < float("inf")  # false for NaN too
    tl.store(grad_norm, b_norm)
    tl.store(skipped, tl.where(b_applied, 0.0, 1.0))
    b_count = tl.load(step)
    b_t = b_count.to(tl.float64) + 1.0
    b_lr = tl.load(lr).to(tl.float64)
    # beta**t from log(beta): a float32 beta is off by 3e-8, which is 3e-5 of 1 - 0.999
    b_correction1 = 1.0 - tl.exp(b_t * log_beta1)
    b_correction2 = 1.0 - tl.exp(b_t * log_beta2)
    b_clip = 1.0
    if CLIP:
        b_clip = tl.minimum(max_norm / (b_norm + 1e-6), 1.0)
    tl.store(factors, b_clip)
    tl.store(factors + 1, (b_lr * weight_decay).to(tl.float32))
    tl.store(factors + 2, (b_lr / b_correction1).to(tl.float32))
    tl.store(factors + 3, (1.0 / tl.sqrt(b_correction2)).to(tl.float32))
    tl.store(step, tl.where(b_applied, b_t.to(step.dtype.element_ty), b_count))


@triton.jit
def _sweep_kernel(master, grad, exp_avg, exp_avg_sq, param, decay_mask, skipped, factors, n,
                  beta1, one_minus_beta1, beta2, one_minus_beta2, eps, HAS_PARAM: tl.constexpr,
                  HAS_MASK: tl.constexpr, ZERO_GRAD: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = i < n
    if tl.load(skipped) == 0.0:
        b_g = tl.load(grad + i, mask=m, other=0.0)  # [TILE]
        b_p = tl.load(master + i, mask=m, other=0.0)
        b_m = tl.load(exp_avg + i, mask=m, other=0.0)
        b_v = tl.load(exp_avg_sq + i, mask=m, other=0.0)
        b_decay = tl.load(factors + 1)
        if HAS_MASK:
            b_decay = tl.where(tl.load(decay_mask + i, mask=m, other=0) != 0, b_decay, 0.0)
        b_g *= tl.load(factors)
        b_m = beta1 * b_m + one_minus_beta1 * b_g  # exactly b_g for beta1 = 0
        b_v = beta2 * b_v + one_minus_beta2 * b_g * b_g
        b_p -= b_decay * b_p
        b_p -= tl.load(factors + 2) * b_m / (tl.sqrt(b_v) * tl.load(factors + 3) + eps)
        tl.store(master + i, b_p, mask=m)
        tl.store(exp_avg + i, b_m, mask=m)
        tl.store(exp_avg_sq + i, b_v, mask=m)
        if HAS_PARAM:
            tl.store(param + i, b_p.to(param.dtype.element_ty), mask=m)
    if ZERO_GRAD:
        tl.store(grad + i, tl.zeros([TILE], tl.float32), mask=m)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -math.inf


def forward(master, grad, exp_avg, exp_avg_sq, step, param, decay_mask, lr, beta1, beta2, eps, weight_decay,
            max_norm, zero_grad, grad_norm, skipped):  # fmt: skip
    n = master.numel()
    tiles = triton.cdiv(n, _TILE)
    programs = min(tiles, _PARTIALS)
    partial = torch.empty(max(programs, 1), dtype=torch.float64, device=master.device)
    factors = torch.empty(4, dtype=torch.float32, device=master.device)  # as _finish_kernel stores them
    if n:
        _norm_kernel[(programs,)](grad, partial, n, programs, TILE=_TILE, num_warps=4)
    _finish_kernel[(1,)](
        partial, step, lr, grad_norm, skipped, factors, programs, _log(beta1), _log(beta2), weight_decay,
        max_norm, CLIP=0.0 < max_norm < math.inf, PARTIALS=_PARTIALS, num_warps=4,
    )  # fmt: skip
    if n:
        mask = decay_mask.view(torch.uint8) if decay_mask is not None else None
        _sweep_kernel[(tiles,)](
            master, grad, exp_avg, exp_avg_sq, param, mask, skipped, factors, n, beta1, 1.0 - beta1, beta2,
            1.0 - beta2, eps, HAS_PARAM=param is not None, HAS_MASK=mask is not None, ZERO_GRAD=zero_grad,
            TILE=_TILE, num_warps=4,
        )  # fmt: skip


def compile_cases():
    """GPT-2 124M with every option and a bfloat16 copy; a float32 model; a counter in int64."""
    n, f32 = 124_439_808, torch.float32
    buffers = {k: meta(n, dtype=f32) for k in ("master", "grad", "exp_avg", "exp_avg_sq")}
    plain = buffers | {"step": meta(dtype=f32), "lr": meta(dtype=f32)}
    mask = meta(n, dtype=torch.bool)
    options = {"decay_mask": mask, "weight_decay": 0.1, "max_norm": 1.0, "zero_grad": True}
    yield plain | options | {"param": meta(n)}
    yield plain
    yield plain | {"step": meta(dtype=torch.int64), "param": meta(n, dtype=torch.float16)}
