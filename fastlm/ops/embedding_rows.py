"""What embedding and embedding_layer_norm share: up to three rows summed for each token, their gradients, the checks.

A token takes a row of `weight` by its id, of `position_weight` by its position (0, 1, 2, ... along the last dimension
unless given) and of `segment_weight` by its segment (0 unless given). `Tables` are these six arguments in order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, check_same_device
from ..registry import Spec
from ..samples import Integers, Normal, Pick

__all__ = ["add_rows", "check_tables", "count_places", "padding_row", "peer_rows", "random_tables", "row_sums"]

Tables = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def wide(t: Tensor) -> Tensor:
    """float64 as it is, else float32."""
    return t if t.dtype == torch.float64 else t.float()


def count_places(ids: Tensor) -> Tensor:
    """0, 1, 2, ... along the last dimension of ids, in its shape."""
    return torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)


def lookups(tables: Tables) -> list[tuple[str, Tensor, Tensor | None]]:
    """(name of the index, index like ids, table or None) for each of the three."""
    ids, weight, positions, position_weight, segments, segment_weight = tables
    if positions is None:
        positions = ids if position_weight is None else count_places(ids)
    return [
        ("ids", ids, weight),
        ("positions", positions, position_weight),
        ("segments", torch.zeros_like(ids) if segments is None else segments, segment_weight),
    ]


def _rows(name: str, index: Tensor, table: Tensor) -> Tensor:
    """table[index] in float32; a bad index raises on a CPU and gives NaN on a GPU."""
    n = table.shape[0]
    bad = (index < 0) | (index >= n)
    if index.device.type == "cpu":
        if bad.any():
            at = int(bad.flatten().nonzero()[0])
            raise IndexError(f"{name}: got {index.flatten()[at]} at place {at}; allowed: 0 to {n - 1}")
        return wide(F.embedding(index, table))
    return wide(F.embedding(index.clamp(0, n - 1), table)).masked_fill(bad.unsqueeze(-1), float("nan"))


def add_rows(tables: Tables) -> Tensor:
    """The sum of each token's rows, (..., H) in float32."""
    first, *others = [_rows(name, index, table) for name, index, table in lookups(tables) if table is not None]
    for rows in others:
        first = first + rows
    return first


def _sum_rows(d: Tensor, index: Tensor, n: int, padding_idx: int | None) -> Tensor:
    """(n, H): the sum of the rows of d (..., H) with each index; rows with a bad index or padding count nowhere."""
    counts = (index >= 0) & (index < n)
    if padding_idx is not None:
        counts &= index != padding_idx
    index = torch.where(counts, index, n).flatten().long()
    total = d.new_zeros(n + 1, d.shape[-1])
    if d.is_cuda:  # sorts, where index_add_ would use atomics
        total.index_put_((index,), d.reshape(-1, d.shape[-1]), accumulate=True)
    else:
        total.index_add_(0, index, d.reshape(-1, d.shape[-1]))
    return total[:n]


def row_sums(
    d: Tensor, tables: Tables, padding_idx: int | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the three tables from that of each token's sum, d (..., H) in float32."""
    a, b, c = (
        None
        if table is None or not need
        else _sum_rows(d, index, table.shape[0], padding_idx if name == "ids" else None)
        for (name, index, table), need in zip(lookups(tables), needs, strict=True)
    )
    return a, b, c


def table_specs(tables: Tables) -> tuple[Spec, Spec, Spec]:
    """Specs of the gradients of the three tables."""
    dtype = torch.float64 if tables[1].dtype == torch.float64 else torch.float32
    a, b, c = (Spec(() if t is None else tuple(t.shape), dtype) for t in (tables[1], tables[3], tables[5]))
    return a, b, c


def peer_rows(tables: Tables, padding_idx: int | None) -> Tensor:
    """What a PyTorch user writes today."""
    (_, ids, weight), *others = lookups(tables)
    assert weight is not None
    y = F.embedding(ids, weight, padding_idx)
    for _, index, table in others:
        if table is not None:
            y = y + F.embedding(index, table)
    return y


def random_tables(pick: Pick) -> dict[str, Any]:
    """Few words, so that they repeat; positions and segments absent, counted or given."""
    width, words, places = pick.integer(1, 80), pick.integer(1, 20), pick.integer(1, 12)
    shape = (*(pick.integer(0, 4) for _ in range(pick.integer(0, 2))), pick.integer(0, places))
    kind = pick.one_of(torch.int64, torch.int32)
    given, segments = (pick.one_of("none", "counted", "given") for _ in range(2))
    return {
        "ids": Integers(shape, 0, words, kind), "weight": Normal((words, width)),
        "positions": Integers(shape, 0, places, kind) if given == "given" else None,
        "position_weight": Normal((places, width)) if given != "none" else None,
        "segments": Integers(shape, 0, 2, kind) if segments == "given" else None,
        "segment_weight": Normal((2, width)) if segments != "none" else None,
        "padding_idx": pick.one_of(None, 0, -1),
    }  # fmt: skip


def _check_index(name: str, index: object, like: Tensor | None) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"{name}: got {type(index).__name__}; allowed: a tensor of dtype int64 or int32")
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: got dtype {index.dtype}; allowed: torch.int64, torch.int32")
    if like is not None and index.shape != like.shape:
        raise ValueError(f"{name}: got shape {tuple(index.shape)}; allowed: ids', {tuple(like.shape)}")


def _check_table(name: str, table: Tensor, rows: str, weight: Tensor | None) -> None:
    check_floating(name, table)
    columns = "H" if weight is None else weight.shape[1]
    shape = tuple(table.shape)
    if table.dim() != 2 or table.shape[0] == 0 or (weight is not None and shape[1] != columns):
        raise ValueError(f"{name}: got shape {shape}; allowed: ({rows}, {columns}) with {rows} >= 1")
    if weight is not None and table.dtype != weight.dtype:
        raise TypeError(f"{name}: got dtype {table.dtype}; allowed: weight's, {weight.dtype}")


def check_tables(tables: Tables) -> None:
    """Types, shapes and devices of the six arguments."""
    ids, weight, positions, position_weight, segments, segment_weight = tables
    _check_index("ids", ids, None)
    _check_table("weight", weight, "V", None)
    for name, index, table, rows in (
        ("position", positions, position_weight, "P"),
        ("segment", segments, segment_weight, "G"),
    ):
        if index is not None:
            if table is None:
                raise ValueError(f"{name}s: got a tensor without {name}_weight; allowed: both, or neither")
            _check_index(f"{name}s", index, ids)
        if table is not None:
            _check_table(f"{name}_weight", table, rows, weight)
    if position_weight is not None and positions is None:
        if ids.dim() == 0:
            raise ValueError(
                "ids: got a 0-dimensional tensor; allowed: (..., S) where positions count along S"
            )
        if ids.shape[-1] > position_weight.shape[0]:
            raise ValueError(
                f"ids: got {ids.shape[-1]} in the last dimension; "
                f"allowed: at most {position_weight.shape[0]}, the rows of position_weight"
            )
    check_same_device(
        ids=ids, weight=weight, positions=positions, position_weight=position_weight, segments=segments,
        segment_weight=segment_weight,
    )  # fmt: skip


def padding_row(padding_idx: int | None, words: int) -> int | None:
    """The row that padding_idx names, a negative one counted from the end."""
    if padding_idx is None:
        return None
    if not -words <= padding_idx < words:
        raise ValueError(f"padding_idx: got {padding_idx}; allowed: {-words} to {words - 1}, or None")
    return padding_idx % words
