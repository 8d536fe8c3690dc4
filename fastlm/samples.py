"""Arguments to run an op on: the samples it is tested on, random ones, and cases of real size.

A sample says of each tensor how it is drawn, not its values, so that it costs nothing until it is built, and can be
built in any dtype, on any device, or without memory (device "meta") for what needs shapes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["Bad", "Integers", "Normal", "Pick", "Sample", "Values"]

T = TypeVar("T")


@dataclass(frozen=True)
class Normal:
    """A floating-point tensor drawn from N(shift, scale**2); dtype None means the test's."""

    shape: tuple[int, ...]
    scale: float = 1.0
    shift: float = 0.0
    dtype: torch.dtype | None = None

    def draw(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return (x * self.scale + self.shift).to(self.dtype or dtype)

    def placeholder(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype or dtype, device="meta")


@dataclass(frozen=True)
class Integers:
    """An integer tensor, uniform in [low, high)."""

    shape: tuple[int, ...]
    low: int
    high: int
    dtype: torch.dtype = torch.int64

    def draw(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return torch.randint(self.low, self.high, self.shape, generator=generator, dtype=self.dtype)

    def placeholder(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Values:
    """A tensor of given values; dtype None means the test's floating-point dtype."""

    values: Any
    dtype: torch.dtype | None = None

    def draw(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return torch.tensor(self.values, dtype=self.dtype or dtype)

    def placeholder(self, dtype: torch.dtype) -> Tensor:
        return torch.tensor(self.values, dtype=self.dtype or dtype, device="meta")


class Sample:
    """Arguments of the public function; `edge` is the number and name of the edge case in the op's docstring."""

    def __init__(self, edge: str, **args: Any) -> None:
        self.edge, self.args = edge, args

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join([repr(self.edge), *(f'{k}={v}' for k, v in self.args.items())])})"

    def build(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """The arguments with every tensor drawn; the same values for every dtype, rounded to it.

        On the device "meta" nothing is drawn.
        """
        generator = torch.Generator().manual_seed(seed)
        built = dict(self.args)
        for name, value in built.items():
            if isinstance(value, (Normal, Integers, Values)):
                on_meta = torch.device(device).type == "meta"
                built[name] = value.placeholder(dtype) if on_meta else value.draw(generator, dtype).to(device)
        return built


class Bad(Sample):
    """Arguments that must raise `error` with `text` (a regular expression) in its message."""

    def __init__(self, edge: str, error: type[Exception], text: str, **args: Any) -> None:
        super().__init__(edge, **args)
        self.error, self.text = error, text


class Pick(Protocol):
    """Makes the choices of an op's `random`: hypothesis in the tests, so that a failure shrinks to its simplest form."""

    def integer(self, low: int, high: int) -> int:
        """One of low, ..., high."""
        ...

    def real(self, low: float, high: float) -> float:
        """A finite number in [low, high]."""
        ...

    def one_of(self, *choices: T) -> T:
        """One of the choices, of which the first is the simplest."""
        ...
