"""Attention over a packed batch: sequences of any lengths one after another, without padding.

Sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] and the keys cu_seqlens_k[b] to cu_seqlens_k[b + 1];
within each, the result is that of `attention` for a batch of one, of the same bits on the native backends. Formula,
gradients, options and dropout are those of fastlm/ops/attention.py with b the sequence and i, j counted from its start;
the alignment, too, is by each sequence's own lengths. Rows beyond the last sequence belong to none: their output and
gradient are 0, their lse -inf, and what stands in their keys and values is never read.

Saved: every tensor as given, out, and lse (heads, total_q) in float32 (float64 for float64).

Edge cases
1  causal, sequences of several lengths                5  T5's bias, ALiBi, soft cap, sinks, returned lse
2  cross-attention, empty queries or keys, grouped     6  dropout, window, bias for all sequences
3  rows beyond the last sequence                       7  key_lengths, top-left alignment
4  one sequence; no sequence has a key                 8  no sequence at all

Source: Dao et al., FlashAttention's `flash_attn_varlen_func`; the module docstring of attention.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checks import autocast, check_same_device
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values
from . import attention as dense
from . import attention_math as core
from .attention_arguments import band, check_dropout, check_head_counts, check_options, check_qkv
from .attention_math import Problem
from .attention_samples import SEED, options

__all__ = ["varlen_attention"]


def _sequence(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: its sequence, its place in it, and whether it is in one."""
    row = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, row, right=True) - 1
    inside = (sequence >= 0) & (sequence < cu_seqlens.numel() - 1)
    sequence = sequence.clamp(0, max(cu_seqlens.numel() - 2, 0))
    return sequence, row - cu_seqlens[sequence], inside


class _Padding:
    """Between rows (total, heads, width) and a padded batch (sequences, heads, longest, width)."""

    def __init__(self, cu_seqlens: Tensor, total: int, longest: int) -> None:
        self.cu = cu_seqlens.long().contiguous()
        self.lengths = self.cu.diff()
        place = torch.arange(longest, device=cu_seqlens.device)
        self.there = place < self.lengths[:, None]  # (sequences, longest)
        self.rows = (self.cu[:-1, None] + place).clamp(max=max(total - 1, 0))
        self.sequence, self.place, self.inside = _sequence(self.cu, total)
        self.place = self.place.clamp(0, max(longest - 1, 0))
        self.empty = not self.rows.numel() or not total

    def pad(self, t: Tensor) -> Tensor:
        """(total, heads, width) -> (sequences, heads, longest, width), 0 in the padding."""
        if self.empty:
            return t.new_zeros((self.rows.shape[0], t.shape[1], self.rows.shape[1], t.shape[2]))
        return t[self.rows].masked_fill(~self.there[..., None, None], 0.0).transpose(1, 2)

    def unpad(self, t: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """(sequences, heads, longest, width) -> (total, heads, width), `fill` in rows of no sequence."""
        if self.empty:
            return t.new_full((self.sequence.numel(), t.shape[1], t.shape[3]), fill, dtype=dtype)
        return t.transpose(1, 2)[self.sequence, self.place].masked_fill(~self.inside[:, None, None], fill).to(dtype)


def _padded(q: Tensor, k: Tensor, terms: tuple[Any, ...]) -> tuple[_Padding, _Padding, Problem]:
    bias, relative_bias, sinks, slopes, key_lengths, cu_q, cu_k, seed, *numbers, longest_q, longest_k = terms
    queries, keys = _Padding(cu_q, q.shape[0], longest_q), _Padding(cu_k, k.shape[0], longest_k)
    existing = keys.lengths if key_lengths is None else torch.minimum(key_lengths.long(), keys.lengths)
    dense_terms = (bias, relative_bias, sinks, slopes, existing, None, None, seed, *numbers)
    problem = replace(Problem(*dense_terms), query_lengths=queries.lengths, sequence_keys=keys.lengths)
    return queries, keys, problem


def forward(q: Tensor, k: Tensor, v: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    """q (Tq, H, D), k (Tk, Hk, D), v (Tk, Hk, Dv) -> out (Tq, H, Dv), lse (H, Tq)."""
    queries, keys, problem = _padded(q, k, terms)
    out, lse = core.forward(queries.pad(q), keys.pad(k), keys.pad(v), problem)
    lse = queries.unpad(lse.unsqueeze(-1), lse.dtype, -torch.inf)
    return queries.unpad(out, q.dtype), lse.squeeze(-1).t().contiguous()


def backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    """dout (Tq, H, Dv), dlse (H, Tq) -> dq, dk, dv like q, k, v; d_bias; d_relative_bias, d_sinks in float32."""
    *terms, needs = rest
    out, lse = terms[8:10]
    queries, keys, problem = _padded(q, k, (*terms[:8], *terms[10:]))

    def rows(t: Tensor) -> Tensor:
        """(heads, total) -> (sequences, heads, longest). The padding's lse and delta are 0: it adds to no gradient."""
        return queries.pad(t.t().unsqueeze(-1)).squeeze(-1)

    upstream = (None if dout is None else queries.pad(dout), None if dlse is None else rows(dlse))
    inputs = (queries.pad(q), keys.pad(k), keys.pad(v))
    dq, dk, dv, d_bias, *others = core.backward(*upstream, *inputs, problem, queries.pad(out), rows(lse), needs)
    return (
        None if dq is None else queries.unpad(dq, q.dtype),
        None if dk is None else keys.unpad(dk, k.dtype),
        None if dv is None else keys.unpad(dv, v.dtype),
        d_bias if d_bias is None or problem.bias is None else d_bias.to(problem.bias.dtype),
        *others,
    )


def outputs(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Spec, ...]:
    """out; lse."""
    lse = Spec((q.shape[1], q.shape[0]), torch.float64 if q.dtype == torch.float64 else torch.float32)
    return Spec((*q.shape[:2], v.shape[2]), q.dtype), lse


def gradients(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *terms: Any
) -> tuple[Spec, ...]:
    """dq, dk, dv, d_bias, d_relative_bias, d_sinks."""
    return *(Spec(tuple(t.shape), t.dtype) for t in (q, k, v)), *dense.added_gradients(q, *terms[:3])


def cost(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, causal: bool = False, alignment: str = "bottom-right", window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None, bias: Tensor | None = None, **_: Any,
) -> Cost:  # fmt: skip
    """As attention's, over the pairs that are seen; on "meta" every sequence counts as long as the longest."""
    (total, heads, width), v_width = q.shape, v.shape[2]
    left, right = band(causal, window)
    sequences = cu_seqlens_q.numel() - 1
    readable = cu_seqlens_q.device.type != "meta"
    q_lengths = cu_seqlens_q.diff().tolist() if readable else [max_seqlen_q] * sequences
    k_lengths = cu_seqlens_k.diff().tolist() if readable else [max_seqlen_k] * sequences
    used = k_lengths if key_lengths is None or not readable else key_lengths.tolist()
    pairs = float(heads) * sum(
        dense.visible_pairs(
            n_q, n_k, left, right, n_k - n_q if alignment == "bottom-right" else 0, min(max(n, 0), n_k)
        )
        for n_q, n_k, n in zip(q_lengths, k_lengths, used, strict=True)
    )
    inputs = q.nbytes + k.nbytes + v.nbytes + (0 if bias is None else bias.nbytes)
    out = total * heads * (v_width * q.element_size() + 4)
    return Cost(
        2 * pairs * (width + v_width), inputs + out, 2 * pairs * (3 * width + 2 * v_width), 2 * (inputs + out)
    )


def peer(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, bias: Tensor | None = None, alibi_slopes: Tensor | None = None, key_lengths: Tensor | None = None,
    dropout_p: float = 0.0, dropout_seed: Tensor | None = None, return_lse: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Sequence by sequence, as models write it out."""
    outs, lses, used = [], [], 0
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b, (q0, q1, k0, k1) in enumerate(zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False)):
        parts = [t[i:j].transpose(0, 1)[None] for t, i, j in ((q, q0, q1), (k, k0, k1), (v, k0, k1))]
        seed = dropout_seed
        here = bias
        if here is not None:
            here = here.reshape((1,) * (4 - here.dim()) + tuple(here.shape))
            here = here[min(b, here.shape[0] - 1)][None, :, : q1 - q0, : k1 - k0]
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        lengths = None if key_lengths is None else key_lengths[b : b + 1]
        if dropout_p:
            # The mask counts sequences: this one's is the last of a batch of b + 1.
            parts = [t.expand(b + 1, -1, -1, -1) for t in parts]
            lengths = None if lengths is None else lengths.expand(b + 1)
        out, lse = dense.peer(
            *parts, bias=here, alibi_slopes=slopes, key_lengths=lengths, dropout_p=dropout_p, dropout_seed=seed,
            return_lse=True, **options,
        )  # fmt: skip
        outs.append(out[-1].transpose(0, 1))
        lses.append(lse[-1])
        used = q1
    wide = torch.promote_types(q.dtype, torch.float32)
    rest = q.shape[0] - used
    # So that no sequence gives gradients of 0, not none.
    given = [q, k, v, bias, options.get("relative_bias"), options.get("sinks")]
    nothing = sum(t.flatten()[:0].sum() for t in given if t is not None and t.is_floating_point())
    result = torch.cat([*outs, q.new_zeros((rest, q.shape[1], v.shape[2]))]) + nothing
    lse = torch.cat([*lses, torch.full((q.shape[1], rest), -torch.inf, dtype=wide, device=q.device)], 1)
    return (result, lse) if return_lse else result


def _packed(q_lengths: list[int], k_lengths: list[int], h: int, hk: int, d: int, dv: int | None = None, rest: int = 0,
            int_dtype: torch.dtype = torch.int32) -> dict[str, Any]:  # fmt: skip
    """Arguments for sequences of these lengths, and `rest` rows of no sequence."""
    ends = [[sum(n[:i]) for i in range(len(n) + 1)] for n in (q_lengths, k_lengths)]
    tq, tk = ends[0][-1] + rest, ends[1][-1] + rest
    return {
        "q": Normal((tq, h, d)), "k": Normal((tk, hk, d)), "v": Normal((tk, hk, dv or d)),
        "cu_seqlens_q": Values(ends[0], int_dtype), "cu_seqlens_k": Values(ends[1], int_dtype),
        "max_seqlen_q": max(q_lengths, default=0), "max_seqlen_k": max(k_lengths, default=0),
    }  # fmt: skip


samples = (
    Sample("1 causal", **_packed([17, 1, 40, 5], [17, 1, 40, 5], 2, 2, 16), causal=True),
    Sample("2 cross-attention", **_packed([9, 0, 21, 4], [30, 7, 0, 2], 4, 2, 8, 12, int_dtype=torch.int64)),
    Sample("3 rows of no sequence", **_packed([9, 12], [9, 12], 2, 1, 16, rest=5), causal=True, return_lse=True),
    Sample("4 no key", **_packed([6], [0], 2, 1, 16)),
    Sample("5 T5 and others", **_packed([33, 20], [33, 28], 4, 2, 16), relative_bias=Normal((8, 4)),
           relative_max_distance=20, alibi_slopes=Normal((2, 4), 0.2), softcap=2.0, sinks=Normal((4,)), return_lse=True),
    Sample("6 dropout", **_packed([11, 24], [19, 24], 2, 1, 16), causal=True, window=(12, None), dropout_p=0.3,
           dropout_seed=SEED, bias=Normal((1, 2, 24, 24))),
    Sample("7 key lengths", **_packed([11, 24, 3], [19, 20, 9], 2, 2, 16), causal=True, alignment="top-left",
           key_lengths=Values([30, 12, -2], torch.int32)),
    Sample("8 no sequence", **_packed([], [], 2, 1, 16)),
)  # fmt: skip

_good = _packed([2, 3], [4, 1], 4, 2, 8)
errors = (
    Bad("q 4-dimensional", ValueError, r"q: .*\(1, 5, 4, 8\).*\(total", **(_good | {"q": Normal((1, 5, 4, 8))})),
    Bad("k width", ValueError, r"k: .*\(5, 2, 7\).*8", **(_good | {"k": Normal((5, 2, 7))})),
    Bad("v rows", ValueError, r"v: .*\(6, 2, 8\).*\(5, 2, ", **(_good | {"v": Normal((6, 2, 8))})),
    Bad("heads", ValueError, r"k: .*3 heads.*divides 4", **_packed([2], [4], 4, 3, 8)),
    Bad("cu dtype", TypeError, r"cu_seqlens_q: .*float32.*int32", **(_good | {"cu_seqlens_q": Normal((3,))})),
    Bad("cu empty", ValueError, r"cu_seqlens_k: .*\(0,\)", **(_good | {"cu_seqlens_k": Integers((0,), 0, 1)})),
    Bad("cu sizes", ValueError, r"cu_seqlens_k: .*\(4,\).*\(3,\)", **(_good | {"cu_seqlens_k": Integers((4,), 0, 1)})),
    Bad("longest", ValueError, r"max_seqlen_q: .*-1.*>= 0", **(_good | {"max_seqlen_q": -1})),
    Bad("bias shape", ValueError, r"bias: .*\(5, 5\).*\(2, 4, 3, 4\)", **_good, bias=Normal((5, 5))),
    Bad("key_lengths", ValueError, r"key_lengths: .*\(3,\).*\(2,\)", **_good, key_lengths=Integers((3,), 0, 2)),
    Bad("dropout_p", ValueError, r"dropout_p: .*-0\.5", **_good, dropout_p=-0.5),
    Bad("scale", ValueError, r"scale: .*inf.*finite", **_good, scale=math.inf),
)  # fmt: skip


def random(pick: Pick) -> Sample:
    """Any lengths, zero too, with any options together."""
    sequences, hk, group = pick.integer(0, 3), pick.integer(1, 2), pick.integer(1, 3)
    q_lengths = [pick.integer(0, 50) for _ in range(sequences)]
    k_lengths = [pick.integer(0, 50) for _ in range(sequences)]
    shape = _packed(
        q_lengths, k_lengths, hk * group, hk, pick.integer(1, 80), pick.integer(1, 80), pick.integer(0, 5)
    )
    more = options(pick, sequences, hk * group, shape["max_seqlen_q"], shape["max_seqlen_k"])
    return Sample("random", **shape, **more)


def case(
    sequences: int = 8, heads: int = 12, seq: int = 512, head_dim: int = 64, causal: bool = True,
    kv_heads: int | None = None, dropout_p: float = 0.0, t5: bool = False,
) -> Sample:  # fmt: skip
    """Self-attention of sequences from seq / 8 to seq long, in a fixed mixed order."""
    lengths = [max(1, seq * (1 + b * 5 % sequences * 7 // max(1, sequences - 1)) // 8) for b in range(sequences)]
    more: dict[str, Any] = {"dropout_p": dropout_p, "dropout_seed": SEED} if dropout_p else {}
    if t5:
        more |= {"relative_bias": Normal((32, heads)), "relative_bidirectional": not causal}
    return Sample("case", **_packed(lengths, lengths, heads, kv_heads or heads, head_dim), causal=causal, **more)


shapes = {
    "default": tuple({"sequences": 8, "seq": s, "causal": causal} for s in (512, 2048) for causal in (True, False)),
    "sweep": tuple({"sequences": 4, "seq": s} for s in (128, 256, 512, 1024, 2048)),
    "large": tuple(
        {"sequences": 16, "heads": 2048 // d, "seq": 8192, "head_dim": d, "causal": causal}
        for d in (64, 128)
        for causal in (True, False)
    ),
}


def terms(upstream: list[Tensor], *args: Any, **options: Any) -> dict[str, float]:
    """The largest sums of absolute terms of the gradients that are sums of dS."""
    call = core.Arguments()
    varlen_attention(*args, **options, tape=call)
    q, k, v, *rest = call.args
    out, lse = forward(*call.args)
    queries, keys, problem = _padded(q, k, tuple(rest))
    dlse = queries.pad(upstream[1].t().unsqueeze(-1)).squeeze(-1) if len(upstream) > 1 else None
    return core.absolute_terms(
        queries.pad(upstream[0]), dlse, queries.pad(q), keys.pad(k), keys.pad(v), problem, queries.pad(out),
        queries.pad(lse.t().unsqueeze(-1)).squeeze(-1),
    )  # fmt: skip


op = register(
    Op(
        name="varlen_attention",
        schema="(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? relative_bias, Tensor? sinks, "
        "Tensor? alibi_slopes, Tensor? key_lengths, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
        "Tensor? dropout_seed, int left, int right, bool top_left, float scale, float softcap, bool bidirectional, "
        "int max_distance, float dropout_p, int max_seqlen_q, int max_seqlen_k) -> (Tensor out, Tensor lse)",
        forward=forward,
        backward=backward,
        outputs=outputs,
        gradients=gradients,
        cost=cost,
        peer=peer,
        samples=samples,
        errors=errors,
        random=random,
        case=case,
        shapes=shapes,
        terms=terms,
        grads=("q", "k", "v", "bias", "relative_bias", "sinks"),
        accumulates=("relative_bias", "sinks"),
        saved=(
            "q", "k", "v", "bias", "relative_bias", "sinks", "alibi_slopes", "key_lengths", "cu_seqlens_q",
            "cu_seqlens_k", "dropout_seed", "out", "lse",
        ),
        results=2,
        contiguous=False,
    )
)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    alignment: str = "bottom-right",
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_bidirectional: bool = True,
    relative_max_distance: int = 128,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    tape: Any = None,
) -> Any:
    """Attention within each of B sequences that lie one after another.

    Args:
        q: (total_q, H, D), floating-point; D from 1 to 256.
        k: (total_k, Hk, D), of q's dtype; Hk divides H.
        v: (total_k, Hk, Dv), of q's dtype; Dv from 1 to 256.
        cu_seqlens_q: (B + 1,), int32 or int64, on q's device, from 0 on and never falling: where each sequence's queries
            begin, and where the last ends. Not checked, as that would wait for the device.
        cu_seqlens_k: (B + 1,), as cu_seqlens_q, for keys and values.
        max_seqlen_q: at least the number of queries of the longest sequence; not checked.
        max_seqlen_k: the same of keys.
        bias: what broadcasts to (B, H, max_seqlen_q, max_seqlen_k).
        key_lengths: (B,): sequence b has its first key_lengths[b] keys only; the alignment is by all of them.
        causal, alignment, scale, window, softcap, alibi_slopes, relative_bias, relative_bidirectional,
            relative_max_distance, dropout_p, dropout_seed, sinks, return_lse, tape: as in `attention`, B the number of
            sequences. Segment ids are what cu_seqlens say already.

    Returns:
        (total_q, H, Dv), of q's dtype; with return_lse, (out, lse), lse (H, total_q) in float32 (float64).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    if all(isinstance(t, Tensor) for t in (q, k, v)):
        q, k, v = autocast(q, k, v)
    check_qkv(q, k, v, 3, "(total, heads, head_dim)")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k: got shape {tuple(k.shape)}; allowed: (total, heads, {q.shape[2]}), to go with q")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v: got shape {tuple(v.shape)}; allowed: ({k.shape[0]}, {k.shape[1]}, head_dim), as k")
    check_head_counts(q.shape[1], k.shape[1])
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: got dtype {cu.dtype}; allowed: int32 or int64")
        if cu.dim() != 1 or cu.numel() < 1:
            raise ValueError(f"{name}: got shape {tuple(cu.shape)}; allowed: (sequences + 1,)")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k: got shape {tuple(cu_seqlens_k.shape)}; allowed: {tuple(cu_seqlens_q.shape)}, as cu_seqlens_q"
        )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest < 0:
            raise ValueError(f"{name}: got {longest}; allowed: >= 0")
    bias = check_options(
        q, cu_seqlens_q.numel() - 1, q.shape[1], max_seqlen_q, max_seqlen_k, alignment=alignment, window=window,
        softcap=softcap, alibi_slopes=alibi_slopes, bias=bias, relative_bias=relative_bias,
        relative_bidirectional=relative_bidirectional, relative_max_distance=relative_max_distance,
        key_lengths=key_lengths, sinks=sinks,
    )  # fmt: skip
    dropout_seed = check_dropout(dropout_p, dropout_seed, q.device, tape)
    check_same_device(
        q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, alibi_slopes=alibi_slopes, bias=bias,
        relative_bias=relative_bias, key_lengths=key_lengths, dropout_seed=dropout_seed, sinks=sinks,
    )  # fmt: skip
    scale = 1.0 / math.sqrt(q.shape[2]) if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}; allowed: a finite number")
    left, right = band(causal, window)
    out, lse = op(
        q, k, v, bias, relative_bias, sinks, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, dropout_seed, left,
        right, alignment == "top-left", scale, float(softcap or 0.0), relative_bidirectional, relative_max_distance,
        float(dropout_p), max_seqlen_q, max_seqlen_k, tape=tape,
    )  # fmt: skip
    return (out, lse) if return_lse else out
