"""What a Triton launcher would start for a call: kernels, grids and tiles, and the memory it would ask for.

The launchers run on tensors without memory (device "meta") with a launch that only takes notes: nothing is compiled and
no GPU is needed. What they ask about the GPU is answered for the chip given.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..registry import Op
from .contender import schema_arguments

__all__ = ["Call", "Launch", "Notes", "meta_call", "record"]


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be started."""

    kernel: str
    grid: tuple[int, ...]
    warps: int | None  # None: Triton's default
    stages: int | None
    constants: Mapping[str, Any]  # compile-time arguments by name


@dataclass
class Notes:
    """Of one direction: the launches in order, and the most bytes that the launcher's own tensors take at once."""

    launches: list[Launch] = field(default_factory=list)
    workspace: int = 0


@dataclass(frozen=True)
class Call:
    """A call on tensors without memory: the schema's arguments, results, and the arguments and results of backward."""

    arguments: tuple[Any, ...]
    results: tuple[Tensor, ...]
    backward: tuple[Any, ...] = ()
    gradients: tuple[Tensor | None, ...] = ()


def meta_call(op: Op, args: Mapping[str, Any]) -> Call:
    """The call ``op.function(**args)`` and its backward, with every gradient wanted."""
    given = schema_arguments(op, args)
    device = next(a.device for a in given if isinstance(a, Tensor))
    results = tuple(spec.empty(device) for spec in op.outputs(*given))
    if op.gradients is None:
        return Call(given, results)
    saved, options = op.pick_saved(given, results)
    needs = op.wanted(given, options)
    upstream = tuple(torch.empty_like(o) for o in results[: op.results])
    backward = (*upstream, *saved, *options)
    specs = zip(op.gradients(*backward, needs), needs, strict=True)
    return Call(given, results, backward, tuple(spec.empty(device) if need else None for spec, need in specs))


def record(op: Op, call: Call, properties: Mapping[str, int] | None) -> dict[str, Notes]:
    """Notes by direction of what kernels/<op>.py would launch.

    properties: what Triton's driver says of a GPU (max_shared_mem, multiprocessor_count, warpSize); None asks the GPU
        that is here.
    """
    kernels = importlib.import_module(f"fastlm.kernels.{op.name}")
    notes = {"forward": Notes()}
    with _noting(notes["forward"], properties):
        kernels.forward(*call.arguments, *call.results)
    if op.gradients is not None:
        notes["backward"] = Notes()
        with _noting(notes["backward"], properties):
            kernels.backward(*call.backward, *call.gradients)
    return notes


@contextmanager
def _noting(notes: Notes, properties: Mapping[str, int] | None) -> Iterator[None]:
    import triton
    from triton.runtime.jit import JITFunction

    def note(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bound = dict(zip(function.arg_names, args, strict=False)) | options
        size = grid(bound) if callable(grid) else grid
        constants = {p.name: bound[p.name] for p in function.params if p.is_constexpr and p.name in bound}
        notes.launches.append(
            Launch(
                function.__name__, tuple(int(n) for n in size), options.get("num_warps"), options.get("num_stages"),
                {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in constants.items()},
            )
        )  # fmt: skip

    run = JITFunction.run
    JITFunction.run = note
    if properties is not None:
        triton.runtime.driver.set_active(_Driver(properties))
    memory = _Memory()
    try:
        with memory:
            yield
    finally:
        notes.workspace = memory.peak
        JITFunction.run = run
        if properties is not None:
            triton.runtime.driver._active = None


class _Driver:
    """Answers for a GPU that is not here."""

    def __init__(self, properties: Mapping[str, int]) -> None:
        self.properties = dict(properties)
        self.utils = self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self.properties


class _Memory(TorchDispatchMode):
    """Counts the bytes of new tensors, and forgets them when the last tensor that shares the memory is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.owners: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {_memory(a) for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)} - self.owners.keys()
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(t, Tensor) or (memory := _memory(t)) in given:
                continue
            nbytes = t.untyped_storage().nbytes()
            if memory not in self.owners:
                self.now += nbytes
                self.peak = max(self.peak, self.now)
            self.owners[memory] = self.owners.get(memory, 0) + 1
            weakref.finalize(t, self._gone, memory, nbytes)
        return out

    def _gone(self, memory: int, nbytes: int) -> None:
        self.owners[memory] -= 1
        if not self.owners[memory]:
            del self.owners[memory]
            self.now -= nbytes


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata
