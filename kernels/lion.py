"""Lion over flat buffers in Triton: norm, decision (kernels/optimizer.py) and sweep.

Sweep: one tile a program. Reads gradient, master and moment (12 bytes an element, 13 with a mask; half in bfloat16),
writes master and moment (8), the model-dtype copy (2 or 4) and the zeroed gradient (4 if wanted).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .optimizer import TILE, cases, clipped, decays, decide, finish, random_words, store

__all__ = ["compile_cases", "forward"]


@triton.jit
def _sweep_kernel(master, grad, exp_avg, param, decay_mask, seed, step, skipped, factors, offsets, n, SEGMENTS,
                  beta1, one_minus_beta1, beta2, one_minus_beta2, SEARCH: tl.constexpr, HAS_PARAM: tl.constexpr,
                  MASK_RUN: tl.constexpr, STOCHASTIC: tl.constexpr, ZERO_GRAD: tl.constexpr,
                  TILE: tl.constexpr):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = i < n
    if tl.load(skipped) == 0.0:
        b_g = clipped(grad, i, m, factors, offsets, SEGMENTS, SEARCH)  # [TILE]
        b_p = tl.load(master + i, mask=m, other=0.0).to(tl.float32)
        b_m = tl.load(exp_avg + i, mask=m, other=0.0).to(tl.float32)
        b_c = beta1 * b_m + one_minus_beta1 * b_g
        b_sign = tl.where(b_c > 0.0, 1.0, tl.where(b_c < 0.0, -1.0, b_c))  # of 0 and NaN themselves
        b_p -= decays(decay_mask, i, m, tl.load(factors), MASK_RUN) * b_p
        b_p -= tl.load(factors + 1) * b_sign
        b_m = beta2 * b_m + one_minus_beta2 * b_g
        b_words = i
        if STOCHASTIC:
            b_words = random_words(seed, step, 0, TILE)
        store(exp_avg, i, m, b_m, b_words, STOCHASTIC)
        store(master, i, m, b_p, b_words, STOCHASTIC, UPPER=True)
        if HAS_PARAM:
            store(param, i, m, b_p, b_words, False)
    finish(grad, i, m, ZERO_GRAD)


def forward(master, grad, exp_avg, step, param, decay_mask, seed, norm, offsets, lr, beta1, beta2, weight_decay,
            max_norm, zero_grad, grad_norm, skipped):  # fmt: skip
    n = master.numel()
    shared = decide(
        grad, step, param, decay_mask, seed, norm, offsets, lr, weight_decay, max_norm, zero_grad, grad_norm, skipped
    )
    if n:
        _sweep_kernel[(triton.cdiv(n, TILE),)](
            master, grad, exp_avg, beta1=beta1, one_minus_beta1=1.0 - beta1, beta2=beta2, one_minus_beta2=1.0 - beta2,
            **shared,
        )  # fmt: skip


def compile_cases():
    """As every optimizer."""
    return cases("exp_avg")
