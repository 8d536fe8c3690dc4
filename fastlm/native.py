"""The native backends from Python: which extension module serves, and how tensors get there.

`csrc/` knows no torch: a tensor crosses as (address, dtype code, shape, strides). Checking dtype, device and
layout is the caller's business; the modules check the number and the kind of arguments.
"""

from __future__ import annotations

import functools
import importlib
import json
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

# torch first: its OpenMP runtime then serves the extensions too, and the two do not fight for the cores.
import torch

__all__ = [
    "load", "call", "why_not", "build_record", "dry_run", "large_pages", "lend_nothing", "noting", "workspace_from",
    "zero_", "zeros",
]  # fmt: skip

# From narrow to wide; a chip that runs one runs all before it.
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")

Argument = torch.Tensor | bool | int | float | str | None

# torch dtype -> code in csrc/tensor.h, read from the first module that is loaded.
_codes: dict[torch.dtype, int] = {}


def build_record() -> dict[str, Any]:
    """What the installation built, what it left out and why (fastlm/_build.json); empty if unknown."""
    path = Path(__file__).with_name("_build.json")
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        return record
    except FileNotFoundError:
        return {}


def _import(name: str) -> ModuleType:
    try:
        module = importlib.import_module(f"fastlm.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"fastlm.{name}":
            raise
        reason = build_record().get("skipped", {}).get(name)
        raise ImportError(
            f"fastlm.{name} was not built: {reason}"
            if reason
            else f"fastlm.{name} was not built; run `pip install .` or `python setup.py build_ext --inplace`"
        ) from None
    codes = {getattr(torch, dtype): code for code, dtype in enumerate(module.dtypes())}
    if _codes and _codes != codes:
        raise ImportError(
            f"fastlm.{name} has another table of dtypes than the module loaded before it; rebuild"
        )
    _codes.update(codes)
    return module


def _cpu() -> ModuleType:
    best = _import("_cpu_portable").best_isa()
    runnable = ISAS[: ISAS.index(best) + 1]
    asked = os.environ.get("FASTLM_CPU_ISA", "").strip()
    if asked:
        if asked not in ISAS:
            raise ImportError(f"FASTLM_CPU_ISA must be one of {', '.join(ISAS)}; got {asked!r}")
        if asked not in runnable:
            raise ImportError(f"FASTLM_CPU_ISA={asked}: this chip runs only {', '.join(runnable)}")
        return _import(f"_cpu_{asked}")
    for isa in reversed(runnable[1:]):
        try:
            return _import(f"_cpu_{isa}")
        except ImportError:
            continue  # not built, as _build.json says; `fastlm info` shows it
    return _import("_cpu_portable")


@functools.cache
def load(backend: str) -> ModuleType:
    """The extension module of `backend` ("cpu" or "cuda"), imported on first use and kept.

    The CPU variant is the widest that was built and that the chip runs, or the one FASTLM_CPU_ISA names.
    Raises ImportError, saying why, if there is none; loading "cuda" needs no GPU.
    """
    if backend not in ("cpu", "cuda"):
        raise ValueError(f'backend must be "cpu" or "cuda"; got {backend!r}')
    return _cpu() if backend == "cpu" else _import("_cuda")


@functools.cache
def why_not(backend: str) -> str:
    """Why `load(backend)` would fail, in one line; empty if it would not."""
    try:
        load(backend)
    except ImportError as error:
        return str(error)
    return ""


class _Around(threading.local):
    """What calls from this thread are inside of. dry: see `dry_run`; give: `workspace_from`; note: `noting`."""

    dry: Callable[[Callable[..., object], tuple[Argument, ...]], None] | None = None
    give: Callable[[int], torch.Tensor] | None = None
    note: Callable[..., None] | None = None


_around = _Around()


@contextmanager
def _inside(**what: Any) -> Iterator[None]:
    before = {name: getattr(_around, name) for name in what}
    vars(_around).update(what)
    try:
        yield
    finally:
        vars(_around).update(before)


@contextmanager
def dry_run(note: Callable[[int], None]) -> Iterator[None]:
    """Calls of native functions do nothing inside, so tensors may be on the meta device.

    note: told the bytes of workspace of each for which the module has `<function>_workspace`, unless `workspace_from` gives
        them.
    """

    def in_place_of(function: Callable[..., object], args: tuple[Argument, ...]) -> None:
        if (size := _workspace(function)) is None:
            return
        somewhere = 1  # no address, but not null either
        packed = ((somewhere, *_pack(function, i, a)[1:]) if isinstance(a, torch.Tensor) else a for i, a in enumerate(args))
        if _around.give is not None and function.__module__ != "fastlm._cuda":
            _around.give(size(*packed))
        else:
            note(size(*packed))

    with _inside(dry=in_place_of):
        yield


@contextmanager
def workspace_from(give: Callable[[int], torch.Tensor]) -> Iterator[None]:
    """C++ functions on the CPU that have a `<function>_workspace` get it from here inside; else their thread keeps its own.

    give: bytes -> a uint8 tensor of so many, which is the function's until it returns.
    """
    with _inside(give=give):
        yield


@functools.cache
def _workspace(function: Callable[..., object]) -> Callable[..., int] | None:
    """What says how many bytes of workspace a function needs; None for one that takes none."""
    return getattr(sys.modules[function.__module__], f"{function.__name__}_workspace", None)


def call(function: Callable[..., object], *args: Argument) -> object:
    """Calls a native function: tensors go as (address, dtype code, shape, strides), the rest as it is.

    With a tensor on a CUDA device, that device is made current, its current stream goes as the last argument,
    and before it the workspace of a function `f` for which the module has `f_workspace`. That memory comes
    from torch's allocator, so a CUDA graph can capture the call. Nothing is synchronised. On a CPU the workspace is the
    thread's own or comes from where `workspace_from` says. Inside `dry_run` nothing is called.
    """
    if _around.dry is not None:
        _around.dry(function, args)
        return None
    packed: list[object] = []
    device: torch.device | None = None
    for i, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            packed.append(_pack(function, i, arg))
            if arg.is_cuda:
                device = arg.device
        else:
            packed.append(arg)
    if device is None:
        if _around.give is None or (workspace := _workspace(function)) is None:
            return _run(function, packed, args)
        room, lend = _around.give(workspace(*packed)), load("cpu").lend_scratch
        _run(lend, [_pack(lend, 0, room)], (room,))
        try:
            return _run(function, packed, args)
        finally:
            _run(lend, [None], ())
    with torch.cuda.device(device):
        if (workspace := _workspace(function)) is not None:
            room = torch.empty(workspace(*packed), dtype=torch.uint8, device=device)
            packed.append(_pack(function, len(packed), room))
        return function(*packed, torch.cuda.current_stream(device).cuda_stream)


def _run(function: Callable[..., object], packed: Sequence[object], args: Sequence[Argument]) -> object:
    if _around.note is not None:
        _around.note(function, packed, {}, *(a for a in args if isinstance(a, torch.Tensor)))
    return function(*packed)


@contextmanager
def noting(note: Callable[..., None]) -> Iterator[None]:
    """Calls of C++ functions on the CPU are noted inside, as they are made.

    note: told the function, its arguments with addresses for tensors, {}, and then the tensors.
    """
    with _inside(note=note):
        yield


def lend_nothing() -> None:
    """Whatever this thread's C++ functions were lent (`workspace_from`), they no longer use."""
    if not why_not("cpu"):
        load("cpu").lend_scratch(None)


_LARGE = 1 << 23  # bytes: below, what a call costs is more than what large pages and threads save


def large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, not written yet; megabytes on a CPU will come in pages of 2 MiB where the system has them.

    With pages of 4 KiB the first write to fresh memory is several times slower than any later one.
    """
    if tensor.is_cpu and tensor.nbytes >= _LARGE and not why_not("cpu"):
        call(load("cpu").large_pages, tensor)
    return tensor


def zeros(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.zeros(size)``; of megabytes on a CPU each page comes into memory when it is first written."""
    nbytes = size * dtype.itemsize
    if device.type != "cpu" or nbytes < _LARGE:
        return torch.zeros(size, dtype=dtype, device=device)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, nbytes, **private), dtype=dtype)


def zero_(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor.zero_()``; megabytes on a CPU by all threads."""
    if tensor.is_cpu and tensor.nbytes >= _LARGE and not why_not("cpu"):
        call(load("cpu").zero, tensor)
        return tensor
    return tensor.zero_()


def _pack(function: Callable[..., object], index: int, tensor: torch.Tensor) -> tuple[object, ...]:
    code = _codes.get(tensor.dtype)
    if code is None:
        raise ValueError(f"{function.__name__}: argument {index} has dtype {tensor.dtype}, unknown to csrc")
    return tensor.data_ptr(), code, tensor.shape, tensor.stride()
