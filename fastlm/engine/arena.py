"""Activation memory, planned once for each shape of batch and then reused without allocating.

The first time a frame (one micro-batch's forward and backward) runs, every tensor gets a storage of its own, and the
arena notes when each storage dies: Python's reference counts are the liveness analysis, so layers never free anything
by hand and a view keeps its base alive. Then every tensor gets an offset in one flat buffer (largest first, lowest
offset that is free over its lifetime), and later frames of the same key hand out the same views in the same order.

A frame must ask for the same tensors in the same order every time; one that does not raises, it never corrupts.
A tensor of a frame is overwritten by the next frame: what must outlive it is copied out.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import native
from ..registry import Spec

__all__ = ["Arena", "give_back", "give_back_at_once"]

_MMAP_THRESHOLD = -3  # mallopt's M_MMAP_THRESHOLD
_ALIGN = 512  # bytes: a GPU's allocation granularity, and whole cache lines on a CPU


def _nbytes(spec: Spec) -> int:
    size = math.prod(spec.shape) * spec.dtype.itemsize
    return -(-size // _ALIGN) * _ALIGN


def give_back() -> None:
    """Hand memory that was freed back to the system, where the C library is glibc.

    It keeps what lies below its last block in use, and a pass that makes every tensor for itself leaves much of that.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def give_back_at_once() -> None:
    """From now on hand freed blocks of a MiB and more back to the system at once, where the C library is glibc.

    By itself it learns from the first large blocks that are freed to keep those of up to 32 MiB, among which others do not
    fit: a run took up to a quarter more than it held. For the process as a whole, so for programs and not for libraries.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 20)


@dataclass
class _Plan:
    specs: list[Spec]
    offsets: list[int]
    size: int
    buffer: Tensor | None = None
    views: list[Tensor] = field(default_factory=list)

    def bind(self, buffer: Tensor) -> None:
        """Make the views into `buffer`, once for each buffer."""
        if self.buffer is buffer:
            return
        self.buffer, self.views = buffer, []
        for spec, offset in zip(self.specs, self.offsets, strict=True):
            flat = buffer[offset : offset + math.prod(spec.shape) * spec.dtype.itemsize].view(spec.dtype)
            order = spec.order or tuple(range(len(spec.shape)))
            inverse = [order.index(d) for d in range(len(order))]
            self.views.append(flat.view([spec.shape[d] for d in order]).permute(inverse))


class Arena:
    """Memory for the frames of one engine.

    device: where tensors live.    max_plans: how many keys are remembered; the least recently used goes first.
    """

    def __init__(self, device: torch.device | str, max_plans: int = 64) -> None:
        self.device, self.max_plans = torch.device(device), max_plans
        self.buffer: Tensor | None = None
        self._constants: dict[tuple[float, torch.dtype], Tensor] = {}
        self._plans: dict[Hashable, _Plan] = {}
        self._replay: _Plan | None = None
        self._next = 0
        self._specs: list[Spec] = []
        self._born: list[StorageWeakRef] = []
        self._died: list[int] = []
        self._live: list[int] = []

    @contextmanager
    def frame(self, key: Hashable) -> Iterator[None]:
        """Everything allocated inside belongs to one frame of this key."""
        self._next = 0
        self._replay = self._plans.pop(key, None)
        if self._replay is None:
            if self.device.type == "cpu":  # a GPU's graphs go on using it
                self._drop_buffer()  # or both would be held at once
            self._specs, self._born, self._died, self._live = [], [], [], []
            yield
            self._plans[key] = self._plan()
            give_back()
            while len(self._plans) > self.max_plans:
                del self._plans[next(iter(self._plans))]
            return
        self._plans[key] = self._replay  # now the most recently used
        if self.buffer is None or self.buffer.numel() < self._replay.size:
            self._drop_buffer()
            self.buffer = native.large_pages(torch.empty(self._replay.size, dtype=torch.uint8, device=self.device))
        self._replay.bind(self.buffer)
        yield
        if self._next != len(self._replay.specs):
            raise RuntimeError(
                f"arena: a frame made {self._next} tensors where its plan has {len(self._replay.specs)}"
            )

    def _drop_buffer(self) -> None:
        for plan in self._plans.values():
            plan.buffer, plan.views = None, []
        self.buffer = None

    def constant(self, value: float, dtype: torch.dtype) -> Tensor:
        """A 0-dim tensor of that value, made once and never written to."""
        if (value, dtype) not in self._constants:
            self._constants[value, dtype] = torch.tensor(value, dtype=dtype, device=self.device)
        return self._constants[value, dtype]

    def alloc(self, spec: Spec, device: torch.device | None = None) -> Tensor:
        """An uninitialised tensor of the current frame."""
        if self._replay is not None:
            i, plan = self._next, self._replay
            if i >= len(plan.specs) or plan.specs[i] != spec:
                planned = plan.specs[i] if i < len(plan.specs) else "nothing more"
                raise RuntimeError(f"arena: tensor {i} of the frame is {spec}, its plan has {planned}")
            self._next += 1
            return plan.views[i]
        self._bury(len(self._specs))
        tensor = self._fresh(spec)
        self._live.append(len(self._specs))
        self._specs.append(spec)
        self._born.append(StorageWeakRef(tensor.untyped_storage()))
        self._died.append(-1)
        return tensor

    def _fresh(self, spec: Spec) -> Tensor:
        return native.large_pages(spec.empty(self.device))

    def _bury(self, now: int) -> None:
        """Note the death, before allocation `now`, of every storage that nobody holds any more."""
        for i in [i for i in self._live if self._born[i].expired()]:
            self._died[i] = now
            self._live.remove(i)

    def _plan(self) -> _Plan:
        end = len(self._specs)
        self._bury(end)
        for i in self._live:  # still held by somebody: lives to the end of the frame
            self._died[i] = end
        sizes = [_nbytes(s) for s in self._specs]
        offsets = [0] * end
        placed: list[int] = []
        for i in sorted(range(end), key=lambda i: -sizes[i]):
            overlap = sorted(
                (offsets[j], offsets[j] + sizes[j]) for j in placed if i < self._died[j] and j < self._died[i]
            )
            at = 0
            for low, high in overlap:
                if at + sizes[i] <= low:
                    break
                at = max(at, high)
            offsets[i] = at
            placed.append(i)
        size = max((o + s for o, s in zip(offsets, sizes, strict=True)), default=0)
        return _Plan(self._specs, offsets, max(size, _ALIGN))

    @property
    def planned_bytes(self) -> int:
        """Size of the largest plan."""
        return max((p.size for p in self._plans.values()), default=0)
