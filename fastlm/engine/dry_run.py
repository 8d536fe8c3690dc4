"""The engine's own code on tensors without memory: what a run would hold, before it holds anything.

Inside `dry_run` everything happens on the meta device: PyTorch's operations make shapes only, native kernels and Triton
launches do nothing, and a `Ledger` writes down what every tensor would take and when its memory would be free again.
Nothing here knows a model, an op or an optimizer, so nothing here can be wrong about one. A number that is read
(`.item()`) is made up: 0 for integers and "any of these", 1 otherwise, which is what a healthy run would find.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config
from torch.utils._python_dispatch import TorchDispatchMode

from .. import backends, native
from ..registry import Spec
from .arena import Arena, Loan
from .core import AdamWConfig, Engine

__all__ = ["Ledger", "StepMemory", "dry_engine", "dry_run", "state_memory", "step_memory"]

_aten = torch.ops.aten
_META = torch.device("meta")


class Ledger(TorchDispatchMode):
    """Counts bytes: `now` of the memory that tensors made inside hold, `peak` its largest value so far.

    workspace: the most that one native function on a CPU takes beside its arguments; it keeps it.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.now = self.peak = self.workspace = 0
        self._known: set[int] = set()
        self._counting = True

    @contextmanager
    def peak_of(self) -> Iterator[list[int]]:
        """Appends, at the end, how far above its first value `now` was inside."""
        before, self.peak = (self.now, self.peak), self.now
        result: list[int] = []
        yield result
        result.append(self.peak - before[0])
        self.peak = max(before[1], self.peak)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is made inside is counted by somebody else."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def note_workspace(self, size: int) -> None:
        """Of one native call: kept by its thread on a CPU, given back to the allocator on a GPU."""
        if self.device_type == "cpu":
            self.workspace = max(self.workspace, size)
        else:
            self.peak = max(self.peak, self.now + size)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is _aten._local_scalar_dense.default:
            return _made_up(args[0])
        if func is _aten._to_copy.default and kwargs.get("device") not in (None, _META):
            kwargs["device"] = _META
            if self.device_type == "cpu" and kwargs.get("dtype") in (None, args[0].dtype):
                return args[0]  # it is there already
        out = func(*args, **kwargs)
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self._enter(t.untyped_storage())
        if func.overloadpacket is _aten.any:
            out.never = True
        elif func is _aten.index.Tensor:  # a mask becomes the places where it holds, on the way
            places = sum(8 * m.dim() * m.numel() for m in args[1] if m is not None and m.dtype == torch.bool)
            self.peak = max(self.peak, self.now + places)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if self._counting else 0
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _made_up(t: Tensor) -> float | bool | int:
    """What a number that is read would be in a healthy run."""
    if t.dtype == torch.bool:
        return not getattr(t, "never", False)
    return 1.0 if t.is_floating_point() else 0


@contextmanager
def dry_run(device: torch.device) -> Iterator[Ledger]:
    """Everything inside runs on the meta device as it would on `device`; yields the ledger of it."""
    ledger = Ledger(device.type)
    with ExitStack() as stack:
        stack.enter_context(backends.on_meta(device.type))
        stack.enter_context(native.dry_run(ledger.note_workspace))
        if device.type == "cuda":
            stack.enter_context(_without_launches())
        stack.enter_context(_META)
        stack.enter_context(mock.patch.object(_config, "meta_nonzero_assume_all_nonzero", True))
        stack.enter_context(ledger)
        yield ledger


@contextmanager
def _without_launches() -> Iterator[None]:
    """Triton's launchers run, and launch nothing."""
    if backends.missing("layer_norm", "forward", "triton"):
        yield
        return
    from triton.runtime.jit import JITFunction

    with mock.patch.object(JITFunction, "run", lambda *args, **kwargs: None):
        yield


class _PlannedArena(Arena):
    """Plans a frame each time, of tensors that the ledger does not count: the plan says what they take together."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(_META)
        self._ledger = ledger
        self.largest = 0

    @contextmanager
    def frame(self, key: Hashable, loan: Loan | None = None) -> Iterator[None]:
        with super().frame(key, loan):
            yield
        self.largest = max(self.largest, self._plans.pop(key).size)

    def _fresh(self, spec: Spec) -> Tensor:
        with self._ledger.elsewhere():
            return spec.empty(self.device)


def dry_engine(
    ledger: Ledger, model: nn.Module, dtype: torch.dtype, backend: str | None = None,
    optimizer: AdamWConfig | None = None,
) -> Engine:  # fmt: skip
    """An engine on the meta device, to be made and used inside the `dry_run` of the ledger."""
    engine = Engine(model, optimizer, dtype, _META, backend)
    engine.arena = _PlannedArena(ledger)
    return engine


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step or an evaluation takes beside the engine's state.

    activations: the arena. workspace: the rest, of ops, native kernels and PyTorch.
    """

    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return self.activations + self.workspace


def step_memory(
    ledger: Ledger, engine: Engine, train: Mapping[str, Spec] | None, evaluate: Mapping[str, Spec] | None,
    accumulate: int = 1,
) -> StepMemory:  # fmt: skip
    """Of a step on so many micro-batches of this shape and an evaluation of that one; either may be None."""
    arena = engine.arena
    assert isinstance(arena, _PlannedArena)
    arena.largest = ledger.workspace = 0
    with ledger.peak_of() as peak:
        for batch, run in ((train, lambda b: engine.step([b] * accumulate)), (evaluate, engine.evaluate)):
            if batch is not None:
                with ledger.elsewhere():
                    tensors = {name: spec.empty(_META) for name, spec in batch.items()}
                run(tensors)
    return StepMemory(arena.largest, peak[0] + ledger.workspace)


def state_memory(engine: Engine) -> dict[str, int]:
    """Bytes of an engine's state by what it is for, each buffer once."""
    flat = engine.flat
    groups = {
        "parameters": [flat.param, *(t for t in (*engine.model.parameters(), *engine.model.buffers()) if not t.requires_grad)],
        "masters": [flat.master] if flat.trail is None else [flat.trail],
        "gradients": [flat.grad],
        "optimizer state": [flat.exp_avg, flat.exp_avg_sq, flat.decay_mask],
    }
    seen: set[int] = set()
    sizes = dict.fromkeys(groups, 0)
    for name, tensors in groups.items():
        for t in tensors:
            storage = t.untyped_storage()
            sizes[name] += 0 if storage._cdata in seen else storage.nbytes()
            seen.add(storage._cdata)
    return sizes
