"""Who computes an op: the choice among reference, triton, cpu and cuda, and the reason for it.

    with fastlm.use_backend("triton"): ...      beats      FASTLM_BACKEND=triton      beats      the automatic choice

A backend that was asked for and cannot serve raises BackendError; nothing falls back in silence.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import native

if TYPE_CHECKING:
    from .registry import Op

__all__ = [
    "BACKENDS",
    "BackendError",
    "Choice",
    "choose",
    "explain",
    "implementation",
    "device_type",
    "missing",
    "on_meta",
    "requested",
    "use_backend",
    "why_not",
]

BACKENDS = ("reference", "triton", "cpu", "cuda")
_AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
_DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_REQUESTED: ContextVar[str | None] = ContextVar("fastlm_backend", default=None)
_ON_META: ContextVar[str] = ContextVar("fastlm_on_meta", default="meta")


class BackendError(RuntimeError):
    """A backend that was asked for cannot serve."""


class Choice(NamedTuple):
    """The backend that serves a call, and why it and not another."""

    backend: str
    reason: str


def _known(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{where}: {name!r} is no backend; allowed: {', '.join(BACKENDS)}")
    return name


def requested() -> str | None:
    """The backend asked for by `use_backend` or FASTLM_BACKEND; None for the automatic choice."""
    name = _REQUESTED.get()
    if name is None and (name := os.environ.get("FASTLM_BACKEND") or None) is not None:
        _known(name, "FASTLM_BACKEND")
    return name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside by one backend, forward and the backward of what was computed inside.

    name: "reference", "triton", "cpu", "cuda", or None for whatever holds outside.
    """
    token = _REQUESTED.set(_REQUESTED.get() if name is None else _known(name, "use_backend"))
    try:
        yield
    finally:
        _REQUESTED.reset(token)


@contextmanager
def on_meta(device_type: str) -> Iterator[None]:
    """Choose for tensors on the meta device as if they were on this one."""
    token = _ON_META.set(device_type)
    try:
        yield
    finally:
        _ON_META.reset(token)


def device_type(tensor: Tensor) -> str:
    """Where a tensor is, or would be: "cpu", "cuda", ..."""
    kind = tensor.device.type
    return _ON_META.get() if kind == "meta" else kind


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _triton(op: str) -> Any:
    return importlib.import_module(f"fastlm.kernels.{op}")


def _find(op: Op, backend: str, direction: str) -> Callable[..., object]:
    if backend == "triton":
        return getattr(_triton(op.name), direction)
    return partial(native.call, getattr(native.load(backend), f"{op.name}_{direction}"))


@cache
def missing(op: str, direction: str, backend: str) -> str:
    """Why there is no implementation on this machine, whatever the arguments; "" if there is one."""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if importlib.util.find_spec(f"fastlm.kernels.{op}") is None:
            return f"there is no kernels/{op}.py"
        return "" if hasattr(_triton(op), direction) else f"kernels/{op}.py has no {direction}"
    if why := native.why_not(backend):
        return why
    there = hasattr(native.load(backend), f"{op}_{direction}")
    return "" if there else f"csrc/{backend} has no {op}_{direction}"


@cache
def _kind_why_not(op: str, backend: str, direction: str, device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """Why `backend` cannot serve tensors on this device of these dtypes."""
    if (backend == "cpu" and device != "cpu") or (backend == "cuda" and device != "cuda"):
        return f"the tensors are on {device!r}"
    for dtype in dtypes:
        if dtype.is_floating_point and dtype not in _DTYPES[backend]:
            return f"dtype {dtype} is not among {', '.join(map(str, _DTYPES[backend]))}"
    return missing(op, direction, backend)


def why_not(op: Op, backend: str, args: Sequence[Any], direction: str = "forward") -> str:
    """Why `backend` cannot serve this call; "" if it can."""
    if backend == "reference":
        return ""
    tensors = [a for a in args if isinstance(a, Tensor)]
    device, dtypes = device_type(tensors[0]), tuple(t.dtype for t in tensors)
    if backend == "triton" and device != "cuda" and not interpreting():
        return f"the tensors are on {device!r}; Triton needs a GPU (or, for tests, TRITON_INTERPRET=1 before the start)"
    if why := _kind_why_not(op.name, backend, direction, device, dtypes):
        return why
    limit = getattr(_triton(op.name), "cannot_serve", None) if backend == "triton" else None
    return limit(direction, *args) if limit is not None else ""


def choose(op: Op, args: Sequence[Any], direction: str = "forward") -> Choice:
    """The backend for a call, with the reason. Raises BackendError if the one asked for cannot serve."""
    asked = requested()
    if asked is not None:
        if why := why_not(op, asked, args, direction):
            raise BackendError(f"{op.name}: backend {asked!r} was asked for and cannot serve: {why}")
        return Choice(asked, "asked for")
    device = next(device_type(a) for a in args if isinstance(a, Tensor))
    passed_over: list[str] = []
    for backend in _AUTOMATIC.get(device, ("reference",)):
        why = why_not(op, backend, args, direction)
        if not why:
            return Choice(backend, "; ".join(passed_over) or f"first choice on {device}")
        passed_over.append(f"not {backend}: {why}")
    raise AssertionError("the reference serves everything")


def implementation(op: Op, direction: str, args: Sequence[Any]) -> Callable[..., object] | None:
    """The native function that serves a call, or None for the reference."""
    backend = choose(op, args, direction).backend
    return None if backend == "reference" else function(op, backend, direction)


_FOUND: dict[tuple[str, str, str], Callable[..., object]] = {}


def function(op: Op, backend: str, direction: str) -> Callable[..., object]:
    """The native function of a backend that has it."""
    key = (op.name, backend, direction)
    if key not in _FOUND:
        _FOUND[key] = _find(op, backend, direction)
    return _FOUND[key]


def explain(op: Any, *args: Any, **kwargs: Any) -> str:
    """Which backend would serve ``op(*args, **kwargs)``, and why. `op`: a public function of fastlm.ops or its name."""
    from . import registry

    name = op if isinstance(op, str) else op.__name__
    record = registry.get(name)
    seen: list[Choice] = []

    class Stop(Exception):
        pass

    class Witness:
        def forward(self, op: Op, args: Sequence[Any]) -> Any:
            seen.append(choose(op, args))
            raise Stop

    with suppress(Stop):
        record.function(*args, **kwargs, tape=Witness())
    return f"{name}: {seen[0].backend} ({seen[0].reason})"
