"""SGD with momentum over flat buffers in Triton: norm, decision (kernels/optimizer.py) and sweep.

Sweep: one tile a program. Reads gradient, master and momentum (12 bytes an element, 13 with a mask; half in bfloat16),
writes master and momentum (8), the model-dtype copy (2 or 4) and the zeroed gradient (4 if wanted).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .optimizer import TILE, cases, clipped, decays, decide, finish, random_words, store

__all__ = ["compile_cases", "forward"]


@triton.jit
def _sweep_kernel(master, grad, momentum_buffer, param, decay_mask, seed, step, skipped, factors, offsets, n, SEGMENTS,
                  momentum, weight_decay, SEARCH: tl.constexpr, HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
                  HAS_PARAM: tl.constexpr, MASK_RUN: tl.constexpr, STOCHASTIC: tl.constexpr,
                  ZERO_GRAD: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = i < n
    if tl.load(skipped) == 0.0:
        b_g = clipped(grad, i, m, factors, offsets, SEGMENTS, SEARCH)  # [TILE]
        b_p = tl.load(master + i, mask=m, other=0.0).to(tl.float32)
        b_words = i
        if STOCHASTIC:
            b_words = random_words(seed, step, 0, TILE)
        b_g += decays(decay_mask, i, m, weight_decay, MASK_RUN) * b_p
        if HAS_MOMENTUM:
            b_b = tl.load(momentum_buffer + i, mask=m, other=0.0).to(tl.float32)
            b_g *= tl.load(factors + 3)
            b_b = momentum * b_b + b_g
            store(momentum_buffer, i, m, b_b, b_words, STOCHASTIC)
            if NESTEROV:
                b_g += momentum * b_b
            else:
                b_g = b_b
        b_p -= tl.load(factors + 1) * b_g
        store(master, i, m, b_p, b_words, STOCHASTIC, UPPER=HAS_MOMENTUM)
        if HAS_PARAM:
            store(param, i, m, b_p, b_words, False)
    finish(grad, i, m, ZERO_GRAD)


def forward(master, grad, momentum_buffer, step, param, decay_mask, seed, norm, offsets, lr, momentum, dampening,
            nesterov, weight_decay, max_norm, zero_grad, grad_norm, skipped):  # fmt: skip
    n = master.numel()
    shared = decide(
        grad, step, param, decay_mask, seed, norm, offsets, lr, weight_decay, max_norm, zero_grad, grad_norm, skipped,
        dampening=dampening,
    )  # fmt: skip
    if n:
        _sweep_kernel[(triton.cdiv(n, TILE),)](
            master, grad, momentum_buffer, momentum=momentum, weight_decay=weight_decay,
            HAS_MOMENTUM=momentum_buffer is not None, NESTEROV=nesterov, **shared,
        )  # fmt: skip


def compile_cases():
    """As every optimizer, with and without momentum."""
    for index, case in enumerate(cases("momentum_buffer")):
        yield case | {"momentum": 0.9, "nesterov": index == 1}
        if index < 2:
            yield case | {"momentum_buffer": None}
