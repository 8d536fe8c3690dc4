"""Rotary position embedding: pairs of columns turned by angles that grow with the token's position.

    y1 = x1 * c - x2 * s        c, s = cos[p, i], sin[p, i] for pair i of a token at position p
    y2 = x2 * c + x1 * s
    halves       x1 = x[..., i],     x2 = x[..., R / 2 + i]    (GPT-NeoX, Llama)
    interleaved  x1 = x[..., 2 i],   x2 = x[..., 2 i + 1]      (GPT-J, RoFormer)

for i < R / 2, the number of columns of the tables; columns from R on are copied. The scores q . k of turned queries and
keys depend on the distance of their positions alone.

Gradients: a pair is multiplied by a rotation, whose transpose is the rotation by the negative angle:
    dx1 = dy1 * c + dy2 * s        dx2 = dy2 * c - dy1 * s        and dx = dy from R on
The tables have no gradient.

Saved: cos, sin and positions as given, neither x nor y. y lies in memory as x does, heads outside or inside of tokens.

Edge cases
 1  halves, all columns                  6  no tokens
 2  interleaved                          7  memory with heads inside of tokens
 3  partial, halves                      8  one pair, rows of any order and repeated
 4  partial, interleaved, positions      9  several blocks of tokens and heads
 5  positions of every sequence         10  two and three dimensions

Source: Su et al., "RoFormer: enhanced transformer with rotary position embedding" (2021), arXiv:2104.09864,
equation 34.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_floating, check_same_device
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values

__all__ = ["rotary_embedding"]

_HEADS_INSIDE = (0, 2, 1, 3)


def _heads_inside(t: Tensor) -> bool:
    """Whether the heads of a token lie side by side."""
    return t.stride(1) < t.stride(2)


def _rows(table: Tensor, positions: Tensor | None, seq: int) -> Tensor:
    """Each token's row, (1 or batch, 1, seq, R / 2); a bad position raises on a CPU and gives NaN elsewhere."""
    if positions is None:
        return table[:seq][None, None]
    bad = (positions < 0) | (positions >= table.shape[0])
    if positions.device.type == "cpu" and bad.any():
        raise IndexError(f"positions: got {int(positions[bad][0])}; allowed: 0 to {table.shape[0] - 1}")
    rows = table[positions.clamp(0, table.shape[0] - 1)]
    return rows.masked_fill(bad.unsqueeze(-1), float("nan")).unsqueeze(1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, sign: float) -> Tensor:
    wide, half = x if x.dtype == torch.float64 else x.float(), cos.shape[1]
    c, s = (_rows(table, positions, x.shape[2]).to(wide.dtype) for table in (cos, sin))
    turned, rest = wide[..., : 2 * half], wide[..., 2 * half :]
    x1, x2 = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    y1, y2 = x1 * c - x2 * s * sign, x2 * c + x1 * s * sign
    y = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)
    y = torch.cat((y, rest), -1).to(x.dtype)
    return y.transpose(1, 2).contiguous().transpose(1, 2) if _heads_inside(x) else y


def forward(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> tuple[Tensor]:
    """x (batch, heads, seq, dim), tables (P, R / 2), positions (batch, seq) -> y like x."""
    return (_turn(x, cos, sin, positions, interleaved, 1.0),)


def backward(
    dy: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, needs: tuple[bool]
) -> tuple[Tensor | None]:
    """dy -> dx like it."""
    return (_turn(dy, cos, sin, positions, interleaved, -1.0) if needs[0] else None,)


def _like(t: Tensor) -> Spec:
    return Spec(tuple(t.shape), t.dtype, _HEADS_INSIDE if _heads_inside(t) else None)


def outputs(x: Tensor, *rest: Any) -> tuple[Spec]:
    """y."""
    return (_like(x),)


def gradients(dy: Tensor, *rest: Any) -> tuple[Spec]:
    """dx."""
    return (_like(dy),)


def cost(x: Tensor, *args: Any, **options: Any) -> Cost:
    """Reads x, writes y, and the same back; three operations an element."""
    return Cost(3.0 * x.numel(), 2.0 * x.nbytes, 3.0 * x.numel(), 2.0 * x.nbytes)


def peer(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False, seq_dim: int = -2
) -> Tensor:
    """What models write today: x * cos + rotated(x) * sin, with every table entry twice."""
    tokens = x.shape[seq_dim]
    c, s = (t[:tokens] if positions is None else t[positions] for t in (cos.to(x.dtype), sin.to(x.dtype)))
    if interleaved:
        c, s = c.repeat_interleave(2, -1), s.repeat_interleave(2, -1)
    else:
        c, s = torch.cat((c, c), -1), torch.cat((s, s), -1)
    if x.dim() > 2:
        heads = -3 if seq_dim == -2 else -2
        c, s = c.unsqueeze(heads), s.unsqueeze(heads)
    turned, rest = x[..., : c.shape[-1]], x[..., c.shape[-1] :]
    if interleaved:
        other = torch.stack((-turned[..., 1::2], turned[..., 0::2]), -1).flatten(-2)
    else:
        x1, x2 = turned.chunk(2, -1)
        other = torch.cat((-x2, x1), -1)
    return torch.cat((turned * c + other * s, rest), -1)


_f32 = torch.float32


def _sample(edge: str, shape: tuple[int, ...], rotary: int, rows: int, **more: Any) -> Sample:
    """Tables of any numbers: the formula does not ask that they be cosines and sines."""
    tables = {name: Normal((rows, rotary // 2), dtype=_f32) for name in ("cos", "sin")}
    return Sample(edge, x=Normal(shape), **tables, **more)


samples = (
    _sample("1 halves", (2, 3, 5, 12), 12, 7),
    _sample("2 interleaved", (2, 3, 5, 12), 12, 5, interleaved=True),
    _sample("3 partial", (1, 2, 4, 37), 10, 4),
    _sample("4 partial, interleaved", (2, 2, 4, 21), 6, 9, interleaved=True, positions=Integers((4,), 0, 9)),
    _sample("5 positions", (3, 2, 4, 16), 16, 30, positions=Integers((3, 4), 0, 30)),
    _sample("6 no tokens", (2, 3, 0, 8), 8, 4),
    _sample("7 heads inside", (2, 5, 3, 64), 64, 6, seq_dim=-3, positions=Integers((2, 5), 0, 6)),
    _sample("8 one pair", (1, 1, 6, 2), 2, 6, positions=Values([5, 0, 0, 3, 2, 5], torch.int64)),
    _sample("9 blocks", (1, 9, 70, 40), 32, 70, interleaved=True),
    _sample("10 three dimensions", (3, 6, 16), 8, 6),
    _sample("10 two dimensions", (6, 16), 16, 6, positions=Integers((6,), 0, 6)),
)

_x = Normal((2, 3, 4, 8))
_good = {"cos": Normal((4, 4)), "sin": Normal((4, 4))}
errors = (
    Bad("x integer", TypeError, r"x: .*int64.*floating", x=Values([[1, 2]], torch.int64), **_good),
    Bad("x vector", ValueError, r"x: .*\(8,\).*2 to 4", x=Normal((8,)), **_good),
    Bad("tables", ValueError, r"sin: .*\(4, 3\).*\(4, 4\)", x=_x, cos=Normal((4, 4)), sin=Normal((4, 3))),
    Bad("wide", ValueError, r"cos: .*\(4, 5\).*8", x=_x, cos=Normal((4, 5)), sin=Normal((4, 5))),
    Bad("few rows", ValueError, r"cos: .*3 rows.*4 tokens", x=_x, cos=Normal((3, 4)), sin=Normal((3, 4))),
    Bad("positions dtype", TypeError, r"positions: .*float32.*int64", x=_x, positions=Normal((4,)), **_good),
    Bad("positions shape", ValueError, r"positions: .*\(3,\).*\(4,\).*\(2, 4\)", x=_x,
        positions=Integers((3,), 0, 4), **_good),
    Bad("position beyond", IndexError, r"positions: .*4.*0 to 3", x=_x, positions=Values([0, 1, 4, 2], torch.int64),
        **_good),
    Bad("position negative", IndexError, r"positions: .*-1.*0 to 3", x=_x,
        positions=Values([0, -1, 2, 2], torch.int64), **_good),
    Bad("seq_dim", ValueError, r"seq_dim: .*1.*-2.*-3", x=_x, seq_dim=1, **_good),
)  # fmt: skip


def random(pick: Pick) -> Sample:
    """Both layouts of pairs and of memory, any part of the columns, positions of every kind."""
    batch, heads, seq, dim = (pick.integer(1, 3), pick.integer(1, 5), pick.integer(0, 40), pick.integer(2, 70))
    rows = max(seq, 1) + pick.integer(0, 5)
    inside = pick.one_of(False, True)
    positions = pick.one_of(None, Integers((seq,), 0, rows), Integers((batch, seq), 0, rows))
    return _sample(
        "random", (batch, seq, heads, dim) if inside else (batch, heads, seq, dim), 2 * pick.integer(1, dim // 2), rows,
        positions=positions, interleaved=pick.one_of(False, True), seq_dim=-3 if inside else -2,
    )  # fmt: skip


def case(
    batch: int = 4, heads: int = 16, seq: int = 1024, head_dim: int = 64, rotary_dim: int | None = None,
    interleaved: bool = False, heads_inside: bool = False,
) -> Sample:  # fmt: skip
    """Queries of (batch, heads, seq, head_dim), or with heads inside of tokens, as a projection leaves them."""
    shape = (batch, seq, heads, head_dim) if heads_inside else (batch, heads, seq, head_dim)
    rotary = head_dim if rotary_dim is None else rotary_dim
    return _sample("case", shape, rotary, seq, interleaved=interleaved, seq_dim=-3 if heads_inside else -2)


shapes = {
    "default": (
        {"batch": 4, "heads": 16, "seq": 1024, "head_dim": 64},
        {"batch": 2, "heads": 16, "seq": 1024, "head_dim": 128, "heads_inside": True},
        {"batch": 4, "heads": 16, "seq": 1024, "head_dim": 64, "interleaved": True},
    ),
    "sweep": tuple({"batch": 1, "heads": 32, "seq": seq, "head_dim": 128} for seq in (64, 512, 4096, 16384)),
    "large": ({"batch": 8, "heads": 32, "seq": 4096, "head_dim": 128},),
}


op = register(
    Op(
        name="rotary_embedding",
        schema="(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved) -> Tensor y",
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
        grads=("x",),
        saved=("cos", "sin", "positions"),
        contiguous=False,
    )
)


def rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False,
    seq_dim: int = -2, tape: Any = None,
) -> Tensor:  # fmt: skip
    """x with pairs of its first R columns turned by the angles of each token's position.

    Args:
        x: (batch, heads, seq, dim) with any strides, floating-point; (heads, seq, dim) or (seq, dim) too.
        cos, sin: (P, R / 2), a row a position, R <= dim: `fastlm.nn.RotaryEmbedding` makes them. Arithmetic is in
            float32 (float64 for float64) whatever their dtype; keep them in float32.
        positions: int64 (seq,) or (batch, seq), the row of each token; None for 0, 1, ..., seq - 1.
        interleaved: pairs are columns 2 i and 2 i + 1 (GPT-J) instead of i and R / 2 + i (GPT-NeoX, Llama).
        seq_dim: -2 as above; -3 for x (batch, seq, heads, dim).
        tape: the engine's, for a forward pass without autograd.

    Returns:
        y, of x's shape and dtype, in memory as x: never x itself. The tables get no gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
        IndexError: a position out of range, on a CPU. On a GPU its row of the result is NaN.

    Source: Su et al. (2021), arXiv:2104.09864.
    """
    check_floating("x", x)
    if not 2 <= x.dim() <= 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}; allowed: 2 to 4 dimensions, (batch, heads, seq, dim)")
    if seq_dim not in (-2, -3) or (seq_dim == -3 and x.dim() < 3):
        raise ValueError(f"seq_dim: got {seq_dim}; allowed: -2, or -3 for x (batch, seq, heads, dim)")
    check_floating("cos", cos)
    check_floating("sin", sin)
    if cos.dim() != 2 or not 1 <= cos.shape[1] <= x.shape[-1] // 2:
        raise ValueError(f"cos: got shape {tuple(cos.shape)}; allowed: (P, R / 2) with R from 2 to {x.shape[-1]}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin: got shape {tuple(sin.shape)}; allowed: cos's, {tuple(cos.shape)}")
    four = x.expand((1,) * (4 - x.dim()) + x.shape)
    four = four.transpose(1, 2) if seq_dim == -3 else four
    batch, _, seq, _ = four.shape
    if positions is None:
        if cos.shape[0] < seq:
            raise ValueError(f"cos: got {cos.shape[0]} rows for {seq} tokens; allowed: a row a token, or positions")
    else:
        if positions.dtype != torch.int64:
            raise TypeError(f"positions: got dtype {positions.dtype}; allowed: torch.int64")
        if positions.shape not in ((seq,), (batch, seq)):
            raise ValueError(f"positions: got shape {tuple(positions.shape)}; allowed: {(seq,)} or {(batch, seq)}")
        positions = positions.expand(batch, seq)
    check_same_device(x=x, cos=cos, sin=sin, positions=positions)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y: Tensor = op(four, cos.detach().to(wide), sin.detach().to(wide), positions, interleaved, tape=tape)[0]
    return (y.transpose(1, 2) if seq_dim == -3 else y).reshape(x.shape)
