"""The input of BERT in one pass: the sum of token, position and segment embeddings, its layer norm, and dropout.

    x = weight[ids] + position_weight[positions] + segment_weight[segments]      fastlm/ops/embedding.py
    y = dropout(layer_norm(x) * norm_weight + norm_bias)                         layer_norm.py, dropout.py

x is held in float32 and never stored.

Gradients, with g = dy / (1 - p) where kept and 0 where dropped, xhat = (x - mean) * rstd:
    dx = dLN(g), layer_norm's, rounded to weight's dtype as autograd rounds it
    d norm_weight = sum over tokens of g * xhat        d norm_bias = sum over tokens of g
    and each table's row gets the sum of dx over the tokens that took it, as in embedding.py; padding_idx nothing

Saved: ids, positions, segments, the tables and norm_weight as given; mean and rstd in float32, one a token; the
seed. Backward gathers x again, which moves what reading a stored x would.

Edge cases
 1  BERT: positions, segments, both parameters, dropout     6  H = 1
 2  tokens alone, no parameters, no dropout                 7  one token
 3  H no multiple of 4, positions given                     8  H wider than one block
 4  everything dropped                                      9  float32 parameters with bfloat16 tables
 5  no tokens                                              10  one id in every place, a segment for all

Source: Devlin et al., "BERT" (2018), arXiv:1810.04805, section 3; the order of norm and dropout as in its code
and in BertEmbeddings of Hugging Face transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_floating, check_same_device
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values
from .dropout import forward as drop
from .dropout import peer as dropout_peer
from .embedding_rows import (
    add_rows,
    check_tables,
    padding_row,
    peer_rows,
    random_tables,
    row_sums,
    table_specs,
    wide,
)
from .layer_norm import backward as norm_backward
from .layer_norm import forward as norm_forward
from .layer_norm import peer as norm_peer

__all__ = ["embedding_layer_norm"]


def forward(
    ids: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None,
    segments: Tensor | None, segment_weight: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    seed: Tensor | None, padding_idx: int | None, eps: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """ids (...), weight (V, H) -> y (..., H), mean and rstd (...)."""
    x = add_rows((ids, weight, positions, position_weight, segments, segment_weight))
    y, mean, rstd = norm_forward(x, norm_weight, norm_bias, eps)
    if seed is not None:
        (y,) = drop(y, seed, dropout_p)
    return y.to(weight.dtype), mean, rstd


def backward(
    dy: Tensor, ids: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None,
    segments: Tensor | None, segment_weight: Tensor | None, norm_weight: Tensor | None, seed: Tensor | None,
    mean: Tensor, rstd: Tensor, padding_idx: int | None, eps: float, dropout_p: float, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dy (..., H) -> the gradients of the three tables, of norm_weight and of norm_bias (H), all in float32."""
    tables = (ids, weight, positions, position_weight, segments, segment_weight)
    g = wide(dy) if seed is None else drop(wide(dy), seed, dropout_p)[0]
    want = (any(needs[:3]), needs[3], needs[4])
    dx, d_norm_weight, d_norm_bias = norm_backward(g, add_rows(tables), norm_weight, mean, rstd, eps, want)
    sums = (None, None, None) if dx is None else row_sums(wide(dx.to(dy.dtype)), tables, padding_idx, needs[:3])
    return *sums, d_norm_weight, d_norm_bias


def outputs(ids: Tensor, weight: Tensor, *rest: Any) -> tuple[Spec, ...]:
    """y; mean, rstd."""
    shape, dtype = tuple(ids.shape), torch.float64 if weight.dtype == torch.float64 else torch.float32
    return Spec((*shape, weight.shape[1]), weight.dtype), Spec(shape, dtype), Spec(shape, dtype)


def gradients(
    dy: Tensor, ids: Tensor, weight: Tensor, positions: Any, position_weight: Any, segments: Any,
    segment_weight: Any, norm_weight: Any, seed: Any, mean: Tensor, *rest: Any,
) -> tuple[Spec, ...]:  # fmt: skip
    """The three tables', d norm_weight, d norm_bias."""
    tables = table_specs((ids, weight, positions, position_weight, segments, segment_weight))
    return *tables, Spec((weight.shape[1],), mean.dtype), Spec((weight.shape[1],), mean.dtype)


def cost(
    ids: Tensor, weight: Tensor, positions: Tensor | None = None, position_weight: Tensor | None = None, *,
    segments: Tensor | None = None, segment_weight: Tensor | None = None, **options: Any,
) -> Cost:  # fmt: skip
    """A row read for each token and table, one written; backward gathers again, reads dy, and adds dx to rows."""
    row = float(weight.shape[1])
    moved, n = row * weight.element_size(), ids.numel()
    tables = sum(t is not None for t in (weight, position_weight, segment_weight))
    backward_bytes = n * ((1 + tables) * moved + tables * row * 8)
    return Cost(n * row * (8 + tables), n * (1 + tables) * moved, n * row * (14 + 2 * tables), backward_bytes)


def peer(
    ids: Tensor, weight: Tensor, positions: Tensor | None = None, position_weight: Tensor | None = None, *,
    segments: Tensor | None = None, segment_weight: Tensor | None = None, norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, eps: float = 1e-12, dropout_p: float = 0.0, seed: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:  # fmt: skip
    """What a PyTorch user writes today, with our mask."""
    x = peer_rows((ids, weight, positions, position_weight, segments, segment_weight), padding_idx)
    y = norm_peer(x, norm_weight, norm_bias, eps)
    return y if seed is None or dropout_p == 0.0 else dropout_peer(y, dropout_p, seed)


def terms(upstream: list[Tensor], ids: Tensor, weight: Tensor, *args: Any, **more: Any) -> dict[str, float]:
    """dx is a difference of three terms, of which a row sums as many as it has tokens."""
    given = dict(zip(("positions", "position_weight"), args, strict=False)) | more
    names = ("positions", "position_weight", "segments", "segment_weight")
    tables = (ids, weight, *(given.get(name) for name in names))
    norm_weight, eps = given.get("norm_weight"), given.get("eps", 1e-12)
    x = add_rows(tables)  # type: ignore[arg-type]
    _, mean, rstd = norm_forward(x, None, None, eps)
    xhat = ((x - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).abs()
    g = upstream[0].abs() / max(1.0 - given.get("dropout_p", 0.0), 1e-3)
    if norm_weight is not None:
        g = g * norm_weight.abs()
    total = (g + g.mean(-1, keepdim=True) + xhat * (g * xhat).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    sums = row_sums(total, tables, None, (True, True, True))  # type: ignore[arg-type]
    wanted = ("weight", "position_weight", "segment_weight")
    return {n: s.max().item() for n, s in zip(wanted, sums, strict=True) if s is not None and s.numel()}


def _ids(shape: tuple[int, ...], high: int, dtype: torch.dtype = torch.int64) -> Integers:
    return Integers(shape, 0, high, dtype)


_f32 = torch.float32
_key = Values([0x1234_5678_9ABC_DEF0], torch.int64)


def _norm(h: int, dtype: torch.dtype | None = None) -> dict[str, Normal]:
    return {"norm_weight": Normal((h,), dtype=dtype), "norm_bias": Normal((h,), dtype=dtype)}


samples = (
    Sample("1 BERT", ids=_ids((3, 7), 11), weight=Normal((11, 24)), position_weight=Normal((9, 24)),
           segments=_ids((3, 7), 2), segment_weight=Normal((2, 24)), **_norm(24), dropout_p=0.1, seed=_key),
    Sample("2 tokens", ids=_ids((2, 3, 5), 13), weight=Normal((13, 32)), eps=1e-5),
    Sample("3 odd H, positions", ids=_ids((4, 5), 8, torch.int32), weight=Normal((8, 37)),
           positions=_ids((4, 5), 6, torch.int32), position_weight=Normal((6, 37)), **_norm(37), dropout_p=0.5,
           seed=Values(-2, torch.int64)),
    Sample("4 all dropped", ids=_ids((2, 3), 4), weight=Normal((4, 8)), **_norm(8), dropout_p=1.0, seed=_key),
    Sample("5 no tokens", ids=_ids((0, 4), 8), weight=Normal((8, 16)), position_weight=Normal((5, 16)),
           segment_weight=Normal((2, 16)), **_norm(16), dropout_p=0.1, seed=_key),
    Sample("6 H = 1", ids=_ids((5,), 3), weight=Normal((3, 1)), **_norm(1), eps=1e-5),
    Sample("7 one token", ids=Values([2], torch.int64), weight=Normal((4, 40)), position_weight=Normal((1, 40)),
           norm_weight=Normal((40,)), dropout_p=0.3, seed=_key),
    Sample("8 wide", ids=_ids((5,), 3), weight=Normal((3, 9001)), segment_weight=Normal((2, 9001)), **_norm(9001),
           dropout_p=0.2, seed=_key),
    Sample("9 float32 parameters", ids=_ids((3, 6), 5), weight=Normal((5, 48)), position_weight=Normal((6, 48)),
           **_norm(48, _f32)),
    Sample("10 one id", ids=_ids((2, 20), 1), weight=Normal((6, 33)), segment_weight=Normal((2, 33)), **_norm(33),
           dropout_p=0.1, seed=_key),
)  # fmt: skip

_two = {"ids": _ids((2,), 5), "weight": Normal((5, 4))}
errors = (
    Bad("ids float", TypeError, r"ids: .*float32.*int64", **_two | {"ids": Normal((3,))}),
    Bad("id too large", IndexError, r"ids: got 5 at place 1; allowed: 0 to 4",
        **_two | {"ids": Values([4, 5], torch.int64)}),
    Bad("segments alone", ValueError, r"segments: .*segment_weight", **_two, segments=_ids((2,), 2)),
    Bad("norm_weight shape", ValueError, r"norm_weight: .*\(3,\).*\(4,\)", **_two, norm_weight=Normal((3,))),
    Bad("norm_bias dtype", TypeError, r"norm_bias: .*float64", **_two, norm_bias=Normal((4,), dtype=torch.float64)),
    Bad("eps", ValueError, r"eps: .*-1", **_two, eps=-1.0),
    Bad("dropout_p", ValueError, r"dropout_p: .*1\.5.*0 to 1", **_two, dropout_p=1.5),
    Bad("seed", TypeError, r"seed: .*float32.*int64", **_two, dropout_p=0.5, seed=Values([1.0])),
    Bad("seeds", ValueError, r"seed: .*\(2,\).*one element", **_two, dropout_p=0.5,
        seed=Values([1, 2], torch.int64)),
    Bad("padding", ValueError, r"padding_idx: got -6; allowed: -5 to 4", **_two, padding_idx=-6),
)  # fmt: skip

def random(pick: Pick) -> Sample:
    """Any of the tables absent, counted or given; parameters of either dtype; any probability."""
    tables = random_tables(pick)
    parameter = Normal((tables["weight"].shape[1],), dtype=pick.one_of(None, _f32))
    return Sample(
        "random", **tables, norm_weight=pick.one_of(None, parameter), norm_bias=pick.one_of(None, parameter),
        eps=pick.one_of(1e-5, 1e-3), dropout_p=pick.one_of(0.0, 0.1, 0.5, 1.0),
        seed=Integers((1,), -(2**63), 2**63 - 1),
    )  # fmt: skip


def case(batch: int = 8, seq: int = 512, width: int = 768, words: int = 30522) -> Sample:
    """Tokens (batch, seq), counted places, two segments, float32 parameters, a tenth dropped."""
    parameter = Normal((width,), dtype=_f32)
    return Sample(
        "case", ids=_ids((batch, seq), words), weight=Normal((words, width)), position_weight=Normal((seq, width)),
        segments=_ids((batch, seq), 2), segment_weight=Normal((2, width)), norm_weight=parameter,
        norm_bias=parameter, dropout_p=0.1, seed=_key,
    )  # fmt: skip


shapes = {
    "default": (
        {"batch": 2, "seq": 512, "width": 768, "words": 30522},
        {"batch": 8, "seq": 256, "width": 384, "words": 4096},
    ),
    "sweep": tuple({"batch": batch, "seq": 512, "width": 768, "words": 30522} for batch in (1, 4, 16)),
    "large": ({"batch": 64, "seq": 512, "width": 1024, "words": 50304},),
}


op = register(
    Op(
        name="embedding_layer_norm",
        schema="(Tensor ids, Tensor weight, Tensor? positions, Tensor? position_weight, Tensor? segments, "
        "Tensor? segment_weight, Tensor? norm_weight, Tensor? norm_bias, Tensor? seed, int? padding_idx, float eps, "
        "float dropout_p) -> (Tensor y, Tensor mean, Tensor rstd)",
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
        grads=("weight", "position_weight", "segment_weight", "norm_weight", "norm_bias"),
        accumulates=("weight", "position_weight", "segment_weight", "norm_weight", "norm_bias"),
        own_dtype=("weight", "position_weight", "segment_weight"),
        saved=("ids", "weight", "positions", "position_weight", "segments", "segment_weight", "norm_weight", "seed",
               "mean", "rstd"),
    )
)  # fmt: skip


def _check_parameter(name: str, v: Tensor | None, weight: Tensor) -> None:
    if v is None:
        return
    check_floating(name, v)
    if v.shape != weight.shape[1:]:
        raise ValueError(f"{name}: got shape {tuple(v.shape)}; allowed: {tuple(weight.shape[1:])}, weight's columns")
    if v.dtype not in (weight.dtype, torch.float32) or (weight.dtype == torch.float64 and v.dtype != weight.dtype):
        allowed = f"{weight.dtype}" + ("" if weight.dtype == torch.float64 else " or torch.float32")
        raise TypeError(f"{name}: got dtype {v.dtype}; allowed: {allowed}")


def _check_dropout(p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The seed to use: given, drawn, or None without dropout."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p: got {p}; allowed: 0 to 1")
    if p == 0.0:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        given = f"dtype {seed.dtype}" if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"seed: got {given}; allowed: an int64 tensor, or None")
    if seed.numel() != 1:
        raise ValueError(f"seed: got shape {tuple(seed.shape)}; allowed: one element")
    return seed


def embedding_layer_norm(
    ids: Tensor, weight: Tensor, positions: Tensor | None = None, position_weight: Tensor | None = None, *,
    segments: Tensor | None = None, segment_weight: Tensor | None = None, norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, eps: float = 1e-12, dropout_p: float = 0.0, seed: Tensor | None = None,
    padding_idx: int | None = None, tape: Any = None,
) -> Tensor:  # fmt: skip
    """dropout(layer_norm(embedding(ids, weight, positions, position_weight, ...))): the input of BERT.

    Args:
        ids, weight, positions, position_weight, segments, segment_weight, padding_idx: as in `embedding`.
        norm_weight, norm_bias: (H,), of weight's dtype or float32; None for 1 and 0.
        eps: added to the variance.
        dropout_p: 0 to 1, the probability of a zero.
        seed: int64, one element, on ids' device, as in `dropout`; None draws one if dropout_p > 0.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        (..., S, H), of weight's dtype. All gradients are summed in float32 (float64 for float64), in a fixed order.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
        IndexError: an id, a position or a segment out of range, on a CPU. On a GPU its row of the result is NaN.

    Source: Devlin et al. (2018), arXiv:1810.04805.
    """
    tables = (ids, weight, positions, position_weight, segments, segment_weight)
    check_tables(tables)
    if weight.shape[1] == 0:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}; allowed: (V, H) with H >= 1")
    _check_parameter("norm_weight", norm_weight, weight)
    _check_parameter("norm_bias", norm_bias, weight)
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}; allowed: >= 0")
    seed = _check_dropout(dropout_p, seed, ids.device)
    check_same_device(ids=ids, norm_weight=norm_weight, norm_bias=norm_bias, seed=seed)
    options = (padding_row(padding_idx, weight.shape[0]), float(eps), float(dropout_p))
    y: Tensor = op(*tables, norm_weight, norm_bias, seed, *options, tape=tape)[0]
    return y
