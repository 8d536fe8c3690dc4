"""Checkpoints beside the steps: a copy of the state is taken between two steps, and one thread writes it while they go on.

The copy's memory is taken and touched once, at the start: a run that it does not fit into fails there and not at its first
checkpoint, and a copy costs what memory's speed allows. Only one checkpoint is under way; the next waits for it.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastlm.engine.arena import give_back

from . import checkpoint
from .checkpoint import CheckpointError

__all__ = ["Saver", "Snapshot", "model_on"]

M = TypeVar("M", bound=nn.Module)


class Snapshot:
    """Copies of named tensors in host memory, pinned where they are on a GPU."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {n: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for n, t in tensors.items()}
        self.take(tensors)

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy them all; they may be changed when this returns. Whoever read the copies must be done before."""
        for name, to in self.tensors.items():
            to.copy_(tensors[name], non_blocking=True)
        if any(t.is_cuda for t in tensors.values()):
            torch.cuda.synchronize()

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


class Saver:
    """Writes checkpoints of a run, one at a time, in a thread.

    Args:
        root, keep: where they live, and how many of the newest are kept beside the best.
        state: the run's tensors now; later states have the same names, shapes and dtypes.
        model: whose files go with each checkpoint.
        parameters: from a mapping like `state`, the model's trainable parameters in it by name.
        export: writes a model's files into a directory.
        say: told how each save went.
    """

    def __init__(
        self, root: Path, keep: int, state: Mapping[str, Tensor], model: nn.Module,
        parameters: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], export: Callable[[Path, nn.Module], None],
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.saved_at: int | None = None
        self.snapshot = Snapshot(state)
        self._root, self._keep, self._export, self._say = root, keep, export, say
        self._model = model_on(model, parameters(self.snapshot.tensors))
        self._thread = ThreadPoolExecutor(1, "fastlm-saver", _yield_to_others)
        self._writing: tuple[int, Future[Path]] | None = None

    def knows(self, step: int) -> bool:
        """Whether this step is saved, or being saved."""
        return step in (self.saved_at, self._writing[0] if self._writing else None)

    def begin(
        self, step: int, state: Mapping[str, Tensor], more: Mapping[str, Tensor], *, config: Mapping[str, Any],
        progress: Mapping[str, Any], versions: Mapping[str, str],
    ) -> None:  # fmt: skip
        """Take a copy of the state and begin to write it, once the save before has ended.

        more: tensors that nobody changes from now on, written beside the state. The rest is as for `checkpoint.save`.
        """
        self.settle()
        self.snapshot.take(state)
        tensors = {**self.snapshot.tensors, **more}
        described = {"config": config, "progress": progress, "versions": versions}
        self._writing = step, self._thread.submit(self._write, step, tensors, described)

    def settle(self, wait: bool = True) -> None:
        """Wait for the save under way, if there is one, and say how it went. wait False: only if it has ended.

        Raises OSError if old checkpoints could not be removed.
        """
        if self._writing is None or not (wait or self._writing[1].done()):
            return
        (step, written), self._writing = self._writing, None
        try:
            path = written.result()
        except CheckpointError as error:
            self._say(f"WARNING: {error}")
        else:
            self.saved_at = step
            self._say(f"step {step}: saved {path}")

    def close(self) -> None:
        """Wait for what is being written, whatever becomes of it."""
        self._thread.shutdown()

    def _write(self, step: int, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> Path:
        def export(directory: Path) -> None:
            self._export(directory, self._model)

        path = checkpoint.save(self._root, step, tensors, **described, export=export)
        checkpoint.prune(self._root, self._keep)
        give_back()  # a thread's freed memory would stay its own
        return path


def model_on(model: M, parameters: Mapping[str, Tensor]) -> M:
    """A copy of the model on the CPU whose parameters of these names are these very tensors; what is tied stays tied."""
    own = dict(model.named_parameters())
    there: dict[int, Any] = {id(own[n]): nn.Parameter(t, requires_grad=False) for n, t in parameters.items()}
    return copy.deepcopy(model, there).cpu()


def _yield_to_others() -> None:
    """Let the steps go first where the system knows priorities of threads, but not by much: they may come to wait for this."""
    if sys.platform == "linux":  # elsewhere it would be the whole process's
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
