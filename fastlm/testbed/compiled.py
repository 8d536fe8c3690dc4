"""The kernels of a source tree, compiled: a row for each kernel and configuration, two compilers at a time."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import Any, NamedTuple

from . import cuda_code
from .gpu_code import Compiler, CompilerDied
from .machine_code import Usage, read_amdgcn, read_cubins
from .targets import TARGETS, Target, occupancy

__all__ = ["Group", "Job", "Row", "compile_jobs"]

_PROCESSES = 2


@dataclass(frozen=True)
class Row:
    """A kernel in one configuration, compiled for one GPU. Zeros and None where it does not compile."""

    op: str
    target: str
    language: str  # "triton" or "cuda"
    kernel: str
    configuration: Mapping[
        str, str
    ]  # arguments by name: dtypes and constants; of CUDA C++ the template arguments
    calls: Sequence[str]  # of the public function, that launch it
    source: str = ""  # the file without its ending: layer_norm for kernels/layer_norm.py
    error: str = ""  # what the compiler said
    registers: int = 0  # of a thread
    spill_bytes: int = 0  # of a thread
    shared_bytes: int = 0  # of a program
    warps: int = 0  # of a program; 0: decided at the launch
    stages: int | None = None
    instructions: int = 0
    tensor_core: int = 0
    warpgroup: int = 0
    local_memory: int = 0
    wide: int = 0
    narrow: int = 0
    resident_warps: int | None = None  # of a multiprocessor, at most
    bound: str | None = None  # what forbids more
    seconds: float | None = (
        None  # to compile; None if it came from a cache, or for CUDA C++, from a larger file
    )

    def fault(self, max_spill: int) -> str:
        """Why it must not be shipped; "" if it may. Spills on AMD are shown, not judged."""
        target = TARGETS[self.target]
        if self.error:
            return f"does not compile: {self.error}"
        faults = []
        if target.backend == "cuda" and self.spill_bytes > max_spill:
            faults.append(f"spills {self.spill_bytes} bytes a thread, {max_spill} allowed")
        if self.shared_bytes > target.program_shared:
            faults.append(
                f"needs {self.shared_bytes} bytes of shared memory, {self.target} has {target.program_shared}"
            )
        return "; ".join(faults)

    def as_json(self, max_spill: int) -> dict[str, Any]:
        """Its fields and its fault, as plain values."""
        return dataclasses.asdict(self) | {"fault": self.fault(max_spill)}


class Job(NamedTuple):
    """What is compiled at once: the kernels of an op in a language, for a GPU."""

    op: str
    target: str
    language: str
    file: str | None = None  # of Triton: instead of kernels/<op>.py
    calls: Sequence[Any] | None = None  # of Triton: instead of those that the op and the kernel file name
    every: bool = False


class Group(NamedTuple):
    """What became of a job."""

    job: Job
    rows: list[Row]
    launches: dict[
        tuple[str, str, int], Row
    ]  # by call, kernel, and how often the call had launched it before
    calls: Sequence[Any]
    seconds: float


def compile_jobs(root: Path, jobs: Sequence[Job], flags_of: Path) -> Generator[Group, None, None]:
    """Compile kernels of the source tree at `root`, CUDA C++ with the flags of the tree `flags_of`; in order."""
    compilers = [Compiler(root) for _ in range(_PROCESSES)]
    idle: SimpleQueue[Compiler] = SimpleQueue()
    for compiler in compilers:
        idle.put(compiler)

    def do(job: Job) -> Group:
        if job.language == "cuda":
            return _cuda(job, cuda_code.sources(root)[job.op], flags_of)
        compiler = idle.get()
        try:
            return _triton(job, compiler)
        finally:
            idle.put(compiler)

    pool = ThreadPoolExecutor(_PROCESSES)
    try:
        yield from pool.map(do, jobs)
    finally:  # also when interrupted
        pool.shutdown(wait=False, cancel_futures=True)
        for compiler in compilers:
            compiler.close()
        pool.shutdown()


def _triton(job: Job, compiler: Compiler) -> Group:
    start = perf_counter()
    target = TARGETS[job.target]
    asked = {"backend": target.backend, "arch": target.arch, "warp_size": target.warp_size,
             "program_shared": target.program_shared, "multiprocessors": target.multiprocessors}  # fmt: skip
    try:
        answer = compiler.compile(op=job.op, target=asked, file=job.file, calls=job.calls, every=job.every)
    except CompilerDied as error:
        row = Row(job.op, job.target, "triton", "", {}, [], error=str(error))
        return Group(job, [row], {}, job.calls or [], perf_counter() - start)
    kernels = answer["kernels"]
    rows = {}
    for (key, kernel), usage in zip(kernels.items(), _usages(list(kernels.values()), target), strict=True):
        calls = dict.fromkeys(call for call, _, reached in answer["launches"] if reached == key)
        rows[key] = _row(
            job, kernel["kernel"], kernel["configuration"], list(calls), usage, kernel["shared_bytes"],
            kernel["warps"], kernel["tensor_columns"], source=kernel["source"], stages=kernel["stages"],
            seconds=kernel["seconds"],
        )  # fmt: skip
    launches: dict[tuple[str, str, int], Row] = {}
    before: Counter[tuple[str, str]] = Counter()
    for call, name, key in answer["launches"]:
        launches[call, name, before[call, name]] = rows[key]
        before[call, name] += 1
    failed: dict[tuple[str, str], list[str]] = {}
    for call, name, message in answer["errors"]:
        failed.setdefault((name, message), []).append(call)
    broken = [
        Row(job.op, job.target, "triton", n, {}, calls, error=why) for (n, why), calls in failed.items()
    ]
    return Group(job, [*rows.values(), *broken], launches, answer["calls"], perf_counter() - start)


def _usages(kernels: Sequence[Mapping[str, Any]], target: Target) -> list[Usage]:
    if isinstance(target.arch, str):
        return [read_amdgcn(kernel["amdgcn"]) for kernel in kernels]
    found = read_cubins([kernel["cubin"] for kernel in kernels], target.arch)
    return [usages[kernel["symbol"]] for kernel, usages in zip(kernels, found, strict=True)]


def _cuda(job: Job, source: Path, flags_of: Path) -> Group:
    start = perf_counter()
    arch = TARGETS[job.target].arch
    assert isinstance(arch, int)
    found = cuda_code.compile_source(source, arch, flags_of)
    rows = []
    if isinstance(found, cuda_code.Failed):
        rows.append(Row(job.op, job.target, "cuda", source.name, {}, [], error=found.message))
        found = {}
    for name, usage in found.items():
        kernel, _, arguments = name.removesuffix(">").partition("<")
        short = arguments.replace("__nv_bfloat16", "bf16").replace("__half", "fp16").replace("float", "fp32")
        configuration = {f"<{i}>": value for i, value in enumerate(re.split(r", ", short)) if value}
        warps = -(-usage.threads // TARGETS[job.target].warp_size)
        rows.append(
            _row(job, kernel, configuration, [], usage, usage.shared_bytes, warps, source=source.stem)
        )
    return Group(job, rows, {}, [], perf_counter() - start)


def _row(
    job: Job, kernel: str, configuration: Mapping[str, str], calls: Sequence[str], usage: Usage, shared: int,
    warps: int, tensor_columns: int = 0, **more: Any,
) -> Row:  # fmt: skip
    bound = (
        occupancy(TARGETS[job.target], warps, usage.registers, shared, tensor_columns)
        if warps
        else (None, None)
    )
    return Row(
        job.op, job.target, job.language, kernel, configuration, calls, registers=usage.registers,
        spill_bytes=usage.spill_bytes, shared_bytes=shared, warps=warps, instructions=usage.instructions,
        tensor_core=usage.tensor_core, warpgroup=usage.warpgroup, local_memory=usage.local_memory, wide=usage.wide,
        narrow=usage.narrow, resident_warps=bound[0], bound=bound[1], **more,
    )  # fmt: skip
