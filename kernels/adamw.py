"""AdamW over flat buffers in Triton: norm, decision (kernels/optimizer.py) and sweep, and the host waits for none.

Sweep: one tile a program. Reads gradient, master and moments (16 bytes an element, 17 with a mask; half in bfloat16),
writes master and moments (12), the model-dtype copy (2 or 4; none with masters in halves) and the zeroed gradient (4 if
wanted).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import meta
from .optimizer import TILE, cases, clipped, decays, decide, finish, joined, random_words, store, store_halves

__all__ = ["compile_cases", "forward"]


@triton.jit
def _sweep_kernel(master, grad, exp_avg, exp_avg_sq, trail, param, decay_mask, seed, step, skipped, factors, offsets, n,
                  SEGMENTS, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, SEARCH: tl.constexpr,
                  HAS_TRAIL: tl.constexpr, HAS_PARAM: tl.constexpr, MASK_RUN: tl.constexpr, STOCHASTIC: tl.constexpr,
                  ZERO_GRAD: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = i < n
    if tl.load(skipped) == 0.0:
        b_g = clipped(grad, i, m, factors, offsets, SEGMENTS, SEARCH)  # [TILE]
        b_p = joined(master, trail, i, m, HAS_TRAIL)
        b_m = tl.load(exp_avg + i, mask=m, other=0.0).to(tl.float32)
        b_v = tl.load(exp_avg_sq + i, mask=m, other=0.0).to(tl.float32)
        b_m = beta1 * b_m + one_minus_beta1 * b_g  # exactly b_g for beta1 = 0
        b_v = beta2 * b_v + one_minus_beta2 * b_g * b_g
        b_p -= decays(decay_mask, i, m, tl.load(factors), MASK_RUN) * b_p
        b_p -= tl.load(factors + 1) * b_m / (tl.sqrt(b_v) * tl.load(factors + 2) + eps)
        b_words = i
        if STOCHASTIC:
            b_words = random_words(seed, step, 0, TILE)
        store(exp_avg, i, m, b_m, b_words, STOCHASTIC)
        store(exp_avg_sq, i, m, b_v, b_words, STOCHASTIC, UPPER=True)
        if HAS_TRAIL:
            store_halves(master, trail, i, m, b_p)
        else:
            if STOCHASTIC and master.dtype.element_ty == tl.bfloat16:
                b_words = random_words(seed, step, 1, TILE)
            store(master, i, m, b_p, b_words, STOCHASTIC)
        if HAS_PARAM:
            store(param, i, m, b_p, b_words, False)
    finish(grad, i, m, ZERO_GRAD)


def forward(master, grad, exp_avg, exp_avg_sq, step, param, decay_mask, seed, norm, offsets, lr, trail, beta1, beta2,
            eps, weight_decay, max_norm, zero_grad, grad_norm, skipped):  # fmt: skip
    n = master.numel()
    shared = decide(
        grad, step, param, decay_mask, seed, norm, offsets, lr, weight_decay, max_norm, zero_grad, grad_norm, skipped,
        beta1, beta2,
    )  # fmt: skip
    if n:
        _sweep_kernel[(triton.cdiv(n, TILE),)](
            master, grad, exp_avg, exp_avg_sq, trail, beta1=beta1, one_minus_beta1=1.0 - beta1, beta2=beta2,
            one_minus_beta2=1.0 - beta2, eps=eps, HAS_TRAIL=trail is not None, **shared,
        )  # fmt: skip


def compile_cases():
    """As every optimizer, and masters in halves."""
    for n, case in enumerate(cases("exp_avg", "exp_avg_sq")):
        if n == 0:  # as the engine calls it in bfloat16
            halves = {"master": case["param"], "trail": meta(case["param"].numel(), dtype=torch.int16)}
            yield case | halves | {"param": None, "zero_grad": False}
        yield case
