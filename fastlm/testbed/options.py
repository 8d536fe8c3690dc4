"""The options of `fastlm kernels ...`: dataclasses that the command line turns into flags.

Light to import: no torch. The command of the class `XOptions` is `run` in fastlm/testbed/<x>.py.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

with suppress(ImportError):  # what reads the command line; the options themselves do without
    from tyro.conf import Positional

__all__ = [
    "BenchOptions",
    "CheckOptions",
    "CompileOptions",
    "ExplainOptions",
    "ListOptions",
    "NewOptions",
]

Backend = Literal["reference", "triton", "cpu", "cuda"]
DType = Literal["float32", "bfloat16", "float16"]
Arch = Literal["sm_80", "sm_90", "sm_100", "gfx942"]
Peer = Literal["eager", "compile", "sdpa", "flex", "liger", "cce", "torch-linear-ce"]


@dataclass(frozen=True)
class ListOptions:
    """Lists the ops by backend: there, missing, or why it cannot serve here."""

    json: bool = False
    """A JSON object instead of a table."""


@dataclass(frozen=True)
class CheckOptions:
    """Holds kernels to the op contract: errors against float64 by budget, beside PyTorch's own; exit status 1 on a miss."""

    ops: Positional[tuple[str, ...]] = ()
    """The ops to check; none: all."""
    backend: Backend | None = None
    """Only this backend; default: every one that can serve here."""
    dtype: DType | None = None
    """Only this dtype; default: float32 and bfloat16, on a GPU also float16."""
    file: str | None = None
    """Check the function in `path.py:function`, with the signature of the op's public one, instead of a backend."""
    random: int = 30
    """How many random argument sets to draw beside the op's samples; 0: none."""
    seed: int = 0
    """Seed of the random argument sets."""
    json: bool = False
    """A JSON object a line instead of tables."""


@dataclass(frozen=True)
class CompileOptions:
    """Compiles Triton and CUDA kernels without a GPU and shows registers, spills, instructions; status 1 over a limit."""

    ops: Positional[tuple[str, ...]] = ()
    """The ops to compile; none: all."""
    arch: tuple[Arch, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
    """The GPUs to compile for."""
    max_spill: int = 0
    """Bytes a thread may spill on NVIDIA GPUs."""
    file: str | None = None
    """Compile the kernels in this file (forward and backward of the one op named) instead of kernels/<op>.py."""
    json: Path | None = None
    """Write the table to this file as JSON."""
    against: str | None = None
    """A git revision: show what has changed since."""
    every: bool = False
    """Compile large shapes in every specialisation too: integers that are 1 or a multiple of 16. Takes minutes."""


@dataclass(frozen=True)
class ExplainOptions:
    """Says which backend and tile would run a call, why, and the least time and memory it can take."""

    op: str
    """The op."""
    shape: tuple[str, ...] = ()
    """Dimensions as name=value (rows=8192 columns=4096); the others keep their defaults."""
    dtype: DType = "bfloat16"
    """Of the tensors."""
    device: str = "here"
    """here, or a chip whose peak rates are known: a100, h100, h200, b200, mi300x."""
    json: bool = False
    """A JSON object instead of text."""


@dataclass(frozen=True)
class BenchOptions:
    """Times kernels against their peers, interleaved in one process; refuses what does not pass `check`."""

    ops: Positional[tuple[str, ...]] = ()
    """The ops to time; none: all."""
    against: tuple[Peer, ...] = ("eager", "compile", "sdpa", "flex", "liger", "cce", "torch-linear-ce")
    """The peers; those that are not installed or do not apply are shown as absent."""
    shapes: str = "default"
    """A set of shapes of the op (default, sweep, large), or dimensions: rows=8192,columns=4096."""
    backend: tuple[Backend, ...] = ()
    """The backends of ours to time; none: the one chosen by itself, and on a GPU also the other native one."""
    dtype: tuple[DType, ...] = ("float32", "bfloat16")
    """The dtypes."""
    direction: tuple[Literal["forward", "backward", "both"], ...] = ("forward", "backward", "both")
    """What to time."""
    seconds: float = 1.0
    """Time for each row: ours and all peers together, beside a warm-up of a quarter of it."""
    warm: bool = False
    """Leave the caches as the calls before have left them, instead of flushing them before each call."""
    out: Path | None = None
    """Write results to this JSON file, row by row, with the environment and the command."""
    plot: Path | None = None
    """Draw the results to this file (.png or .svg)."""


@dataclass(frozen=True)
class NewOptions:
    """Writes the op file and the kernel files of a new op, to be filled in; its tests fail until they are right."""

    op: str
    """The name of the op: a Python identifier in lower case."""
    rooms: tuple[Literal["kernels", "cpu"], ...] = ("kernels", "cpu")
    """The kernels to begin beside the op itself: Triton in kernels/, C++ in csrc/cpu/."""
    root: Path = Path(".")
    """The source tree."""
