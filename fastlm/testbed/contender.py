"""A function with its arguments, as it is timed: forward, backward, or both; with its errors and its memory.

What is timed in each direction
- forward: without a graph, as in inference;
- backward: of a graph that a forward just before, untimed, has made; the graph is freed on the way, as in training;
- both: forward with a graph, then backward.

Gradients are those of every argument that has one, with a random upstream gradient, by torch.autograd.grad.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import check
from ..registry import Op

__all__ = ["DIRECTIONS", "Contender", "available_memory", "error_ratio", "schema_arguments"]

DIRECTIONS = ("forward", "backward", "both")


def schema_arguments(op: Op, args: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of the op's schema that its public function makes of its own; nothing is computed."""
    seen: list[tuple[Any, ...]] = []

    class Stop(Exception):
        pass

    class Witness:
        def forward(self, record: Op, args: Sequence[Any]) -> Any:
            seen.append(tuple(args))
            raise Stop

    with contextlib.suppress(Stop):
        op.function(**args, tape=Witness())
    return seen[-1]


class Contender:
    """One function of those that are timed side by side.

    Args:
        op: whose public signature the function has.
        function: the function.
        args: its arguments; tensors that the op or the function overwrites are copied, the others shared.
        spoils: arguments that the function overwrites though the op does not; put back before each call.
    """

    def __init__(
        self, op: Op, function: Callable[..., Any], args: Mapping[str, Any], spoils: Sequence[str] = ()
    ) -> None:
        self.op, self.function = op, function
        own = {k: v.clone() if isinstance(v, Tensor) and k in (*op.mutates, *spoils) else v for k, v in args.items()}
        self.plain: dict[str, Any] = own
        self.wanted = check.differentiable(op, own) if op.backward is not None else []
        self.tracked = own | {n: own[n].detach().requires_grad_() for n in self.wanted}
        self.fresh = {n: args[n] for n in spoils}
        self.graph: tuple[list[Tensor], list[Tensor]] | None = None
        self._upstream: list[Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return next(a.device for a in self.plain.values() if isinstance(a, Tensor))

    def needs_setup(self, direction: str) -> bool:
        """Whether something untimed must come before each call."""
        return direction == "backward" or bool(self.fresh)

    def setup(self, direction: str) -> None:
        """Put back what was overwritten; for backward, make the graph."""
        with torch.no_grad():
            for name, value in self.fresh.items():
                self.plain[name].copy_(value)
        if direction == "backward":
            self.graph = None
            self.graph = self._forward()

    def call(self, direction: str) -> Callable[[], object]:
        """The function of no arguments to be timed."""
        return {"forward": self._infer, "backward": self._backward, "both": self._both}[direction]

    def _infer(self) -> object:
        with torch.no_grad():
            return self.function(**self.plain)

    def _backward(self) -> object:
        assert self.graph is not None
        return self._gradients(*self.graph)

    def _both(self) -> object:
        return self._gradients(*self._forward())

    def _forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """(outputs that carry a gradient, an upstream gradient for each)."""
        out = self.function(**self.tracked)
        carry = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        if self._upstream is None:
            self._upstream = check.upstream(tuple(carry))
        return carry, self._upstream

    def _gradients(self, outputs: list[Tensor], upstream: list[Tensor]) -> object:
        leaves = [self.tracked[n] for n in self.wanted]
        return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)

    def evaluate(self, gradients: bool = True) -> dict[str, Tensor]:
        """Outputs and gradients by name, as `fastlm.check` has them."""
        self.setup("forward")
        return check.evaluate(self.function, self.op, self.plain, self.wanted if gradients else [])

    def peak_bytes(self, direction: str) -> int | None:
        """Memory that a call takes at its height, above what is there before it (for backward: the graph included).

        On a GPU what torch has allocated. On Linux the growth of the process's resident memory, after freed memory was
        handed back: workspaces of C++ code included, in steps of some hundred KB. Elsewhere None.
        """
        measured = [self._peak_bytes(direction) for _ in range(2)]  # the first call may also load code
        self.graph = None
        return None if None in measured else max(0, min(m for m in measured if m is not None))

    def _peak_bytes(self, direction: str) -> int | None:
        run, device = self.call(direction), self.device
        self.setup(direction)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            run()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
        if trim is None or not _REFS.exists():
            return None
        trim(0)
        before = _resident("VmRSS")
        _REFS.write_text("5")  # the high-water mark starts anew
        run()
        return _resident("VmHWM") - before


_REFS = Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    return _kilobytes("/proc/self/status", field)


def available_memory() -> int | None:
    """Bytes that the system can still give; None where it does not say."""
    return _kilobytes("/proc/meminfo", "MemAvailable") if Path("/proc/meminfo").exists() else None


def _kilobytes(path: str, field: str) -> int:
    """The bytes in a line such as "VmRSS:  1234 kB"."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) << 10


def error_ratio(
    values: Mapping[str, Tensor], torch_values: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> float:
    """The largest error of `values` in units of PyTorch's own, over all outputs and gradients that both have.

    Errors are maxima of absolute differences from the exact values, PyTorch's in the same dtype and taken as at least
    the half rounding of the largest element that no result in this dtype can avoid. Infinite for a NaN.
    """
    worst = 0.0
    for name, value in values.items():
        target = exact[name]
        error = check.max_error(value, target)[0]
        finite = target[target.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        unit = max(check.max_error(torch_values[name], target)[0], torch.finfo(value.dtype).eps / 2 * largest)
        worst = max(worst, error / unit if unit > 0 else (math.inf if error > 0 else 0.0))
    return worst
