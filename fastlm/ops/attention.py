"""Scaled dot-product attention, for self- and cross-attention, with grouped-query heads and dropout.

    S = scale * Q K^T,  S_ij = -inf where query i does not see key j      lse_i = log sum_j exp(S_ij)
    P = exp(S - lse)                        M'_ij = keep_ij / (1 - p)     O = (P * M') V

Query head h reads key head h // (H / Hk). Query i of batch b sees key j if j < key_lengths[b] and, when
causal, j <= i + Sk - Sq: the diagonal ends in the bottom-right corner, with Sk the padded length. A query
that sees no key is blind: its lse is +inf, so that P = exp(-inf - inf) = 0 in forward and backward, its
output 0 and its gradient 0. Keys and values beyond key_lengths are never read: what stands there, NaN
included, does not matter, and their gradient is 0.

Gradients, with G = dO and sums over a head (for dK and dV over the group of query heads that reads it):
    dV = (P * M')^T G                       dP = M' * (G V^T)
    dS_ij = P_ij (dP_ij - sum_k P_ik dP_ik), by the softmax; since O_ic = sum_k P_ik M'_ik V_kc, the sum is
    delta_i = sum_c G_ic O_ic, dropout included. So dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q.

Dropout: weight (batch b, query head h, query i, key j) is kept if word j & 3 of Philox4x32-10, with the seed
as its key and the counter (j >> 2, i, h, b), is >= floor(p 2**32); see fastlm/philox.py. The mask depends
neither on tiles nor on the backend and is never stored; lse is that of the scores without dropout.

Saved: q, k, v, key_lengths and dropout_seed as given, out, and lse in float32 (float64 for float64).

Edge cases
 1  causal self-attention                                8  no batch
 2  grouped-query heads, Sq < Sk, key lengths            9  one query, one key, D = 1
 3  cross-attention, D and Dv different and odd         10  weights peaked on few keys
 4  causal with Sq > Sk: the first queries are blind    11  dropout with grouped-query heads
 5  key lengths of 0, beyond Sk, negative               12  wide heads
 6  Sk = 0: every output is 0                           13  negative scale: largest score, smallest product
 7  Sq = 0                                              14  scale 0: the mean of the visible values

Source: Vaswani et al., "Attention is all you need" (2017), arXiv:1706.03762, equation 1; backward
and log-sum-exp: Dao, "FlashAttention-2" (2023), arXiv:2307.08691, section 3.1; grouped heads: Ainslie et al.
(2023), arXiv:2305.13245.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import check_floating, check_same_device
from ..philox import drop_threshold, philox_lanes
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values

__all__ = ["attention", "attention_dropout_mask"]

MAX_HEAD_DIM = 256
_HEADS_INSIDE = (0, 2, 1, 3)  # memory order (batch, seq, heads, head_dim): merging the heads is a view


def attention_dropout_mask(
    dropout_seed: Tensor, dropout_p: float, batch: int, heads: int, queries: int, keys: int
) -> Tensor:
    """Which attention weights dropout keeps: bool (batch, heads, queries, keys), the same on every backend.

    Args:
        dropout_seed: int64, one element.
        dropout_p: probability of dropping, in [0, 1).
    """
    b, h, i, j = (torch.arange(n, device=dropout_seed.device) for n in (batch, heads, queries, -(-keys // 4)))
    words = philox_lanes(dropout_seed, j, i[:, None], h[:, None, None], b[:, None, None, None])[..., :keys]
    return words >= drop_threshold(dropout_p)


def _wide(t: Tensor) -> Tensor:
    return (t if t.dtype == torch.float64 else t.float()).contiguous()


def _heads_inside(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _exists(key_lengths: Tensor | None, keys: int) -> Tensor | None:
    """(batch, 1, keys, 1): which keys there are."""
    if key_lengths is None:
        return None
    return (torch.arange(keys, device=key_lengths.device) < key_lengths[:, None])[:, None, :, None]


def _existing(t: Tensor, key_lengths: Tensor | None) -> Tensor:
    """Keys or values (batch, heads, keys, width) in float32; 0 beyond the lengths, where nothing is read."""
    exists = _exists(key_lengths, t.shape[2])
    return _wide(t) if exists is None else _wide(t).masked_fill(~exists, 0.0)


def _visible(q: Tensor, k: Tensor, key_lengths: Tensor | None, causal: bool) -> Tensor | None:
    """Broadcasts to (batch, heads, queries, keys): which keys each query sees; None for all."""
    queries, keys = q.shape[2], k.shape[2]
    exists = _exists(key_lengths, keys)
    visible = None if exists is None else exists.transpose(2, 3)
    if causal:
        below = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        visible = below if visible is None else visible & below
    return visible


def _scores(q: Tensor, k: Tensor, key_lengths: Tensor | None, causal: bool, scale: float) -> Tensor:
    """S in float32, (batch, heads, queries, keys)."""
    # The group's queries stand one after another, so that grouped heads are one product a key head.
    s = (_group(_wide(q), k) @ _existing(k, key_lengths).transpose(-1, -2)) * scale
    s = s.reshape(*q.shape[:3], k.shape[2])
    visible = _visible(q, k, key_lengths, causal)
    return s if visible is None else s.masked_fill(~visible, -torch.inf)


def _group(t: Tensor, k: Tensor) -> Tensor:
    """(batch, heads, queries, width) -> (batch, key heads, group * queries, width)."""
    batch, heads, queries, width = t.shape
    return t.reshape(batch, k.shape[1], heads // k.shape[1] * queries, width)


def _keep(
    q: Tensor, k: Tensor, dropout_seed: Tensor | None, dropout_p: float, dtype: torch.dtype
) -> Tensor | None:
    """M', 0 or 1 / (1 - p); None without dropout."""
    if dropout_seed is None or dropout_p == 0.0:
        return None
    batch, heads, queries, _ = q.shape
    mask = attention_dropout_mask(dropout_seed, dropout_p, batch, heads, queries, k.shape[2])
    return mask.to(dtype) / (1.0 - dropout_p)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    dropout_seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """q (B, H, Sq, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv) -> out (B, H, Sq, Dv), lse (B, H, Sq)."""
    s = _scores(q, k, key_lengths, causal, scale)
    blind = (s == -torch.inf).all(-1, keepdim=True)
    # A blind row gets finite scores on the way, so that autograd of this function has no NaN either.
    lse = s.masked_fill(blind, 0.0).logsumexp(-1, keepdim=True).masked_fill(blind, torch.inf)
    p = (s - lse).exp()
    keep = _keep(q, k, dropout_seed, dropout_p, p.dtype)
    if keep is not None:
        p = p * keep
    out = (_group(p, k) @ _existing(v, key_lengths)).reshape(*q.shape[:3], v.shape[3])
    return _heads_inside(out, q.dtype), lse.squeeze(-1)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    dropout_seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dout (B, H, Sq, Dv) -> dq, dk and dv like q, k and v."""
    dq = dk = dv = None
    p = (_scores(q, k, key_lengths, causal, scale) - lse.unsqueeze(-1)).exp()
    keep = _keep(q, k, dropout_seed, dropout_p, p.dtype)
    g = _group(_wide(dout), k)
    if needs[2]:
        kept = p if keep is None else p * keep
        dv = _heads_inside(_group(kept, k).transpose(-1, -2) @ g, v.dtype)
    if needs[0] or needs[1]:
        dp = (g @ _existing(v, key_lengths).transpose(-1, -2)).reshape(p.shape)
        if keep is not None:
            dp = dp * keep
        delta = (_wide(dout) * _wide(out)).sum(-1, keepdim=True)
        ds = _group(p * (dp - delta) * scale, k)
        if needs[0]:
            dq = _heads_inside((ds @ _existing(k, key_lengths)).reshape(q.shape), q.dtype)
        if needs[1]:
            dk = _heads_inside(ds.transpose(-1, -2) @ _group(_wide(q), k), k.dtype)
    return dq, dk, dv


def outputs(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Spec, ...]:
    """out; lse."""
    lse = Spec(tuple(q.shape[:3]), torch.float64 if q.dtype == torch.float64 else torch.float32)
    return Spec((*q.shape[:3], v.shape[3]), q.dtype, _HEADS_INSIDE), lse


def gradients(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Spec, ...]:
    """dq, dk, dv."""
    return tuple(Spec(tuple(t.shape), t.dtype, _HEADS_INSIDE) for t in (q, k, v))


def cost(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, **_: Any) -> Cost:
    """2 products forward, 5 backward, over the pairs that `causal` leaves; key lengths are not looked at.

    Forward reads q, k and v and writes out and lse; backward reads these and dout and writes dq, dk and dv.
    """
    batch, heads, queries, width = q.shape
    keys, v_width = k.shape[2], v.shape[3]
    seen = (min(max(i + keys - queries + 1, 0), keys) for i in range(queries)) if causal else [queries * keys]
    pairs = float(batch * heads * sum(seen))
    inputs = q.nbytes + k.nbytes + v.nbytes
    out = batch * heads * queries * (v_width * q.element_size() + 4)
    return Cost(
        2 * pairs * (width + v_width), inputs + out, 2 * pairs * (3 * width + 2 * v_width), 2 * (inputs + out)
    )


def peer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """Attention as models write it out: products in the inputs' dtype, softmax in float32.

    F.scaled_dot_product_attention has neither this causal alignment, nor blind rows that give 0, nor this
    mask.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    s = (q @ k.transpose(-1, -2)) * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    visible = torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(s.shape[-1] - s.shape[-2])
    if key_lengths is not None:
        visible = visible & (torch.arange(s.shape[-1], device=q.device) < key_lengths[:, None])[:, None, None]
    blind = ~visible.any(-1, keepdim=True)
    s = s.masked_fill(~visible & ~blind, -torch.inf)
    p = s.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype).masked_fill(blind, 0.0)
    if dropout_p:
        assert dropout_seed is not None
        p = p * attention_dropout_mask(dropout_seed, dropout_p, *p.shape) / (1.0 - dropout_p)
    return p @ v


def terms(
    upstream: list[Tensor], q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None,
    key_lengths: Tensor | None = None, dropout_p: float = 0.0, dropout_seed: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """dq and dk are sums of P * (dP - delta) times k or q: their terms' largest absolute sums."""
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    out, lse = forward(q, k, v, key_lengths, dropout_seed, causal, scale, dropout_p)
    p = (_scores(q, k, key_lengths, causal, scale) - lse.unsqueeze(-1)).exp()
    dp = (_group(upstream[0], k) @ _existing(v, key_lengths).transpose(-1, -2)).reshape(p.shape)
    keep = _keep(q, k, dropout_seed, dropout_p, p.dtype)
    dp = dp.abs() if keep is None else dp.abs() * keep
    delta = (upstream[0] * out).abs().sum(-1, keepdim=True)
    ds = _group(p * (dp + delta) * abs(scale), k)
    sums = {"q": ds @ _existing(k, key_lengths).abs(), "k": ds.transpose(-1, -2) @ _group(q.abs(), k)}
    return {name: total.max().item() if total.numel() else 0.0 for name, total in sums.items()}


def _qkv(
    b: int, h: int, hk: int, sq: int, sk: int, d: int, dv: int | None = None, scale: float = 1.0
) -> dict[str, Normal]:
    return {
        "q": Normal((b, h, sq, d), scale),
        "k": Normal((b, hk, sk, d)),
        "v": Normal((b, hk, sk, d if dv is None else dv)),
    }


_seed = Values([-0x123456789ABCDEF], torch.int64)  # both halves of the key are used
samples = (
    Sample("1 causal", **_qkv(2, 2, 2, 37, 37, 16), causal=True),
    Sample(
        "2 grouped heads", **_qkv(2, 4, 2, 19, 45, 8), causal=True, key_lengths=Values([45, 30], torch.int32)
    ),
    Sample("3 cross-attention", **_qkv(1, 3, 1, 21, 50, 13, 27), scale=0.4),
    Sample("4 causal, more queries than keys", **_qkv(1, 2, 2, 50, 18, 16), causal=True),
    Sample(
        "5 key lengths", **_qkv(5, 1, 1, 7, 20, 16), key_lengths=Values([0, 20, 1000, -5, 17], torch.int64)
    ),
    Sample("6 no keys", **_qkv(2, 2, 1, 5, 0, 16), causal=True),
    Sample("7 no queries", **_qkv(2, 2, 1, 0, 5, 16)),
    Sample("8 no batch", **_qkv(0, 2, 2, 4, 5, 16), key_lengths=Integers((0,), 0, 5)),
    Sample("9 one of each", **_qkv(1, 1, 1, 1, 1, 1), causal=True),
    Sample("10 peaked weights", **_qkv(1, 1, 1, 24, 40, 16, scale=2.0), causal=True),
    Sample("11 dropout", **_qkv(2, 4, 2, 23, 38, 16), causal=True, dropout_p=0.3, dropout_seed=_seed),
    Sample("12 wide heads", **_qkv(1, 1, 1, 18, 35, 256, 200, scale=0.5), causal=True),
    Sample("13 negative scale", **_qkv(1, 2, 1, 20, 33, 16), scale=-0.7, key_lengths=Integers((1,), 20, 30)),
    Sample("14 scale 0", **_qkv(1, 2, 1, 20, 33, 16), scale=0.0, causal=True),
)

_good = _qkv(2, 4, 2, 3, 5, 8)
_f32, _i64 = torch.float32, torch.int64
errors = (
    Bad("q integer", TypeError, r"q: .*int64.*floating", **(_good | {"q": Integers((2, 4, 3, 8), 0, 2)})),
    Bad(
        "k dtype",
        TypeError,
        r"k: .*float64.*float32",
        **(_good | {"k": Normal((2, 2, 5, 8), dtype=torch.float64)}),
    ),
    Bad("q 3-dimensional", ValueError, r"q: .*\(4, 3, 8\)", **(_good | {"q": Normal((4, 3, 8))})),
    Bad("k batch", ValueError, r"k: .*\(3, 2, 5, 8\).*\(2, ", **(_good | {"k": Normal((3, 2, 5, 8))})),
    Bad("k width", ValueError, r"k: .*\(2, 2, 5, 7\).*8", **(_good | {"k": Normal((2, 2, 5, 7))})),
    Bad("v length", ValueError, r"v: .*\(2, 2, 6, 8\).*\(2, 2, 5, ", **(_good | {"v": Normal((2, 2, 6, 8))})),
    Bad("heads", ValueError, r"k: .*3 heads.*divides 4", **_qkv(2, 4, 3, 3, 5, 8)),
    Bad("no heads", ValueError, r"k: .*0 heads", **_qkv(2, 0, 0, 3, 5, 8)),
    Bad("D too wide", ValueError, r"q: .*head_dim 257.*256", **_qkv(1, 1, 1, 3, 5, 257)),
    Bad("Dv = 0", ValueError, r"v: .*head_dim 0.*256", **_qkv(1, 1, 1, 3, 5, 8, 0)),
    Bad(
        "key_lengths shape",
        ValueError,
        r"key_lengths: .*\(3,\).*\(2,\)",
        **_good,
        key_lengths=Integers((3,), 0, 5),
    ),
    Bad(
        "key_lengths dtype",
        TypeError,
        r"key_lengths: .*float32.*int32",
        **_good,
        key_lengths=Normal((2,), dtype=_f32),
    ),
    Bad("dropout_p", ValueError, r"dropout_p: .*1\.0.*\[0, 1\)", **_good, dropout_p=1.0),
    Bad(
        "seed size",
        ValueError,
        r"dropout_seed: .*\(2,\).*one",
        **_good,
        dropout_p=0.5,
        dropout_seed=Values([1, 2], _i64),
    ),
    Bad(
        "seed dtype",
        TypeError,
        r"dropout_seed: .*int32.*int64",
        **_good,
        dropout_p=0.5,
        dropout_seed=Values([1], torch.int32),
    ),
    Bad("scale", ValueError, r"scale: .*nan.*finite", **_good, scale=math.nan),
)

def random(pick: Pick) -> Sample:
    """Any lengths and widths, grouped heads, masks and dropout together."""
    b, hk, group = pick.integer(1, 2), pick.integer(1, 2), pick.integer(1, 3)
    sq, sk = pick.integer(0, 70), pick.integer(0, 70)
    d, dv = pick.integer(1, 80), pick.one_of(None, pick.integer(1, 80))
    p = pick.one_of(0.0, 0.3)
    return Sample(
        "random", **_qkv(b, hk * group, hk, sq, sk, d, dv), causal=pick.one_of(False, True),
        scale=pick.one_of(None, 0.3), key_lengths=pick.one_of(None, Integers((b,), -1, sk + 2)),
        dropout_p=p, dropout_seed=_seed if p else None,
    )  # fmt: skip


def case(
    batch: int = 2, heads: int = 12, seq: int = 512, head_dim: int = 64, causal: bool = True,
    kv_heads: int | None = None, seq_k: int | None = None, dropout_p: float = 0.0,
) -> Sample:  # fmt: skip
    """Self-attention, or cross-attention with seq_k keys."""
    sk = seq if seq_k is None else seq_k
    return Sample(
        "case", **_qkv(batch, heads, kv_heads or heads, seq, sk, head_dim), causal=causal, dropout_p=dropout_p,
        dropout_seed=_seed if dropout_p else None,
    )  # fmt: skip


shapes = {
    "default": tuple(
        {"batch": b, "heads": h, "seq": s, "head_dim": d, "causal": causal}
        for b, h, s, d in ((2, 12, 512, 64), (2, 12, 2048, 64), (1, 16, 1024, 128))
        for causal in (True, False)
    ),
    "sweep": tuple({"batch": 1, "heads": 12, "seq": s, "head_dim": 64} for s in (128, 256, 512, 1024, 2048, 4096)),
    "large": tuple(
        {"batch": 2**15 // s, "heads": 2048 // d, "seq": s, "head_dim": d, "causal": causal}
        for s in (1024, 8192)
        for d in (64, 128)
        for causal in (True, False)
    ),
}


op = register(
    Op(
        name="attention",
        schema="(Tensor q, Tensor k, Tensor v, Tensor? key_lengths, Tensor? dropout_seed, bool causal, "
        "float scale, float dropout_p) -> (Tensor out, Tensor lse)",
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
        grads=("q", "k", "v"),
        saved=("q", "k", "v", "key_lengths", "dropout_seed", "out", "lse"),
        contiguous=False,
    )
)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_floating(name, t)
        if t.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {t.dtype}; allowed: q's dtype {q.dtype}")
        if t.dim() != 4:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}; allowed: (batch, heads, seq, head_dim)")
    batch, heads, _, width = q.shape
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(
            f"k: got shape {tuple(k.shape)}; allowed: ({batch}, heads, seq, {width}), to go with q"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v: got shape {tuple(v.shape)}; allowed: ({', '.join(map(str, k.shape[:3]))}, head_dim), as k"
        )
    if k.shape[1] == 0 or heads % k.shape[1] or heads == 0:
        raise ValueError(
            f"k: got {k.shape[1]} heads; allowed: 1 or more, a number that divides {heads}, q's heads"
        )
    for name, t in (("q", q), ("v", v)):
        if not 1 <= t.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: got head_dim {t.shape[3]}; allowed: 1 to {MAX_HEAD_DIM}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    tape: Any = None,
) -> Tensor:
    """softmax(scale * q k^T) v, without holding the (Sq, Sk) weights.

    Args:
        q: (B, H, Sq, D), floating-point; D from 1 to 256, Sq any, 0 included.
        k: (B, Hk, Sk, D), of q's dtype; Hk divides H, and query head h reads key head h // (H / Hk); Sk any.
        v: (B, Hk, Sk, Dv), of q's dtype; Dv from 1 to 256.
        causal: query i sees keys j <= i + Sk - Sq (bottom-right: the last query sees every key).
        scale: finite; None for 1 / sqrt(D).
        key_lengths: (B,), int32 or int64, on q's device: batch b has the keys j < key_lengths[b], the rest is
            never read. Not checked, as that would wait for the device: below 0 acts as 0, above Sk as Sk.
        dropout_p: probability in [0, 1) of dropping a weight; the others are scaled by 1 / (1 - dropout_p).
        dropout_seed: int64, one element, on q's device; the mask is `attention_dropout_mask`. None draws it
            from torch's generator, except on a tape, where it must be given.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        (B, H, Sq, Dv), of q's dtype, laid out in memory as (B, Sq, H, Dv), so that merging the heads is a
        view. A query that sees no key gives 0 and has gradient 0. Accumulated in float32 (float64 for
        float64).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Vaswani et al. (2017), arXiv:1706.03762; Dao (2023), arXiv:2307.08691.
    """
    _check_heads(q, k, v)
    if key_lengths is not None:
        if key_lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"key_lengths: got dtype {key_lengths.dtype}; allowed: int32 or int64")
        if key_lengths.shape != q.shape[:1]:
            raise ValueError(
                f"key_lengths: got shape {tuple(key_lengths.shape)}; allowed: ({q.shape[0]},), one a batch"
            )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}; allowed: [0, 1)")
    if dropout_p == 0.0:
        dropout_seed = None
    elif dropout_seed is None:
        if tape is not None:
            raise ValueError("dropout_seed: got None on a tape; allowed: an int64 tensor of one element")
        dropout_seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=q.device)
    elif dropout_seed.dtype != torch.int64:
        raise TypeError(f"dropout_seed: got dtype {dropout_seed.dtype}; allowed: int64")
    elif dropout_seed.numel() != 1:
        raise ValueError(f"dropout_seed: got shape {tuple(dropout_seed.shape)}; allowed: one element")
    check_same_device(q=q, k=k, v=v, key_lengths=key_lengths, dropout_seed=dropout_seed)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}; allowed: a finite number")
    out: Tensor = op(q, k, v, key_lengths, dropout_seed, bool(causal), scale, float(dropout_p), tape=tape)[0]
    return out
