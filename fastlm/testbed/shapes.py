"""Names of ops and dimensions as they are typed on the command line."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..registry import Op
from ..train.config import OptionError

__all__ = ["chosen_ops", "chosen_shapes", "dimensions", "full_dimensions", "shrunk"]


def chosen_ops(names: Sequence[str]) -> list[Op]:
    """The ops of these names, all if there are none. OptionError for an unknown one."""
    known = registry.ops()
    for name in names:
        if name not in known:
            raise OptionError("op", name, ", ".join(known))
    return [known[name] for name in names] or list(known.values())


def chosen_shapes(op: Op, text: str) -> list[dict[str, Any]]:
    """A set of shapes of the op, or one given as rows=8192,columns=4096."""
    if "=" in text:
        return [full_dimensions(op, dimensions(op, text.split(","), "shapes"))]
    if text not in op.shapes:
        sets = f"{', '.join(op.shapes)}, or dimensions such as {_example(op)}"
        raise OptionError("shapes", f"{text} for {op.name}", sets)
    return [full_dimensions(op, dims) for dims in op.shapes[text]]


def dimensions(op: Op, items: Iterable[str], option: str) -> dict[str, Any]:
    """{"rows": 8192} of ["rows=8192"], by the names and the types of the op's `case`."""
    defaults = {n: p.default for n, p in inspect.signature(op.case).parameters.items()}
    given: dict[str, Any] = {}
    for item in items:
        name, _, text = item.partition("=")
        if name not in defaults:
            raise OptionError(option, item, f"dimensions of {op.name}: {', '.join(defaults)}")
        given[name] = _value(option, item, text, defaults[name])
    try:
        op.case(**given)
    except (ValueError, ZeroDivisionError, IndexError) as error:
        raise OptionError(option, ",".join(items), f"what {op.name} takes: {error}") from error
    return given


def full_dimensions(op: Op, dims: Mapping[str, Any]) -> dict[str, Any]:
    """The dimensions with the defaults of the others that are not None."""
    parameters = inspect.signature(op.case).parameters
    full = {n: p.default for n, p in parameters.items()} | dict(dims)
    return {n: v for n, v in full.items() if v is not None}


def shrunk(
    op: Op, dims: Mapping[str, Any], dtype: torch.dtype, flops: float, elements: float
) -> dict[str, Any]:
    """The dimensions with the largest halved until forward and backward are within `flops` and all arguments within
    `elements`."""
    dims = dict(dims)
    while True:
        args = op.case(**dims).build(dtype, "meta")
        cost = op.cost(**args)
        count = sum(a.numel() for a in args.values() if isinstance(a, Tensor))
        whole = {k: v for k, v in dims.items() if isinstance(v, int) and not isinstance(v, bool) and v > 1}
        if (cost.forward_flops + cost.backward_flops <= flops and count <= elements) or not whole:
            return dims
        largest = max(whole, key=lambda name: whole[name])
        dims[largest] = whole[largest] // 2


def _value(option: str, item: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text not in ("true", "false", "True", "False"):
            raise OptionError(option, item, "true or false")
        return text in ("true", "True")
    if isinstance(default, str):
        return text
    kind = float if isinstance(default, float) else int
    try:
        value = kind(text)
    except ValueError:
        raise OptionError(option, item, "a number" if kind is float else "a whole number") from None
    if not 0 <= value < float("inf"):
        raise OptionError(option, item, "a finite number, not negative")
    return value


def _example(op: Op) -> str:
    dims = full_dimensions(op, {})
    return ",".join(f"{k}={v}" for k, v in list(dims.items())[:2])
