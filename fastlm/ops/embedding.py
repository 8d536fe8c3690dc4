"""Token embedding, with the position's embedding added where there is one.

    y[t] = weight[ids[t]] (+ position_weight[positions[t]]), the sum in float32, rounded once

Gradients: row v of dweight is the sum of dy[t] over the tokens t with ids[t] = v, in the order of tokens, in
float32; d position_weight likewise over positions. The order is fixed, so the bits are: on a GPU the ids are
sorted (stably, on the device) and equal ones are summed in runs, on a CPU each element of the gradient
belongs to one thread.

Saved: ids and positions; the weights only for their shapes.

An id outside 0 to V - 1 raises IndexError on a CPU. On a GPU an error would have to wait for the device, so
the row becomes NaN and contributes nothing to the gradients: nothing stays silent, and nothing is read out of
bounds. The same holds for positions.

Edge cases
 1  tokens and positions 0, 1, 2, ...       6  no tokens
 2  tokens alone, three dimensions          7  a vocabulary of one word
 3  positions given                         8  one token, one column
 4  one id in every place                   9  more than one block of tokens and columns
 5  int32 ids, odd number of columns       10  ids without dimension

Source: the lookup of every language model; sums by sorting as in NVIDIA's CUB and PyTorch's
embedding_dense_backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, check_same_device
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values

__all__ = ["embedding"]


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _places(ids: Tensor) -> Tensor:
    """0, 1, 2, ... along the last dimension of ids, in its shape."""
    return torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)


def _rows(name: str, index: Tensor, table: Tensor) -> Tensor:
    """table[index] in float32; a bad index raises on a CPU and gives NaN on a GPU."""
    n = table.shape[0]
    bad = (index < 0) | (index >= n)
    if index.device.type == "cpu":
        if bad.any():
            at = int(bad.flatten().nonzero()[0])
            raise IndexError(f"{name}: got {index.flatten()[at]} at place {at}; allowed: 0 to {n - 1}")
        return _wide(F.embedding(index, table))
    return _wide(F.embedding(index.clamp(0, n - 1), table)).masked_fill(bad.unsqueeze(-1), float("nan"))


def _sum_rows(dy: Tensor, index: Tensor, n: int) -> Tensor:
    """(n, H): the sum of the rows of dy (..., H) with each index; rows with a bad index count nowhere."""
    index = torch.where((index >= 0) & (index < n), index, n).flatten().long()
    total = dy.new_zeros(n + 1, dy.shape[-1])
    if dy.is_cuda:  # sorts, where index_add_ would use atomics
        total.index_put_((index,), dy.reshape(-1, dy.shape[-1]), accumulate=True)
    else:
        total.index_add_(0, index, dy.reshape(-1, dy.shape[-1]))
    return total[:n]


def forward(
    ids: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None
) -> tuple[Tensor]:
    """ids (...), weight (V, H) -> y (..., H)."""
    y = _rows("ids", ids, weight)
    if position_weight is not None:
        y = y + _rows("positions", _places(ids) if positions is None else positions, position_weight)
    return (y.to(weight.dtype),)


def backward(
    dy: Tensor,
    ids: Tensor,
    weight: Tensor,
    positions: Tensor | None,
    position_weight: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dy (..., H) -> dweight (V, H) and d position_weight (P, H) in float32."""
    wide, dweight, dposition = _wide(dy), None, None
    if needs[0]:
        dweight = _sum_rows(wide, ids, weight.shape[0])
    if needs[1] and position_weight is not None:
        places = _places(ids) if positions is None else positions
        dposition = _sum_rows(wide, places, position_weight.shape[0])
    return dweight, dposition


def outputs(
    ids: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None
) -> tuple[Spec]:
    """y."""
    return (Spec((*ids.shape, weight.shape[1]), weight.dtype),)


def gradients(
    dy: Tensor, ids: Tensor, weight: Tensor, positions: Any, position_weight: Tensor | None, needs: Any
) -> tuple[Spec, Spec]:
    """dweight, d position_weight."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    places = () if position_weight is None else tuple(position_weight.shape)
    return Spec(tuple(weight.shape), dtype), Spec(places, dtype)


def cost(
    ids: Tensor, weight: Tensor, positions: Tensor | None = None, position_weight: Tensor | None = None
) -> Cost:
    """A row read for each token and table, one written; backward reads dy and updates rows of the tables."""
    row = float(weight.shape[1])
    moved, tables = row * weight.element_size(), 1 if position_weight is None else 2
    n = ids.numel()
    return Cost(n * row, n * (1 + tables) * moved, n * tables * row, n * (moved + tables * row * 8))


def peer(
    ids: Tensor, weight: Tensor, positions: Tensor | None = None, position_weight: Tensor | None = None
) -> Tensor:
    """What a PyTorch user writes today."""
    y = F.embedding(ids, weight)
    if position_weight is not None:
        y = y + F.embedding(_places(ids) if positions is None else positions, position_weight)
    return y


def _ids(shape: tuple[int, ...], high: int, dtype: torch.dtype = torch.int64) -> Integers:
    return Integers(shape, 0, high, dtype)


samples = (
    Sample("1 tokens and places", ids=_ids((3, 7), 11), weight=Normal((11, 24)),
           position_weight=Normal((9, 24))),
    Sample("2 tokens, 3-D", ids=_ids((2, 3, 5), 13), weight=Normal((13, 32))),
    Sample("3 positions", ids=_ids((3, 6), 5), weight=Normal((5, 20)), positions=_ids((3, 6), 4),
           position_weight=Normal((4, 20))),
    Sample("4 one id", ids=_ids((2, 90), 1), weight=Normal((6, 33)), positions=_ids((2, 90), 1),
           position_weight=Normal((2, 33))),
    Sample("5 int32, odd columns", ids=_ids((4, 5), 8, torch.int32), weight=Normal((8, 37)),
           position_weight=Normal((5, 37))),
    Sample("6 no tokens", ids=_ids((0, 4), 8), weight=Normal((8, 16)), position_weight=Normal((5, 16))),
    Sample("7 one word", ids=_ids((2, 3), 1), weight=Normal((1, 16)), position_weight=Normal((3, 16))),
    Sample("8 one token, one column", ids=_ids((1,), 3), weight=Normal((3, 1)),
           position_weight=Normal((1, 1))),
    Sample("9 blocks", ids=_ids((40, 17), 7), weight=Normal((7, 300)), position_weight=Normal((17, 300))),
    Sample("10 scalar", ids=Values(2, torch.int64), weight=Normal((4, 8))),
)  # fmt: skip

_table = Normal((5, 4))
errors = (
    Bad("ids float", TypeError, r"ids: .*float32.*int64", ids=Normal((3,)), weight=_table),
    Bad("ids list", TypeError, r"ids: .*list", ids=[1, 2], weight=_table),
    Bad("weight integer", TypeError, r"weight: .*int64.*floating", ids=_ids((3,), 5),
        weight=Integers((5, 4), 0, 2)),
    Bad("weight 1-D", ValueError, r"weight: .*\(4,\).*\(V, H\)", ids=_ids((3,), 5), weight=Normal((4,))),
    Bad("no words", ValueError, r"weight: .*\(0, 4\).*V >= 1", ids=_ids((0,), 5), weight=Normal((0, 4))),
    Bad("id too large", IndexError, r"ids: got 5 at place 1; allowed: 0 to 4",
        ids=Values([4, 5], torch.int64), weight=_table),
    Bad("id negative", IndexError, r"ids: got -1 at place 2; .*0 to 4", ids=Values([0, 0, -1], torch.int32),
        weight=_table),
    Bad("position too large", IndexError, r"positions: got 3 at place 0; .*0 to 2",
        ids=Values([1], torch.int64), weight=_table, positions=Values([3], torch.int64),
        position_weight=Normal((3, 4))),
    Bad("too few places", ValueError, r"ids: .*7.*last dimension.*3", ids=_ids((7,), 5), weight=_table,
        position_weight=Normal((3, 4))),
    Bad("ids scalar", ValueError, r"ids: .*0-dimensional", ids=Values(1, torch.int64), weight=_table,
        position_weight=Normal((3, 4))),
    Bad("columns", ValueError, r"position_weight: .*\(3, 5\).*\(P, 4\)", ids=_ids((2,), 5), weight=_table,
        position_weight=Normal((3, 5))),
    Bad("dtypes", TypeError, r"position_weight: .*float64.*float32", ids=_ids((2,), 5), weight=_table,
        position_weight=Normal((3, 4), dtype=torch.float64)),
    Bad("positions alone", ValueError, r"positions: .*position_weight", ids=_ids((2,), 5), weight=_table,
        positions=_ids((2,), 5)),
    Bad("positions shape", ValueError, r"positions: .*\(3,\).*\(2,\)", ids=_ids((2,), 5), weight=_table,
        positions=_ids((3,), 3), position_weight=Normal((3, 4))),
)  # fmt: skip

def random(pick: Pick) -> Sample:
    """Tokens alone, with counted places or with given ones; few words, so that they repeat."""
    width, words, places = pick.integer(1, 80), pick.integer(1, 20), pick.integer(1, 12)
    shape = (*(pick.integer(0, 4) for _ in range(pick.integer(0, 2))), pick.integer(0, places))
    kind = pick.one_of(torch.int64, torch.int32)
    given = pick.one_of("none", "counted", "given")
    return Sample(
        "random", ids=_ids(shape, words, kind), weight=Normal((words, width)),
        positions=_ids(shape, places, kind) if given == "given" else None,
        position_weight=Normal((places, width)) if given != "none" else None,
    )  # fmt: skip


def case(batch: int = 8, seq: int = 1024, width: int = 768, words: int = 50304) -> Sample:
    """Tokens (batch, seq) and counted places."""
    return Sample(
        "case", ids=_ids((batch, seq), words), weight=Normal((words, width)), position_weight=Normal((seq, width))
    )


shapes = {
    "default": (
        {"batch": 2, "seq": 512, "width": 768, "words": 50304},
        {"batch": 8, "seq": 256, "width": 384, "words": 4096},
    ),
    "sweep": tuple({"batch": batch, "seq": 512, "width": 768, "words": 50304} for batch in (1, 4, 16)),
    "large": (
        {"batch": 32, "seq": 1024, "width": 768, "words": 50304},
        {"batch": 8, "seq": 4096, "width": 4096, "words": 128256},
    ),
}


op = register(
    Op(
        name="embedding",
        schema="(Tensor ids, Tensor weight, Tensor? positions, Tensor? position_weight) -> Tensor y",
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
        grads=("weight", "position_weight"),
        accumulates=("weight", "position_weight"),
        saved=("ids", "weight", "positions", "position_weight"),
    )
)


def _check_ids(name: str, ids: object) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: got {type(ids).__name__}; allowed: a tensor of dtype int64 or int32")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: got dtype {ids.dtype}; allowed: torch.int64, torch.int32")


def _check_table(name: str, weight: Tensor, rows: str) -> None:
    check_floating(name, weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{name}: got shape {tuple(weight.shape)}; allowed: ({rows}, H) with {rows} >= 1")


def embedding(
    ids: Tensor,
    weight: Tensor,
    positions: Tensor | None = None,
    position_weight: Tensor | None = None,
    *,
    tape: Any = None,
) -> Tensor:
    """weight[ids], plus position_weight[positions] where there is a position_weight.

    Args:
        ids: any shape (..., S), int64 or int32, values 0 to V - 1.
        weight: (V, H), floating-point.
        positions: of ids' shape, int64 or int32, values 0 to P - 1; None for 0, 1, 2, ... along the last
            dimension.
        position_weight: (P, H), of weight's dtype; None for no positions.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        (..., S, H), of weight's dtype; the sum of the two rows in float32, rounded once. Gradients are summed
        in float32 (float64 for float64), in a fixed order.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
        IndexError: an id or a position out of range, on a CPU. On a GPU its row of the result is NaN.
    """
    _check_ids("ids", ids)
    _check_table("weight", weight, "V")
    if position_weight is None:
        if positions is not None:
            raise ValueError("positions: got a tensor without position_weight; allowed: both, or neither")
    else:
        _check_table("position_weight", position_weight, "P")
        if position_weight.shape[1] != weight.shape[1]:
            raise ValueError(
                f"position_weight: got shape {tuple(position_weight.shape)}; allowed: (P, {weight.shape[1]})"
            )
        if position_weight.dtype != weight.dtype:
            raise TypeError(
                f"position_weight: got dtype {position_weight.dtype}; allowed: weight's, {weight.dtype}"
            )
        if positions is not None:
            _check_ids("positions", positions)
            if positions.shape != ids.shape:
                raise ValueError(
                    f"positions: got shape {tuple(positions.shape)}; allowed: ids', {tuple(ids.shape)}"
                )
        elif ids.dim() == 0:
            raise ValueError(
                "ids: got a 0-dimensional tensor; allowed: (..., S) where positions count along S"
            )
        elif ids.shape[-1] > position_weight.shape[0]:
            raise ValueError(
                f"ids: got {ids.shape[-1]} in the last dimension; "
                f"allowed: at most {position_weight.shape[0]}, the rows of position_weight"
            )
    check_same_device(ids=ids, weight=weight, positions=positions, position_weight=position_weight)
    y: Tensor = op(ids, weight, positions, position_weight, tape=tape)[0]
    return y
