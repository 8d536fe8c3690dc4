"""`fastlm kernels list`: which backend has which op, and what keeps the others from serving here."""

from __future__ import annotations

import json
from typing import NamedTuple

import torch

from .. import backends, registry
from ..registry import Op
from .options import ListOptions

__all__ = ["Place", "run", "table"]


class Place(NamedTuple):
    """What a backend has of an op."""

    state: str  # "serves", "there" (but it cannot serve here) or "missing"
    why: str  # it does not serve; "" if it does


def table() -> dict[str, dict[str, Place]]:
    """{op: {backend: Place}}, for float32 tensors on the backend's own device."""
    return {name: {b: _place(op, b) for b in backends.BACKENDS} for name, op in registry.ops().items()}


def _place(op: Op, backend: str) -> Place:
    if backend != "reference" and (why := backends.missing(op.name, "forward", backend)):
        return Place("missing", why)
    on_gpu = backend == "cuda" or (backend == "triton" and not backends.interpreting())
    if on_gpu and not torch.cuda.is_available():
        return Place("there", "there is no GPU")
    why = backends.why_not(op, backend, [torch.empty(1, device="cuda" if on_gpu else "cpu")])
    return Place("there" if why else "serves", why)


def run(options: ListOptions) -> int:
    """The command. Status 0."""
    rows = table()
    if options.json:
        print(
            json.dumps({op: {b: p._asdict() for b, p in row.items()} for op, row in rows.items()}, indent=1)
        )
        return 0
    reasons: dict[str, str] = {}  # reason -> its mark
    width = max(map(len, rows))
    print(f"{'op':{width}}  " + "  ".join(f"{b:11}" for b in backends.BACKENDS) + "  gradients of")
    for name, row in rows.items():
        for place in row.values():
            if place.why and place.why not in reasons:
                reasons[place.why] = f"({len(reasons) + 1})"
        marks = [" ".join(filter(None, (place.state, reasons.get(place.why)))) for place in row.values()]
        grads = ", ".join(registry.get(name).grads) or "no"
        print(f"{name:{width}}  " + "  ".join(f"{m:11}" for m in marks) + f"  {grads}")
    for why, mark in reasons.items():
        print(f"{mark} {why}")
    return 0
