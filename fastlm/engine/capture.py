"""A step written down on a CPU as the calls that it made, to be made again without the Python in between.

The counterpart of a CUDA graph: on tensors that stay where they are, a step of one shape makes the same calls every time.
Between its kernels Python takes a few percent of a small model's step, more than it takes alone: its code and data have left
the caches each time, and the other threads have gone to sleep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .. import native

__all__ = ["CallList", "capture"]

_MOST = 1 << 20  # bytes that PyTorch's operations may make: what is made beside the arena is kept from step to step
_FACTORIES = {torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like, torch.ops.aten.new_empty}
_READS = ("tolist", "numpy", "__array__", "__dlpack__")  # of a tensor's values, which no operation is
_VALUE_SHAPES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class CallList:
    """The calls of a step. refused: why it cannot be replayed; "" if it can."""

    def __init__(self) -> None:
        self.refused = ""
        self._calls: list[tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any]]] = []
        self._kept: list[Tensor] = []  # whose addresses are among the arguments
        self._made = 0

    def add(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *tensors: Tensor) -> None:
        """Note a call; the tensors are those that the arguments only hold the addresses of."""
        if self.refused:
            return
        self._calls.append((function, args, kwargs))
        self._kept += tensors

    def add_made(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], made: Any) -> None:
        """Note a call that makes tensors: the next time their values come to where these lie."""
        tensors = [t for t in (made if isinstance(made, (tuple, list)) else (made,)) if isinstance(t, Tensor)]
        self._made += sum(t.untyped_storage().nbytes() for t in tensors)
        if self._made > _MOST:
            self.refuse(f"PyTorch's operations make more than {_MOST} bytes of tensors in it, the last of them {function}")
        elif getattr(function, "overloadpacket", None) in _FACTORIES:
            self._kept += tensors
        else:

            def again(*args: Any, **kwargs: Any) -> None:
                new = function(*args, **kwargs)
                for t, value in zip(tensors, new if isinstance(new, (tuple, list)) else (new,), strict=True):
                    t.copy_(value)

            self.add(again, args, kwargs)

    def refuse(self, why: str) -> None:
        """The step cannot be replayed."""
        self.refused = self.refused or why
        self._calls, self._kept = [], []

    def __len__(self) -> int:
        return len(self._calls)

    def replay(self) -> None:
        """Make the calls again, on the tensors where they were made first."""
        try:
            for function, args, kwargs in self._calls:
                function(*args, **kwargs)
        except BaseException:
            native.lend_nothing()
            raise


class _Torch(TorchDispatchMode):
    """Notes PyTorch's operations."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else PyTorch loads its compiler, 146 MiB, to keep it away from here."""
        return False

    def __init__(self, calls: CallList) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        calls = self._calls
        if calls.refused:
            return out
        written = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
        if _VALUE_SHAPES & set(func.tags):
            calls.refuse(f"what it does depends on the values of tensors ({func})")
        elif any(written):
            calls.add(func, args, kwargs)
        elif not any(r.alias_info is not None for r in func._schema.returns):  # no view
            calls.add_made(func, args, kwargs, out)
        return out


class _Reads(TorchFunctionMode):
    """Notices values that Python gets without an operation."""

    def __init__(self, calls: CallList) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if (name := getattr(func, "__name__", "")) in _READS:
            self._calls.refuse(f"what it does depends on the values of tensors ({name})")
        return func(*args, **(kwargs or {}))


def capture(step: Callable[[], None]) -> CallList:
    """Take a step, and return the calls that it made."""
    calls = CallList()
    with native.noting(calls.add), _Reads(calls), _Torch(calls):
        step()
    return calls
