"""Arguments that the ops of attention are tested and timed on; the numbers are edge cases of attention.py."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..samples import Bad, Integers, Normal, Pick, Sample, Values

__all__: list[str] = []


def qkv(
    b: int, h: int, hk: int, sq: int, sk: int, d: int, dv: int | None = None, scale: float = 1.0
) -> dict[str, Normal]:
    return {
        "q": Normal((b, h, sq, d), scale),
        "k": Normal((b, hk, sk, d)),
        "v": Normal((b, hk, sk, d if dv is None else dv)),
    }


SEED = Values([-0x123456789ABCDEF], torch.int64)  # both halves of the key are used
samples = (
    Sample("1 causal", **qkv(2, 2, 2, 37, 37, 16), causal=True),
    Sample(
        "2 grouped heads", **qkv(2, 4, 2, 19, 45, 8), causal=True, key_lengths=Values([45, 30], torch.int32)
    ),
    Sample("3 cross-attention", **qkv(1, 3, 1, 21, 50, 13, 27), scale=0.4),
    Sample("4 causal, more queries than keys", **qkv(1, 2, 2, 50, 18, 16), causal=True),
    Sample(
        "5 key lengths", **qkv(5, 1, 1, 7, 20, 16), key_lengths=Values([0, 20, 1000, -5, 17], torch.int64)
    ),
    Sample("6 no keys", **qkv(2, 2, 1, 5, 0, 16), causal=True),
    Sample("7 no queries", **qkv(2, 2, 1, 0, 5, 16)),
    Sample("8 no batch", **qkv(0, 2, 2, 4, 5, 16), key_lengths=Integers((0,), 0, 5)),
    Sample("9 one of each", **qkv(1, 1, 1, 1, 1, 1), causal=True),
    Sample("10 peaked weights", **qkv(1, 1, 1, 24, 40, 16, scale=2.0), causal=True),
    Sample("11 dropout", **qkv(2, 4, 2, 23, 38, 16), causal=True, dropout_p=0.3, dropout_seed=SEED),
    Sample("12 wide heads", **qkv(1, 1, 1, 18, 35, 256, 200, scale=0.5), causal=True),
    Sample("13 negative scale", **qkv(1, 2, 1, 20, 33, 16), scale=-0.7, key_lengths=Integers((1,), 20, 30)),
    Sample("14 scale 0", **qkv(1, 2, 1, 20, 33, 16), scale=0.0, causal=True),
    Sample("15 window", **qkv(1, 2, 1, 45, 39, 16), window=(5, 3), softcap=1.5),
    Sample("16 ALiBi", **qkv(2, 2, 2, 21, 38, 8), causal=True, window=(9, None), alibi_slopes=Normal((2, 2), 0.3)),
    Sample("17 bias", **qkv(2, 2, 1, 19, 35, 16), bias=Normal((2, 19, 35)), return_lse=True),
    Sample("18 bias of one row", **qkv(2, 2, 2, 19, 35, 16), causal=True, bias=Normal((2, 1, 1, 35))),
    Sample("19 mask", **qkv(2, 2, 2, 3, 4, 8), bias=Values(
        [[[[True, False, True, False], [False] * 4, [True] * 4]], [[[False] * 4] * 3]], torch.bool)),
    Sample("20 T5, both directions", **qkv(1, 2, 2, 37, 42, 16), relative_bias=Normal((8, 2)),
           relative_max_distance=20, dropout_p=0.2, dropout_seed=SEED),
    Sample("21 T5, one direction", **qkv(2, 2, 1, 50, 50, 8), causal=True, relative_bias=Normal((32, 2)),
           relative_bidirectional=False),
    Sample("22 documents", **qkv(2, 2, 1, 40, 40, 16), causal=True, segment_ids=Values(
        [[0] * 17 + [1] + [2] * 22, [7] * 40], torch.int32)),
    Sample("23 segment ids in no order", **qkv(1, 2, 2, 20, 33, 16), segment_ids=Integers((1, 20), 0, 5),
           key_segment_ids=Integers((1, 33), 0, 4)),
    Sample("24 sinks", **qkv(2, 4, 2, 30, 20, 16), causal=True, sinks=Normal((4,)), return_lse=True),
    Sample("25 top-left", **qkv(1, 2, 2, 18, 40, 16), causal=True, alignment="top-left", window=(7, None)),
    Sample("26 everything", **qkv(2, 4, 2, 21, 37, 16), causal=True, window=(25, None), softcap=2.0,
           alibi_slopes=Normal((4,), 0.2), bias=Normal((2, 1, 21, 37), 0.5), relative_bias=Normal((6, 4)),
           relative_max_distance=9, key_lengths=Values([37, 30], torch.int64), segment_ids=Integers((2, 21), 0, 2),
           key_segment_ids=Integers((2, 37), 0, 2), dropout_p=0.3, dropout_seed=SEED, sinks=Normal((4,)),
           return_lse=True),
)  # fmt: skip

_good = qkv(2, 4, 2, 3, 5, 8)
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
    Bad("heads", ValueError, r"k: .*3 heads.*divides 4", **qkv(2, 4, 3, 3, 5, 8)),
    Bad("no heads", ValueError, r"k: .*0 heads", **qkv(2, 0, 0, 3, 5, 8)),
    Bad("D too wide", ValueError, r"q: .*head_dim 257.*256", **qkv(1, 1, 1, 3, 5, 257)),
    Bad("Dv = 0", ValueError, r"v: .*head_dim 0.*256", **qkv(1, 1, 1, 3, 5, 8, 0)),
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
    Bad("alignment", ValueError, r"alignment: .*'left'.*top-left", **_good, alignment="left"),
    Bad("window", ValueError, r"window: .*\(-2, 3\).*>= 0", **_good, window=(-2, 3)),
    Bad("softcap", ValueError, r"softcap: .*-1\.0.*> 0", **_good, softcap=-1.0),
    Bad("slopes", ValueError, r"alibi_slopes: .*\(3,\).*\(4,\) or \(2, 4\)", **_good, alibi_slopes=Normal((3,))),
    Bad("bias shape", ValueError, r"bias: .*\(3, 3, 5\).*\(2, 4, 3, 5\)", **_good, bias=Normal((3, 3, 5))),
    Bad("bias 5-dimensional", ValueError, r"bias: .*broadcasts", **_good, bias=Normal((1, 2, 4, 3, 5))),
    Bad("bias dtype", TypeError, r"bias: .*int64.*bool", **_good, bias=Integers((3, 5), 0, 2)),
    Bad("T5 heads", ValueError, r"relative_bias: .*\(8, 3\).*\(8, 4\)", **_good, relative_bias=Normal((8, 3))),
    Bad("T5 odd", ValueError, r"relative_bias: .*7 buckets.*even", **_good, relative_bias=Normal((7, 4))),
    Bad("T5 dtype", TypeError, r"relative_bias: .*float64.*float32", **_good,
        relative_bias=Normal((8, 4), dtype=torch.float64)),
    Bad("T5 distance", ValueError, r"relative_max_distance: .*got 2.*more than 2", **_good,
        relative_bias=Normal((8, 4)), relative_max_distance=2),
    Bad("sinks", ValueError, r"sinks: .*\(2,\).*\(4,\)", **_good, sinks=Normal((2,))),
    Bad("segments", ValueError, r"segment_ids: .*\(2, 5\).*\(2, 3\)", **_good, segment_ids=Integers((2, 5), 0, 2),
        key_segment_ids=Integers((2, 5), 0, 2)),
    Bad("segments of queries only", ValueError, r"key_segment_ids: .*None.*3 queries and 5 keys", **_good,
        segment_ids=Integers((2, 3), 0, 2)),
    Bad("segments of keys only", ValueError, r"segment_ids: .*None", **_good, key_segment_ids=Integers((2, 5), 0, 2)),
    Bad("segment dtype", TypeError, r"segment_ids: .*float32.*int32", **_good, segment_ids=Normal((2, 3), dtype=_f32),
        key_segment_ids=Integers((2, 5), 0, 2)),
    Bad("segment dtypes", TypeError, r"key_segment_ids: .*int32.*int64", **_good,
        segment_ids=Integers((2, 3), 0, 2), key_segment_ids=Integers((2, 5), 0, 2, torch.int32)),
)  # fmt: skip

def options(pick: Pick, batch: int, heads: int, queries: int, keys: int) -> dict[str, Any]:
    """Options that both ops take, any of them together."""
    p, buckets, rows = pick.one_of(0.0, 0.3), pick.one_of(0, 8, 32), pick.one_of(1, queries)
    return {
        "causal": pick.one_of(False, True),
        "alignment": pick.one_of("bottom-right", "top-left"),
        "window": pick.one_of(None, (pick.integer(0, 40), None), (pick.integer(0, 40), pick.integer(0, 40))),
        "scale": pick.one_of(None, 0.3),
        "softcap": pick.one_of(None, 2.0),
        "alibi_slopes": pick.one_of(None, Normal((heads,), 0.2), Normal((batch, heads), 0.2)),
        "bias": pick.one_of(
            None, Normal((pick.one_of(1, batch), pick.one_of(1, heads), rows, keys)),
            Integers((queries, keys), 0, 2, torch.bool),
        ),
        "relative_bias": Normal((buckets, heads)) if buckets else None,
        "relative_bidirectional": pick.one_of(True, False),
        "relative_max_distance": pick.one_of(128, 20),
        "key_lengths": pick.one_of(None, Integers((batch,), -1, keys + 2)),
        "dropout_p": p,
        "dropout_seed": SEED if p else None,
        "sinks": pick.one_of(None, Normal((heads,))),
        "return_lse": pick.one_of(False, True),
    }  # fmt: skip


def random(pick: Pick) -> Sample:
    """Any lengths and widths, grouped heads, and any options together."""
    b, hk, group = pick.integer(1, 2), pick.integer(1, 2), pick.integer(1, 3)
    sq, sk = pick.integer(0, 70), pick.integer(0, 70)
    d, dv = pick.integer(1, 80), pick.one_of(None, pick.integer(1, 80))
    documents = pick.one_of(0, 1, 3)
    ids = {"segment_ids": (b, sq), "key_segment_ids": (b, sk)} if documents else {}
    return Sample(
        "random", **qkv(b, hk * group, hk, sq, sk, d, dv), **options(pick, b, hk * group, sq, sk),
        **{name: Integers(shape, 0, documents) for name, shape in ids.items()},
    )  # fmt: skip


def case(
    batch: int = 2, heads: int = 12, seq: int = 512, head_dim: int = 64, causal: bool = True,
    kv_heads: int | None = None, seq_k: int | None = None, dropout_p: float = 0.0, window: int | None = None,
    softcap: float | None = None, t5: bool = False, bias: bool = False, alibi: bool = False, documents: int = 1,
) -> Sample:  # fmt: skip
    """Self-attention, or cross-attention with seq_k keys.

    window: keys before a query that it sees. t5: T5's relative bias of 32 buckets. bias: (1, heads, seq, seq_k),
    with a gradient. documents: sequences of about equal length that every row is packed of.
    """
    sk = seq if seq_k is None else seq_k
    more: dict[str, Any] = {}
    if window is not None:
        more["window"] = (window, None if causal else window)
    if softcap is not None:
        more["softcap"] = softcap
    if t5:
        more |= {"relative_bias": Normal((32, heads)), "relative_bidirectional": not causal}
    if bias:
        more["bias"] = Normal((1, heads, seq, sk))
    if alibi:
        more["alibi_slopes"] = Values([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], torch.float32)
    if documents > 1:
        more["segment_ids"] = Values([[i * documents // seq for i in range(seq)]] * batch, torch.int32)
        more["key_segment_ids"] = Values([[i * documents // sk for i in range(sk)]] * batch, torch.int32)
    return Sample(
        "case", **qkv(batch, heads, kv_heads or heads, seq, sk, head_dim), causal=causal, dropout_p=dropout_p,
        dropout_seed=SEED if dropout_p else None, **more,
    )  # fmt: skip


shapes = {
    "default": tuple(
        {"batch": b, "heads": h, "seq": s, "head_dim": d, "causal": causal}
        for b, h, s, d in ((2, 12, 512, 64), (2, 12, 2048, 64), (1, 16, 1024, 128))
        for causal in (True, False)
    ),
    "sweep": tuple({"batch": 1, "heads": 12, "seq": s, "head_dim": 64} for s in (128, 256, 512, 1024, 2048, 4096)),
    "masked": (
        {"batch": 2, "heads": 12, "seq": 512, "head_dim": 64, "causal": False, "t5": True},
        {"batch": 2, "heads": 12, "seq": 2048, "head_dim": 64, "causal": False, "t5": True},
        {"batch": 2, "heads": 12, "seq": 2048, "head_dim": 64, "causal": True, "documents": 8},
        {"batch": 2, "heads": 12, "seq": 2048, "head_dim": 64, "causal": True, "window": 256},
    ),
    "large": tuple(
        {"batch": 2**15 // s, "heads": 2048 // d, "seq": s, "head_dim": d, "causal": causal}
        for s in (1024, 8192)
        for d in (64, 128)
        for causal in (True, False)
    ),
}
