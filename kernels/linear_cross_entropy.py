"""Linear cross-entropy in Triton: a loop over chunks of tokens, products around the kernels of cross_entropy.

    forward   logits = hidden @ weight.T; statistics
    backward  logits again; dlogits; dhidden = dlogits @ weight; dweight += dlogits.T @ hidden;
              dbias += column sums of dlogits

Logits are float32 and dlogits of hidden's dtype (in the same memory for float32), both in one workspace that
is made once a call. The products are torch's where it multiplies bfloat16 into float32 on this device, else
the kernel below.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .common import INTERPRETING, device_programs, meta
from .cross_entropy import reduce_tokens, token_backward, token_forward, upstream

__all__ = ["add_column_sums", "backward", "compile_cases", "forward", "matmul"]


@triton.jit
def _matmul_kernel(a, b, c, M, N, K, a_row, a_col, b_row, b_col, c_row, ADD: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                   GROUP: tl.constexpr):  # fmt: skip
    """c (M, N) = or += a (M, K) @ b (K, N), summed in float32, in groups of rows that share b in L2."""
    i_program = tl.program_id(0)
    n_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP * tl.cdiv(N, BLOCK_N)
    i_first = i_program // per_group * GROUP
    rows_in_group = tl.minimum(n_m - i_first, GROUP)
    i_m = i_first + i_program % per_group % rows_in_group
    i_n = i_program % per_group // rows_in_group
    rows = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    p_a = a + rows[:, None].to(tl.int64) * a_row + ks[None, :].to(tl.int64) * a_col  # [BLOCK_M, BLOCK_K]
    p_b = b + ks[:, None].to(tl.int64) * b_row + cols[None, :].to(tl.int64) * b_col  # [BLOCK_K, BLOCK_N]
    b_c = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        b_a = tl.load(p_a, mask=(rows[:, None] < M) & (k + ks[None, :] < K), other=0.0)
        b_b = tl.load(p_b, mask=(k + ks[:, None] < K) & (cols[None, :] < N), other=0.0)
        if INTERPRETING:
            b_a = b_a.to(tl.float32)
            b_b = b_b.to(tl.float32)
        b_c = tl.dot(b_a, b_b, b_c, input_precision="ieee")
        p_a += BLOCK_K * a_col
        p_b += BLOCK_K * b_row
    p_c = c + rows[:, None].to(tl.int64) * c_row + cols[None, :]
    m_c = (rows[:, None] < M) & (cols[None, :] < N)
    if ADD:
        b_c += tl.load(p_c, mask=m_c, other=0.0).to(tl.float32)
    tl.store(p_c, b_c.to(c.dtype.element_ty), mask=m_c)


@triton.jit
def _column_sum_kernel(x, total, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """total[n] += sum over m of x[m, n], in the order of m."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, M, BLOCK_M):
        rows = i + tl.arange(0, BLOCK_M)
        m = (rows[:, None] < M) & (cols[None, :] < N)
        b_sum += tl.load(x + rows[:, None].to(tl.int64) * N + cols[None, :], mask=m, other=0.0).to(tl.float32)
    m_col = cols < N
    b_total = tl.load(total + cols, mask=m_col, other=0.0)
    tl.store(total + cols, b_total + tl.sum(b_sum, 0), mask=m_col)


@functools.cache
def _torch_widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies `dtype` into float32 here, also adding to what is there; asked once."""
    if device.type != "cuda":
        return False
    a, c = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.mm(a, a, out_dtype=torch.float32, out=c)
        torch.addmm(c, a, a, out_dtype=torch.float32, out=c)
    except (RuntimeError, TypeError):
        return False
    return True


def _tiles(dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """(rows, columns, depth of a tile, warps, stages) of the matmul kernel."""
    if INTERPRETING.value:  # few programs: each costs the same, whatever its size
        return 128, 128, 64, 1, 1
    # float32: a tile 32 deep spills on sm_80, 64 x 64 x 16 on sm_100.
    return (128, 64, 16, 8, 3) if dtype == torch.float32 else (128, 128, 64, 8, 3)


def matmul(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, add: bool = False) -> None:
    """c (M, N) = or += a (M, K) @ b (K, N), summed in float32; a and b of one dtype and any strides."""
    same = c.dtype == a.dtype
    if a.device.type == "cuda" and (same or (c.dtype == torch.float32 and _torch_widens(a.device, a.dtype))):
        extra: Any = {} if same else {"out_dtype": torch.float32}
        if add:
            torch.addmm(c, a, b, **extra, out=c)
        else:
            torch.mm(a, b, **extra, out=c)
        return
    (m, k), n = a.shape, b.shape[1]
    block_m, block_n, block_k, warps, stages = _tiles(a.dtype)
    _matmul_kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
        a, b, c, m, n, k, *a.stride(), *b.stride(), c.stride(0), ADD=add,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=8, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def add_column_sums(x: torch.Tensor, total: torch.Tensor) -> None:
    """total (N) float32 += x (M, N).sum(0), in the order of rows."""
    m, n = x.shape
    _column_sum_kernel[(triton.cdiv(n, 64),)](x, total, m, n, BLOCK_M=32, BLOCK_N=64)


def _chunks(flat, weight, workspace_bytes):
    """(tokens a chunk, the chunks). Unless the workspace says otherwise, enough tokens that adding dweight in
    float32, 8 bytes an element and chunk, hides behind its product, and that dhidden has a 128 x 128 tile for
    every multiprocessor; as even chunks as possible. A multiple of 16 tokens, if it is that many, so that
    every chunk is as aligned as the first: one compiled kernel serves all."""
    rows, (classes, width) = flat.shape[0], weight.shape
    if workspace_bytes:
        step = workspace_bytes // (classes * (4 if flat.dtype == torch.float32 else 4 + flat.dtype.itemsize))
    else:
        wanted = max(1024, 128 * triton.cdiv(128 * device_programs(flat.device, 1), width))
        step = 16 * triton.cdiv(rows, 16 * max(1, round(rows / wanted)))
    step = max(1, min(rows, step - step % 16 if step > 16 else step))
    return step, [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _by_token(target, count):
    """target (count) or, for probabilities, (count, V)."""
    return target.view(count, target.shape[-1]) if target.is_floating_point() else target.view(count)


def _rows(t, rows):
    """Those rows of a tensor of the tokens; None of None."""
    return None if t is None else t[rows]


def forward(
    hidden, weight, target, bias, class_weight, token_weight, ignore_index, label_smoothing, z_loss, softcap,
    logit_scale, reduction, extras, workspace_bytes, loss, z, lse, correct, confidence, entropy, statistics,
    denominators,
):  # fmt: skip
    classes, width = weight.shape
    count = hidden.numel() // width
    flat, goal, tokens = hidden.view(count, width), _by_token(target, count), statistics.view(len(statistics), count)
    marks = [t.view(-1) for t in (lse, correct, confidence, entropy)] if extras else None
    step, chunks = _chunks(flat, weight, workspace_bytes)
    logits = torch.empty(step, classes, dtype=torch.float32, device=flat.device)
    for rows in chunks:
        x = logits[: rows.stop - rows.start]
        matmul(flat[rows], weight.T, x)
        token_forward(
            x, bias, goal[rows], class_weight, label_smoothing, ignore_index, softcap, logit_scale, tokens[:, rows],
            None if marks is None else [t[rows] for t in marks],
        )  # fmt: skip
    reduce_tokens(
        tokens, goal, class_weight, token_weight, ignore_index, z_loss, reduction, extras, classes, loss, z,
        denominators,
    )  # fmt: skip


def backward(
    d_loss, d_z, d_lse, hidden, weight, target, bias, class_weight, token_weight, statistics, denominators,
    ignore_index, label_smoothing, z_loss, softcap, logit_scale, reduction, extras, workspace_bytes, dhidden,
    dweight, dbias,
):  # fmt: skip
    classes, width = weight.shape
    count = hidden.numel() // width
    flat, goal, tokens = hidden.view(count, width), _by_token(target, count), statistics.view(len(statistics), count)
    d_flat = None if dhidden is None else dhidden.view(count, width)
    up_loss, up_z, up_lse = upstream(d_loss, d_z, d_lse, count, reduction, extras, flat.device)
    weights = None if token_weight is None else token_weight.view(-1)
    step, chunks = _chunks(flat, weight, workspace_bytes)
    logits = torch.empty(step, classes, dtype=torch.float32, device=flat.device)
    narrow = logits if flat.dtype == torch.float32 else torch.empty_like(logits, dtype=flat.dtype)
    for rows in chunks:
        x, dx = logits[: rows.stop - rows.start], narrow[: rows.stop - rows.start]
        matmul(flat[rows], weight.T, x)
        every = rows if reduction == "none" else slice(None)
        token_backward(
            (up_loss[every], _rows(up_z, every), _rows(up_lse, rows)), x, bias, goal[rows], class_weight,
            _rows(weights, rows), tokens[:, rows], denominators, ignore_index, label_smoothing, z_loss, softcap,
            logit_scale, reduction, extras, dx,
        )  # fmt: skip
        if d_flat is not None:
            matmul(dx, weight, d_flat[rows])
        if dweight is not None:
            matmul(dx.T, flat[rows], dweight, add=True)
        if dbias is not None:
            add_column_sums(dx, dbias)


def compile_cases():
    """A vocabulary that no power of two divides, as GPT-2's; a bias, the options of the loss, tokens one by one."""
    tokens, width, classes = 8192, 768, 50257
    for dtype in (torch.bfloat16, torch.float32):
        yield {
            "hidden": meta(tokens, width, dtype=dtype), "weight": meta(classes, width, dtype=dtype),
            "target": meta(tokens, dtype=torch.int64), "bias": meta(classes, dtype=dtype), "softcap": 30.0,
        }  # fmt: skip
    yield {
        "hidden": meta(tokens, width), "weight": meta(classes, width), "target": meta(tokens, dtype=torch.int64),
        "class_weight": meta(classes, dtype=torch.float32), "label_smoothing": 0.1, "z_loss": 1e-4,
        "reduction": "none", "workspace_mb": 512.0,
    }  # fmt: skip
    yield {
        "hidden": meta(tokens, width), "weight": meta(50304, width), "target": meta(tokens, 50304),
        "bias": meta(50304), "class_weight": meta(50304, dtype=torch.float32),
        "token_weight": meta(tokens, dtype=torch.float32), "label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0,
        "logit_scale": 0.5, "extras": True,
    }  # fmt: skip
