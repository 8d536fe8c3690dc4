"""Triton's compiler in a process of its own, for GPUs that are not here.

The launchers of a kernel file run on tensors that have no memory (device "meta"), under a driver that answers for a
target, with a launch that compiles and does nothing else. So what is compiled is what would run: tiles, warps, stages
and all that Triton specialises on. Calls are made from the op's `case` at its "default" and "large" shapes and from the
kernel file's own `compile_cases()`, which yields arguments of the op's public function. A kernel compiles again for
every integer that happens to be 1 or a multiple of 16; from the large shapes only what differs in more than that is
taken (constants, dtypes, warps, stages), unless every specialisation is asked for.

A process of its own, because Triton decides at the import of a kernel file whether it interprets, because a compiler
may crash, and because kernels of another revision of the source tree are compiled in the same way: this file runs as
a script and takes `fastlm` from the tree that it is given. It reads requests from stdin and answers on stdout.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Compiler", "CompilerDied"]

# A label, the arguments of the public function, and whether it may be left out where it brings no new configuration.
Call = tuple[str, dict[str, Any], bool]


class CompilerDied(RuntimeError):
    """The compiling process ended before it answered."""


class Compiler:
    """The process, seen from outside. `root`: the source tree, or folder, whose package `fastlm` it imports."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._process: subprocess.Popen[bytes] | None = None
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 (what it says on stderr, as long as this lives)
        self._closed = False

    def compile(self, **request: Any) -> dict[str, Any]:
        """What `compile_op` returns for these arguments. CompilerDied, with its last words, if there is no answer."""
        if self._closed:
            raise CompilerDied("the compiling process was ended")
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._words.seek(0)
        self._words.truncate()
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            status = self._process.wait()
            self._process = None
            self._words.seek(0)
            last = self._words.read().decode(errors="replace").strip().splitlines()[-3:]
            why = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
            raise CompilerDied("; ".join([f"the compiling process {why}", *last])) from None

    def close(self) -> None:
        """End it and what it has started, also in the middle of a compilation and from another thread."""
        self._closed = True
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(self._root), *(p for p in sys.path if p)])
        environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        # -P: the folder of this file is no place to import from. A session: Ctrl-C is for the parent to handle.
        return subprocess.Popen(
            [sys.executable, "-P", __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._words, start_new_session=True,
        )  # fmt: skip


# --- inside the process


class _Driver:
    """Stands in for Triton's GPU driver: answers for a target and never launches."""

    _devices = itertools.count()

    def __init__(self, target: dict[str, Any]) -> None:
        from triton.backends.compiler import GPUTarget

        # Triton keeps what it has compiled by device: a new one each time, so that an answer depends on no other.
        self.device = next(self._devices)
        self.gpu = GPUTarget(target["backend"], target["arch"], target["warp_size"])
        self.properties = {
            "max_shared_mem": target["program_shared"],
            "multiprocessor_count": target["multiprocessors"],
            "warpSize": target["warp_size"],
        }
        self.utils = self

    def get_current_target(self) -> Any:
        return self.gpu

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self.properties


class _Recorder:
    """Takes the place of Triton's launch: compiles, and keeps what came out of it, or why nothing did."""

    def __init__(self) -> None:
        import triton

        self.run = triton.runtime.jit.JITFunction.run
        self.label = ""
        self.kernels: dict[str, dict[str, Any]] = {}
        self.seen: set[tuple[Any, ...]] = set()  # configurations
        self.only_new = False
        self.launches: list[tuple[str, str, str]] = []  # (label of the call, kernel, key in self.kernels)
        self.errors: list[tuple[str, str, str]] = []  # (label of the call, kernel, message)

    def __call__(self, function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """As JITFunction.run. An error does not end the launcher: what it launches next is compiled too."""
        from triton import knobs

        hits: list[bool] = []
        knobs.compilation.listener = lambda **about: hits.append(about["cache_hit"])
        knobs.runtime.jit_cache_hook = self.leave_out
        start = time.perf_counter()
        try:
            kernel = self.run(function, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            self.errors.append((self.label, function.__name__, _message(error)))
            return
        if kernel is None:
            return
        seconds = time.perf_counter() - start
        if kernel.hash not in self.kernels:
            form = "cubin" if "cubin" in kernel.asm else "amdgcn"
            self.kernels[kernel.hash] = {
                "kernel": function.__name__, "symbol": kernel.metadata.name,
                "source": function.__module__.rpartition(".")[2], "configuration": _configuration(kernel.src),
                "warps": kernel.metadata.num_warps, "stages": kernel.metadata.num_stages,
                "shared_bytes": kernel.metadata.shared, "tensor_columns": getattr(kernel.metadata, "tmem_size", 0),
                "seconds": None if any(hits) else seconds, form: kernel.asm[form],
            }  # fmt: skip
        self.launches.append((self.label, function.__name__, kernel.hash))

    def leave_out(self, *, fn: Any, compile: dict[str, Any], **about: Any) -> bool:
        """Triton's question before it compiles."""
        signature, constants = compile["signature"], compile["constants"]
        parts = [compile[option] for option in ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion")]
        constexprs = {p.name for p in fn.jit_function.params if p.is_constexpr}
        for name, path, kind in _arguments(signature):
            value = _constant(constants.get(path))
            one = kind == "constexpr" and name not in constexprs and value == "1"
            parts.append("i32" if one else value if kind == "constexpr" else kind)
        configuration = (fn.module, fn.name, *parts)
        new = configuration not in self.seen
        self.seen.add(configuration)
        return self.only_new and not new


def compile_op(
    op: str, target: dict[str, Any], file: str | None = None, calls: Sequence[Call] | None = None,
    every: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Compile every kernel that an op's launchers start, forward and backward, for a target.

    Args:
        op: its name.
        target: what a launcher may ask: backend, arch, warp_size, program_shared, multiprocessors.
        file: a kernel file with forward and backward, instead of kernels/<op>.py.
        calls: the calls, instead of the op's and the kernel file's own.
        every: every specialisation of the large shapes too.

    Returns:
        calls; kernels by a key of their own; launches (call, kernel, key); errors (call, kernel, message).
    """
    import triton

    record = importlib.import_module("fastlm.registry").get(op)
    recorder = _Recorder()
    answer = {
        "calls": calls or [],
        "kernels": recorder.kernels,
        "launches": recorder.launches,
        "errors": recorder.errors,
    }
    try:
        kernels = _kernel_file(op, file)
        answer["calls"] = calls = list(_calls(record, kernels) if calls is None else calls)
    except Exception as error:
        recorder.errors.append(("", "", _message(error)))
        return answer
    triton.runtime.driver.set_active(_Driver(target))
    triton.runtime.jit.JITFunction.run = lambda *args, **options: recorder(*args, **options)
    try:
        for i, (label, arguments, extra) in enumerate(calls):
            recorder.label, recorder.only_new = label, extra and not every
            try:
                _launch(record, kernels, arguments, recorder, every_gradient=i == 0)
            except Exception as error:
                recorder.errors.append((recorder.label, "", _message(error)))
    finally:
        triton.runtime.jit.JITFunction.run = recorder.run
    return answer


def _kernel_file(op: str, file: str | None) -> Any:
    if file is None:
        return importlib.import_module(f"fastlm.kernels.{op}")
    # Named as if it lay in kernels/, so that a copy of a file of ours finds its neighbours.
    spec = importlib.util.spec_from_file_location(f"fastlm.kernels._{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _calls(op: Any, kernels: Any) -> Iterator[Call]:
    for shapes in ("default", "large"):
        for dimensions in op.shapes.get(shapes, ()):
            for dtype in (torch.bfloat16, torch.float32):
                named = " ".join(f"{k}={v}" for k, v in dimensions.items())
                yield (
                    f"{shapes} {_short(dtype)} {named}",
                    op.case(**dimensions).build(dtype, "meta"),
                    shapes == "large",
                )
    for case in kernels.compile_cases() if hasattr(kernels, "compile_cases") else ():
        yield ", ".join(f"{k}={_describe(v)}" for k, v in case.items()), case, False


def _launch(op: Any, kernels: Any, case: dict[str, Any], recorder: _Recorder, every_gradient: bool) -> None:
    """Run the launchers of forward and backward for a call of the public function.

    every_gradient: also for each choice of outputs that have a gradient and of inputs that need one.
    """
    meta = torch.device("meta")

    class Tape:
        def forward(self, record: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            out = tuple(spec.empty(meta) for spec in record.outputs(*args))
            if record is op:
                kernels.forward(*args, *out)
                if op.gradients is not None and hasattr(kernels, "backward"):
                    self.backward(args, out)
            return out[: record.returned]

        def backward(self, args: tuple[Any, ...], out: tuple[Any, ...]) -> None:
            saved, options = op.pick_saved(args, out)
            named = [n for n, there in zip(op.grads, op.wanted(args, options), strict=True) if there]
            label = recorder.label
            for have in _choices(range(op.results)) if every_gradient else [tuple(range(op.results))]:
                upstream = [
                    torch.empty_like(o) if i in have else None for i, o in enumerate(out[: op.results])
                ]
                for want in _choices(named) if every_gradient else [tuple(named)]:
                    if len(have) < op.results or len(want) < len(named):
                        recorder.label = f"{label}, from {have} to {', '.join(want)}"
                    needs = tuple(n in want for n in op.grads)
                    call = (*upstream, *saved, *options)
                    specs = zip(op.gradients(*call, needs), needs, strict=True)
                    kernels.backward(*call, *(spec.empty(meta) if need else None for spec, need in specs))
                    recorder.label = label

    op.function(**case, tape=Tape())


def _choices(of: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Every choice of at least one, all of them first."""
    return [c for n in range(len(of), 0, -1) for c in itertools.combinations(of, n)]


def _configuration(src: Any) -> dict[str, str]:
    """By argument, in order: a dtype (16* if known to be a multiple of 16, or aligned to it) or a constant."""
    sixteens = {path for path, attributes in src.attrs.items() if ["tt.divisibility", 16] in attributes}
    found = {}
    for name, path, kind in _arguments(src.signature):
        if path in src.constants:
            found[name] = _constant(src.constants[path])
        elif kind.startswith("*"):
            found[name] = kind if path in sixteens else f"{kind} unaligned"
        else:
            found[name] = f"16*{kind}" if path in sixteens else kind
    return found


def _arguments(signature: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, place, type) of each argument of a kernel; a member of a tuple is an argument of its own: `rows.stride`."""

    def members(name: str, path: tuple[int, ...], kind: Any) -> Iterator[tuple[str, tuple[int, ...], str]]:
        if not isinstance(kind, tuple):
            yield name, path, str(kind)
            return
        fields = getattr(kind, "_fields", range(len(kind)))
        for i, (field, member) in enumerate(zip(fields, kind, strict=True)):
            yield from members(f"{name}.{field}", (*path, i), member)

    for i, (name, kind) in enumerate(signature.items()):
        yield from members(name, (i,), kind)


def _constant(value: Any) -> str:
    return str(getattr(value, "value", value))


def _describe(value: Any) -> str:
    return f"{_short(value.dtype)}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _message(error: BaseException) -> str:
    """Its kind and text; of a Triton error the innermost reason and line, without the listing of the source."""
    while type(error).__name__ == "CompilationError" and error.__cause__ is not None:
        error = error.__cause__
    line = getattr(getattr(error, "node", None), "lineno", None)
    reason = getattr(error, "error_message", None) or str(error)
    text = f"in line {line} of the kernel: {reason}" if line is not None else reason
    return f"{type(error).__name__}: {' '.join(text.split())[:400]}"


def _serve() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel file prints must not get among the answers
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(compile_op(**request), answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
