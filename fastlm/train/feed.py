"""Batches on the device: the micro-batches of one step, in buffers that are made once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastlm.data import Loader, PackLoader, SampleLoader
from fastlm.tasks import CausalLM

__all__ = ["Feed", "SampleFeed"]


class Feed:
    """Fills the same buffers for every step.

    On a GPU the copies are asynchronous, so the host would overwrite a staging buffer while the device still
    reads it: there are two pinned sets, and a set is refilled only after the event behind its last copy. The
    device's own buffers need no such care, for their copies wait in the stream for the step before.
    """

    def __init__(
        self,
        loader: Loader,
        task: CausalLM,
        batch_size: int,
        seq_len: int,
        micro_batches: int,
        device: torch.device,
    ) -> None:
        self._loader = loader
        on_gpu = device.type == "cuda"
        self._staging = [
            [task.empty(batch_size, seq_len, pin_memory=on_gpu) for _ in range(micro_batches)]
            for _ in range(2 if on_gpu else 1)
        ]
        self._target = self._staging[0]
        if on_gpu:
            self._target = [task.empty(batch_size, seq_len, device) for _ in range(micro_batches)]
        self._copied = [torch.cuda.Event() for _ in self._staging] if on_gpu else []
        self._turn = 0

    def next(self) -> list[Mapping[str, Tensor]]:
        """The micro-batches of the next step, each int64 (batch, seq); overwritten by the next call."""
        turn, self._turn = self._turn, (self._turn + 1) % len(self._staging)
        if self._copied:
            self._copied[turn].synchronize()
        for batch in self._staging[turn]:
            self._loader.next_batch(out=batch)
        if self._copied:
            for target, batch in zip(self._target, self._staging[turn], strict=True):
                for name, tensor in target.items():
                    tensor.copy_(batch[name], non_blocking=True)
            self._copied[turn].record()
        return list(self._target)


class SampleFeed:
    """The same from a loader that makes each batch anew, of a width of its own for instance.

    On a GPU they are copied from pinned memory, which PyTorch does not hand out again before the copy is done.
    """

    def __init__(self, loader: SampleLoader | PackLoader, micro_batches: int, device: torch.device) -> None:
        self._loader, self._micro_batches, self._device = loader, micro_batches, device

    def next(self) -> list[Mapping[str, Tensor]]:
        """The micro-batches of the next step."""
        return [self._there(self._loader.next_batch()) for _ in range(self._micro_batches)]

    def _there(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self._device.type != "cuda":
            return batch
        return {name: t.pin_memory().to(self._device, non_blocking=True) for name, t in batch.items()}
