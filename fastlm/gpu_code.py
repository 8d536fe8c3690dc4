"""Compile the Triton kernels for GPUs that are not here, and read what the compiler made of them.

    python -m fastlm.gpu_code [op ...] [--target sm_90]

A kernel file says in `compile_cases()` with which arguments its op's public function is called at real sizes
(if it does not, the op's first sample is taken, small as it is). The launchers themselves then run on those
arguments, with tensors that have no memory (device "meta") and a launch that compiles and does nothing else.
So what is compiled is what would run: tiles, warps, stages and all that Triton specialises on.

It must run in a process without TRITON_INTERPRET. Needs no GPU; the assembler and cuobjdump come with Triton.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import registry
from .registry import Op

__all__ = ["TARGETS", "Code", "Target", "compile_op", "ops_with_kernels"]


class Target(NamedTuple):
    """A GPU to compile for: what a launcher may ask about it."""

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int  # that one program may use
    multiprocessors: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10, 108),  # A100
    "sm_90": Target("cuda", 90, 32, 227 << 10, 132),  # H100
    "sm_100": Target("cuda", 100, 32, 227 << 10, 148),  # B200
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, 304),  # MI300X
}


class Code(NamedTuple):
    """One kernel as compiled for one target."""

    op: str
    kernel: str
    case: str  # the arguments of the public function
    real_size: bool  # they come from compile_cases()
    target: str
    registers: int  # of a thread
    spill_bytes: int  # of a thread: its stack and local memory; on AMD 4 for each spilled register
    shared_bytes: int  # of a program
    warps: int
    stages: int

    @property
    def fault(self) -> str:
        """Why it must not be shipped; "" if it may. Spills on AMD are shown, not judged."""
        target = TARGETS[self.target]
        if self.shared_bytes > target.shared_bytes:
            return (
                f"needs {self.shared_bytes} bytes of shared memory, {self.target} has {target.shared_bytes}"
            )
        if self.spill_bytes and self.real_size and target.backend == "cuda":
            return f"spills {self.spill_bytes} bytes"
        return ""


class _Driver:
    """Stands in for Triton's GPU driver: answers for a target and never launches."""

    def __init__(self, name: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = TARGETS[name]
        self.gpu = GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)
        self.index = list(TARGETS).index(name)  # Triton keeps what it has compiled by device
        self.utils = self

    def get_current_target(self) -> Any:
        return self.gpu

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_properties(self, device: int) -> dict[str, int]:
        target = self.target
        return {
            "max_shared_mem": target.shared_bytes,
            "multiprocessor_count": target.multiprocessors,
            "warpSize": target.warp_size,
        }


@contextmanager
def _compiling(name: str, seen: Callable[[Any, Any], None]) -> Iterator[None]:
    """Launches inside compile for the target and hand (function, kernel) to `seen`; nothing runs."""
    import triton
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen(self, kernel)
        return kernel

    triton.runtime.driver.set_active(_Driver(name))
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = None


def ops_with_kernels() -> list[str]:
    """Names of the ops that have a file in kernels/."""
    folder = Path(__file__).parent / "kernels"
    return [name for name in registry.ops() if (folder / f"{name}.py").exists()]


def compile_op(name: str, target: str) -> list[Code]:
    """Every kernel that an op's launchers start on its cases, forward and backward, compiled for a target.

    Raises whatever Triton raises if one does not compile.
    """
    op, kernels = registry.get(name), importlib.import_module(f"fastlm.kernels.{name}")
    real = hasattr(kernels, "compile_cases")
    dtypes = (torch.bfloat16, torch.float32)
    cases = kernels.compile_cases() if real else (op.samples[0].build(dtype, "meta") for dtype in dtypes)
    codes: dict[str, Code] = {}
    for case in cases:
        label = ", ".join(f"{k}={_describe(v)}" for k, v in case.items())

        def seen(function: Any, kernel: Any, label: str = label) -> None:
            if kernel.hash not in codes:
                codes[kernel.hash] = _read(name, function.__name__, kernel, label, real, target)

        with _compiling(target, seen):
            _launch(op, kernels, case)
    return list(codes.values())


def _launch(op: Op, kernels: Any, case: dict[str, Any]) -> None:
    """Run the launchers of forward and backward for a call of the public function."""
    meta = torch.device("meta")

    class Tape:
        def forward(self, record: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
            out = tuple(spec.empty(meta) for spec in record.outputs(*args))
            if record is not op:
                return out[: record.results]
            kernels.forward(*args, *out)
            if op.gradients is not None:
                saved, options = op.pick_saved(args, out)
                given = dict(zip((n for n, _, _ in op.arguments), args, strict=True))
                needs = tuple(isinstance(given[n], Tensor) for n in op.grads)
                call = (*(torch.empty_like(o) for o in out[: op.results]), *saved, *options)
                wanted = zip(op.gradients(*call, needs), needs, strict=True)
                kernels.backward(*call, *(spec.empty(meta) if need else None for spec, need in wanted))
            return out[: op.results]

    op.function(**case, tape=Tape())


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _read(op: str, name: str, kernel: Any, case: str, real: bool, target: str) -> Code:
    meta = kernel.metadata
    registers, spill = _nvidia(kernel.asm["cubin"]) if "cubin" in kernel.asm else _amd(kernel.asm["amdgcn"])
    return Code(op, name, case, real, target, registers, spill, meta.shared, meta.num_warps, meta.num_stages)


def _nvidia(cubin: bytes) -> tuple[int, int]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd(assembly: str) -> tuple[int, int]:
    count = {key: int(value) for key, value in re.findall(r"\.([sv]gpr(?:_spill)?_count): +(\d+)", assembly)}
    return count["vgpr_count"], 4 * (count["vgpr_spill_count"] + count["sgpr_spill_count"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what became of each kernel; status 1 if one does not compile or must not be shipped."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m fastlm.gpu_code", description=about)
    parser.add_argument("ops", nargs="*", metavar="op", help="default: every op that has Triton kernels")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--json", action="store_true", help="a JSON object a line instead of text")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled")
    good = True
    for name, target in itertools.product(options.ops or ops_with_kernels(), options.target or TARGETS):
        try:
            codes = compile_op(name, target)
        except Exception as error:  # one kernel that does not compile must not hide the others
            good, why = False, f"{type(error).__name__}: {error}"
            traceback.print_exc()
            failed = {"op": name, "target": target, "error": why}
            print(json.dumps(failed) if options.json else f"{name} for {target}: {why}", flush=True)
            continue
        good = good and not any(code.fault for code in codes)
        if options.json:
            for code in codes:
                print(json.dumps(code._asdict()), flush=True)
        else:
            for case, group in itertools.groupby(codes, lambda code: code.case):
                print(f"{name} for {target}: {case}", *map(_line, group), sep="\n  ", flush=True)
    return 0 if good else 1


def _line(code: Code) -> str:
    return (
        f"{code.kernel:22} {code.registers:3} registers, {code.spill_bytes:3} bytes spilled, "
        f"{code.shared_bytes:6} shared, {code.warps:2} warps, {code.stages} stages"
    ) + (f": {code.fault.upper()}" if code.fault else "")


if __name__ == "__main__":
    sys.exit(main())
