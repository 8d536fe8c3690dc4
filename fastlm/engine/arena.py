"""Activation memory, planned once for each shape of batch and then reused without allocating.

The first time a frame (one micro-batch's forward and backward) runs, every tensor gets a storage of its own, and the
arena notes when each storage dies: Python's reference counts are the liveness analysis, so layers never free anything
by hand and a view keeps its base alive. Then every tensor gets an offset in one flat buffer (``placement.py``), and later
frames of the same key hand out the same views in the same order.

A frame may be lent a buffer, as the gradients' is for a step's first micro-batch: tensors that have died by the time when a
part of it is taken lie there, and only the others need memory of their own. What C++ kernels work in (`<function>_workspace`)
is a tensor of the frame like any other.

A frame must ask for the same tensors in the same order every time; one that does not raises, it never corrupts.
A tensor of a frame is overwritten by the next frame: what must outlive it is copied out.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import native
from ..registry import Spec
from .placement import ALIGN, Part, aligned, place

__all__ = ["Arena", "give_back", "give_back_at_once"]

_MMAP_THRESHOLD = -3  # mallopt's M_MMAP_THRESHOLD


def _nbytes(spec: Spec) -> int:
    return aligned(math.prod(spec.shape) * spec.dtype.itemsize)


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


class Loan(NamedTuple):
    """A buffer whose contents nobody wants when a frame begins, and which the frame may use until it takes parts of it.

    buffer: one-dimensional.    kept: the parts that are not lent.
    """

    buffer: Tensor
    kept: tuple[Part, ...] = ()


@dataclass
class _Plan:
    """What a frame asks for in its order, tensors and parts of the loan that it takes, and where each tensor lies.

    offsets: into the lent bytes and, beyond them, the arena's own buffer, of which `size` bytes are needed.
    """

    events: list[Spec | Part]
    offsets: list[int]
    lent: int
    size: int
    buffer: Tensor | None = None
    views: list[Tensor | None] = field(default_factory=list)

    def bind(self, buffer: Tensor, loan: Loan | None) -> None:
        """Make the views into `buffer` and the loan, once for each buffer."""
        if self.buffer is buffer:
            return
        self.buffer, self.views = buffer, []
        lent = buffer if loan is None else loan.buffer.view(torch.uint8)
        for event, offset in zip(self.events, self.offsets, strict=True):
            if isinstance(event, Part):
                self.views.append(None)
                continue
            memory, at = (lent, offset) if offset < self.lent else (buffer, offset - self.lent)
            flat = memory[at : at + math.prod(event.shape) * event.dtype.itemsize].view(event.dtype)
            order = event.order or tuple(range(len(event.shape)))
            inverse = [order.index(d) for d in range(len(order))]
            self.views.append(flat.view([event.shape[d] for d in order]).permute(inverse))


class Arena:
    """Memory for the frames of one engine.

    device: where tensors live.    max_plans: how many keys are remembered; the least recently used goes first.
    """

    def __init__(self, device: torch.device | str, max_plans: int = 64) -> None:
        self.device, self.max_plans = torch.device(device), max_plans
        self.buffer: Tensor | None = None
        self.dropped: Callable[[], object] = lambda: None  # called when the buffer is given up
        self._constants: dict[tuple[float, torch.dtype], Tensor] = {}
        self._plans: dict[Hashable, _Plan] = {}
        self._replay: _Plan | None = None
        self._next = 0
        self._loan: Loan | None = None
        self._events: list[Spec | Part] = []
        self._born: dict[int, StorageWeakRef] = {}  # of the tensors that live
        self._died: list[int] = []

    @contextmanager
    def frame(self, key: Hashable, loan: Loan | None = None) -> Iterator[None]:
        """Everything allocated inside belongs to one frame of this key.

        loan: memory for its tensors until `take` says otherwise. A key has always the same, or never one.
        """
        self._next, self._loan = 0, loan
        plan = self._replay = self._plans.pop(key, None)
        if plan is None:
            if self.device.type == "cpu":  # a GPU's graphs go on using it
                self._drop_buffer()  # or both would be held at once
            self._events, self._born, self._died = [], {}, []
        else:
            self._plans[key] = plan  # now the most recently used
            if self.buffer is None or self.buffer.numel() < plan.size:
                self._drop_buffer()
                self.buffer = native.large_pages(torch.empty(plan.size, dtype=torch.uint8, device=self.device))
            plan.bind(self.buffer, loan)
        with native.workspace_from(lambda size: self.alloc(Spec((size,), torch.uint8))):
            yield
        if plan is None:
            self._plans[key] = self._plan()
            give_back()
            while len(self._plans) > self.max_plans:
                del self._plans[next(iter(self._plans))]
        elif self._next != len(plan.events):
            raise RuntimeError(f"arena: a frame made {self._next} tensors where its plan has {len(plan.events)}")

    def _drop_buffer(self) -> None:
        for plan in self._plans.values():
            plan.buffer, plan.views = None, []
        self.buffer = None
        self.dropped()

    def constant(self, value: float, dtype: torch.dtype) -> Tensor:
        """A 0-dim tensor of that value, made once and never written to."""
        if (value, dtype) not in self._constants:
            self._constants[value, dtype] = torch.tensor(value, dtype=dtype, device=self.device)
        return self._constants[value, dtype]

    def alloc(self, spec: Spec, device: torch.device | None = None) -> Tensor:
        """An uninitialised tensor of the current frame."""
        if self._replay is not None:
            tensor = self._replay.views[self._planned(spec)]
            assert tensor is not None
            return tensor
        now = self._note(spec)
        tensor = self._fresh(spec)
        self._born[now] = StorageWeakRef(tensor.untyped_storage())
        return tensor

    def take(self, part: Tensor) -> None:
        """From now on `part`, a view of the loan's buffer if that is lent, is its owner's: no tensor lies there any more."""
        if self._loan is None:
            return
        start = int(part.storage_offset()) * part.element_size()
        taken = Part(start, start + part.nbytes)
        if self._replay is not None:
            self._planned(taken)
        else:
            self._note(taken)

    def _planned(self, event: Spec | Part) -> int:
        i, plan = self._next, self._replay
        assert plan is not None
        if i >= len(plan.events) or plan.events[i] != event:
            planned = plan.events[i] if i < len(plan.events) else "nothing more"
            raise RuntimeError(f"arena: tensor {i} of the frame is {event}, its plan has {planned}")
        self._next += 1
        return i

    def _note(self, event: Spec | Part) -> int:
        now = len(self._events)
        self._bury(now)
        self._events.append(event)
        self._died.append(-1)
        return now

    def _fresh(self, spec: Spec) -> Tensor:
        return native.large_pages(spec.empty(self.device))

    def _bury(self, now: int) -> None:
        """Note the death, before event `now`, of every storage that nobody holds any more."""
        for i in [i for i, storage in self._born.items() if storage.expired()]:
            self._died[i] = now
            del self._born[i]

    def _plan(self) -> _Plan:
        end = len(self._events)
        self._bury(end)
        for i in self._born:  # still held by somebody: lives to the end of the frame
            self._died[i] = end
        loan = self._loan
        taken = [(part, -1) for part in loan.kept] if loan else []
        taken += [(part, i) for i, part in enumerate(self._events) if isinstance(part, Part)]
        lent = loan.buffer.nbytes if loan else 0
        tensors = [(i, self._died[i], _nbytes(s)) for i, s in enumerate(self._events) if isinstance(s, Spec)]
        places = place(tensors, taken, lent)
        offsets = [0] * end
        for (i, _, _), offset in zip(tensors, places, strict=True):
            offsets[i] = offset
        size = max((o + s - lent for o, (_, _, s) in zip(places, tensors, strict=True)), default=0)
        return _Plan(self._events, offsets, lent, max(size, ALIGN))

    @property
    def planned_bytes(self) -> int:
        """Size of the largest plan."""
        return max((p.size for p in self._plans.values()), default=0)
