"""Token embedding, with the embeddings of the position and of the segment added where there are any.

    y[t] = weight[ids[t]] (+ position_weight[positions[t]]) (+ segment_weight[segments[t]])

summed in float32 in that order, rounded once.

Gradients: row v of dweight is the sum of dy[t] over the tokens t with ids[t] = v, in the order of tokens, in
float32; row padding_idx gets nothing. The other tables likewise over positions and segments. The order is
fixed, so the bits are: the ids are sorted (stably, on the device) and equal ones are summed in runs.

Saved: ids, positions and segments; the weights only for their shapes.

An id outside 0 to V - 1 raises IndexError on a CPU. On a GPU an error would have to wait for the device, so
the row becomes NaN and contributes nothing to the gradients: nothing stays silent, and nothing is read out of
bounds. The same holds for positions and segments.

Edge cases
 1  tokens and positions 0, 1, 2, ...       7  a vocabulary of one word
 2  tokens alone, three dimensions          8  one token, one column
 3  positions given                         9  more than one block of tokens and columns
 4  one id in every place                  10  ids without dimension
 5  int32 ids, odd number of columns       11  segments
 6  no tokens                              12  segment 0 everywhere

A padding index is drawn at random instead: where the row is looked up, its gradient of 0 is a convention and no
derivative.

Source: the lookup of every language model; segments and padding as in Devlin et al., "BERT" (2018),
arXiv:1810.04805, section 3; sums by sorting as in NVIDIA's CUB and PyTorch's embedding_dense_backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values
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

__all__ = ["embedding"]


def forward(
    ids: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None,
    segments: Tensor | None, segment_weight: Tensor | None, padding_idx: int | None,
) -> tuple[Tensor]:  # fmt: skip
    """ids (...), weight (V, H) -> y (..., H)."""
    return (add_rows((ids, weight, positions, position_weight, segments, segment_weight)).to(weight.dtype),)


def backward(
    dy: Tensor, ids: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None,
    segments: Tensor | None, segment_weight: Tensor | None, padding_idx: int | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dy (..., H) -> dweight (V, H), d position_weight (P, H), d segment_weight (G, H) in float32."""
    tables = (ids, weight, positions, position_weight, segments, segment_weight)
    return row_sums(wide(dy), tables, padding_idx, needs)


def outputs(ids: Tensor, weight: Tensor, *rest: Any) -> tuple[Spec]:
    """y."""
    return (Spec((*ids.shape, weight.shape[1]), weight.dtype),)


def gradients(
    dy: Tensor, ids: Tensor, weight: Tensor, positions: Any, position_weight: Any, segments: Any,
    segment_weight: Any, padding_idx: Any, needs: Any,
) -> tuple[Spec, Spec, Spec]:  # fmt: skip
    """dweight, d position_weight, d segment_weight."""
    return table_specs((ids, weight, positions, position_weight, segments, segment_weight))


def cost(
    ids: Tensor, weight: Tensor, positions: Tensor | None = None, position_weight: Tensor | None = None, *,
    segments: Tensor | None = None, segment_weight: Tensor | None = None, padding_idx: int | None = None,
) -> Cost:  # fmt: skip
    """A row read for each token and table, one written; backward reads dy and updates rows of the tables."""
    row = float(weight.shape[1])
    moved = row * weight.element_size()
    tables, n = sum(t is not None for t in (weight, position_weight, segment_weight)), ids.numel()
    return Cost(n * row, n * (1 + tables) * moved, n * tables * row, n * (moved + tables * row * 8))


def peer(
    ids: Tensor, weight: Tensor, positions: Tensor | None = None, position_weight: Tensor | None = None, *,
    segments: Tensor | None = None, segment_weight: Tensor | None = None, padding_idx: int | None = None,
) -> Tensor:  # fmt: skip
    """What a PyTorch user writes today."""
    return peer_rows((ids, weight, positions, position_weight, segments, segment_weight), padding_idx)


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
    Sample("11 segments", ids=_ids((3, 9), 5), weight=Normal((5, 40)), position_weight=Normal((9, 40)),
           segments=_ids((3, 9), 2), segment_weight=Normal((2, 40))),
    Sample("12 one segment", ids=_ids((2, 20), 4), weight=Normal((4, 12)),
           segment_weight=Normal((3, 12))),
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
    Bad("segments alone", ValueError, r"segments: .*segment_weight", ids=_ids((2,), 5), weight=_table,
        segments=_ids((2,), 2)),
    Bad("segment too large", IndexError, r"segments: got 2 at place 0; .*0 to 1",
        ids=Values([1], torch.int64), weight=_table, segments=Values([2], torch.int64),
        segment_weight=Normal((2, 4))),
    Bad("segment columns", ValueError, r"segment_weight: .*\(2, 5\).*\(G, 4\)", ids=_ids((2,), 5), weight=_table,
        segment_weight=Normal((2, 5))),
    Bad("padding too large", ValueError, r"padding_idx: got 5; allowed: -5 to 4", ids=_ids((2,), 5),
        weight=_table, padding_idx=5),
)  # fmt: skip

def random(pick: Pick) -> Sample:
    """Any of the tables absent, counted or given; few words, so that they repeat."""
    return Sample("random", **random_tables(pick))


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
        schema="(Tensor ids, Tensor weight, Tensor? positions, Tensor? position_weight, Tensor? segments, "
        "Tensor? segment_weight, int? padding_idx) -> Tensor y",
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
        grads=("weight", "position_weight", "segment_weight"),
        accumulates=("weight", "position_weight", "segment_weight"),
        own_dtype=("weight", "position_weight", "segment_weight"),
        saved=("ids", "weight", "positions", "position_weight", "segments", "segment_weight"),
    )
)


def embedding(
    ids: Tensor, weight: Tensor, positions: Tensor | None = None, position_weight: Tensor | None = None, *,
    segments: Tensor | None = None, segment_weight: Tensor | None = None, padding_idx: int | None = None,
    tape: Any = None,
) -> Tensor:  # fmt: skip
    """weight[ids], plus position_weight[positions] and segment_weight[segments] where there are such tables.

    Args:
        ids: any shape (..., S), int64 or int32, values 0 to V - 1.
        weight: (V, H), floating-point.
        positions: of ids' shape, int64 or int32, values 0 to P - 1; None for 0, 1, 2, ... along the last
            dimension.
        position_weight: (P, H), of weight's dtype; None for no positions.
        segments: of ids' shape, int64 or int32, values 0 to G - 1; None for 0 everywhere.
        segment_weight: (G, H), of weight's dtype; None for no segments.
        padding_idx: -V to V - 1: this row of weight is looked up as any other and gets no gradient.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        (..., S, H), of weight's dtype; the sum of the rows in float32, rounded once. Gradients are summed in
        float32 (float64 for float64), in a fixed order.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
        IndexError: an id, a position or a segment out of range, on a CPU. On a GPU its row of the result is NaN.
    """
    tables = (ids, weight, positions, position_weight, segments, segment_weight)
    check_tables(tables)
    y: Tensor = op(*tables, padding_row(padding_idx, weight.shape[0]), tape=tape)[0]
    return y
