"""Parameters in flat buffers: weights with their float32 masters, gradients and optimizer state."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import native
from ..ops.optimizer_step import MASK_RUN, split
from .arena import Loan
from .placement import Part

__all__ = ["FlatParameters"]

_ALIGN = MASK_RUN  # elements: a parameter starts on a cache line in every dtype, and its flags are its own


class FlatParameters:
    """The trainable parameters of a model, moved into one buffer of the model's dtype.

    param: (n,) in `dtype`; the module's parameters become views of it, so tied ones stay tied.
    master: (n,) the weights that the optimizer updates: `param` itself, but for float16, where they are float32.
    trail: (n,) int16 for bfloat16, with which `master` is float32, see ``fastlm.ops.adamw``; else None.
    grad: (n,) float32 (float64 for float64). exp_avg, exp_avg_sq: (n,) of the moments' dtype (float64 for float64).
    loan: `grad`, for what a step keeps until a gradient comes (what lies between two parameters must stay zero).
    decay_mask: (n / 64,) bool, true in the matrices (parameters of two or more dimensions): weight decay acts there.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, device: torch.device, moments: torch.dtype = torch.float32
    ) -> None:  # fmt: skip
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("model: no parameter requires a gradient; allowed: at least one")
        model.to(device)
        self.lengths = {name: -(-p.numel() // _ALIGN) * _ALIGN for name, p in named}
        ends = list(itertools.accumulate(self.lengths.values()))
        n = ends[-1]
        self.offsets = dict(zip(self.lengths, [0, *ends[:-1]], strict=True))
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

        def buffer(kind: torch.dtype, size: int = n) -> Tensor:
            return native.large_pages(native.zeros(size, kind, device))

        self.param = buffer(dtype)
        self.master = buffer(self.wide) if dtype == torch.float16 else self.param
        self.trail = buffer(torch.int16) if dtype == torch.bfloat16 else None
        self.decay_mask = buffer(torch.bool, n // MASK_RUN)
        self.names = [name for name, _ in named]
        self.shapes = {name: p.shape for name, p in named}
        with torch.no_grad():
            for name, p in named:
                self.set_weights(name, p)
                first = self.offsets[name] // MASK_RUN
                self.decay_mask[first : first + self.lengths[name] // MASK_RUN] = p.dim() >= 2
                p.data = self.view(self.param, name)
            model.to(dtype)  # buffers and frozen parameters follow; tables that must stay wide stay so
        # Only now, when the parameters' first memory has gone; moments come with the first update.
        self.grad = buffer(self.wide)
        moments = self.wide if dtype == torch.float64 else moments
        self.exp_avg, self.exp_avg_sq = buffer(moments), buffer(moments)
        self.gradients = {p: self.view(self.grad, name) for name, p in named}
        item = self.grad.element_size()
        between = ((self.offsets[name] + p.numel(), self.offsets[name] + self.lengths[name]) for name, p in named)
        self.loan: Loan | None = Loan(self.grad, tuple(Part(item * low, item * high) for low, high in between if low < high))

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """The part of a flat buffer that belongs to a parameter, in the parameter's shape."""
        start, shape = self.offsets[name], self.shapes[name]
        return buffer[start : start + shape.numel()].view(shape)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Every parameter's part of a flat buffer by name."""
        return {name: self.view(buffer, name) for name in self.names}

    @torch.no_grad()
    def set_weights(self, name: str, weights: Tensor) -> None:
        """Put weights of any dtype in a parameter and in what the optimizer has of it."""
        if self.trail is None:
            self.view(self.master, name).copy_(weights)
            self.view(self.param, name).copy_(weights)
            return
        upper, lower = split(weights)
        self.view(self.param, name).copy_(upper)
        self.view(self.trail, name).copy_(lower)

    def nbytes(self) -> int:
        """Bytes of all the buffers."""
        buffers = (self.param, self.master, self.trail, self.grad, self.exp_avg, self.exp_avg_sq, self.decay_mask)
        return sum(t.nbytes for t in _distinct(b for b in buffers if b is not None))


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({t.data_ptr(): t for t in tensors}.values())
