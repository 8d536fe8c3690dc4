"""`fastlm kernels check`: the op contract on the op's samples and on random arguments, as a table and an exit status.

For every tensor the worst of all calls is shown: its maximum error against float64, the RMS error, PyTorch's own maximum
error in the same dtype, their ratio, the share of the budget (fastlm/check.py) and where in the tensor.

A function from anybody's file is held to the same contract: the ladder from a naive kernel to a fast one. If its result
carries no gradients (a kernel whose backward is not written yet), only its outputs are checked, and the verdict says so.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, check, registry
from ..check import Comparison
from ..registry import Op
from ..samples import Sample
from ..train.config import OptionError
from .options import CheckOptions

__all__ = ["Report", "check_kernel", "device_of", "each_random", "load_function", "run"]


# Random arguments look for wrong masks, strides and shapes. They include tensors of few elements, in which PyTorch may by
# luck be exact or the exact result small: their budget allows for more roundings and, where one draw does not do, is that
# of several.
_DRAWS, _ROUNDINGS = 3, 4.0


@dataclasses.dataclass
class Report:
    """What became of one op on one backend in one dtype."""

    op: str
    backend: str  # or the function's name
    dtype: torch.dtype
    worst: dict[str, tuple[Comparison, Sample]] = dataclasses.field(default_factory=dict)  # by tensor
    calls: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.calls > 0 and not self.failures

    def add(self, rows: Sequence[Comparison], sample: Sample) -> None:
        self.calls += 1
        for row in rows:
            if row.name not in self.worst or not _share(row) <= _share(self.worst[row.name][0]):
                self.worst[row.name] = row, sample

    def rows(self) -> list[dict[str, Any]]:
        """A JSON object for each tensor."""
        common = {"op": self.op, "backend": self.backend, "dtype": _short(self.dtype), "calls": self.calls}
        return [
            common
            | {
                "tensor": name,
                "max_error": _json(row.error),
                "rms_error": _json(row.rms),
                "pytorch_max_error": _json(row.peer_error),
                "ratio": _json(_ratio(row)),
                "budget_share": _json(_share(row)),
                "at": list(row.worst),
                "sample": sample.edge,
            }
            for name, (row, sample) in self.worst.items()
        ]

    def __str__(self) -> str:
        head = f"{self.op} on {self.backend} in {_short(self.dtype)}, {self.calls} calls"
        lines = [
            f"{head}: {'passes' if self.ok else 'FAILS'}{f' ({self.note})' if self.note else ''}",
            f"  {'tensor':18} {'max error':>10} {'RMS error':>10} {'PyTorch':>10} {'ratio':>6} {'of budget':>9}  worst",
        ]
        for name, (row, sample) in self.worst.items():
            lines.append(
                f"  {name:18} {row.error:10.3g} {row.rms:10.3g} {row.peer_error:10.3g} {_ratio(row):6.2f} "
                f"{_share(row):9.1%}  {row.worst} of {sample.edge!r}"
            )
        lines += [f"  FAILS: {failure}" for failure in self.failures]
        return "\n".join(lines)


def check_kernel(
    op: Op, backend: str | None, dtype: torch.dtype, device: str = "cpu",
    function: Callable[..., Any] | None = None, random: int = 0, seed: int = 0,
) -> Report:  # fmt: skip
    """The whole contract for a backend, or for `function` of the public function's signature. Never raises for a miss.

    Args:
        random: how many random argument sets to draw with hypothesis, which shrinks one that fails.
        seed: of the random sets.
    """
    report = Report(op.name, str(backend or getattr(function, "__name__", "function")), dtype)
    if function is not None and op.grads and not _carries_gradients(function, op, dtype, device):
        op = dataclasses.replace(op, grads=(), shared=(), accumulates=(), backward=None)
        report.note = "outputs only: the result carries no gradients"

    def measured(sample: Sample, draws: int = 1, roundings: float = 1.0) -> None:
        each: list[list[check.Comparison]] = []
        rows: list[check.Comparison] = []
        while len(each) < draws and not (each and all(row.ok for row in rows)):
            each.append(check.measure(op, sample, dtype, backend, device, len(each), function, roundings))
            rows = [check.worst_of(same) for same in zip(*each, strict=True)]
        report.add(rows, sample)
        missed = [str(row) for row in rows if not row.ok]
        assert not missed, "; ".join(missed)

    def held(test: Callable[..., object]) -> Callable[[Sample], object]:
        return lambda sample: test(op, sample, dtype, backend, device, function)

    plan = [
        ("errors", measured, op.samples),
        ("repeat", held(check.check_repeatable), op.samples),
        ("layouts", held(check.check_layouts), op.samples[:2]),
    ]
    if op.grads:
        plan.append(("requires_grad", held(check.check_requires_grad), op.samples[:2]))
    if op.grads and function is None:  # a plain function takes no tape
        accumulates = partial(check.check_accumulation, op, dtype=dtype, backend=backend, device=device)
        plan.append(("accumulation", accumulates, op.samples[:2]))
    for name, test, samples in plan:
        for sample in samples:
            try:
                test(sample)
            except Exception as error:  # a kernel may fail in any way; the other checks still run
                report.failures.append(f"{name} of {sample}: {_say(error)}")
    if random:
        try:
            each_random(op, random, seed, partial(measured, draws=_DRAWS, roundings=_ROUNDINGS))
        except Exception as error:
            notes = [n for n in getattr(error, "__notes__", ()) if n.startswith("Sample(")]
            report.failures.append(f"errors of random arguments {' '.join(notes)}: {_say(error)}")
    return report


def each_random(op: Op, count: int, seed: int, test: Callable[[Sample], None]) -> None:
    """Call `test` on `count` random samples; one that fails is shrunk and its simplest form's error raised."""
    import hypothesis
    from hypothesis import strategies as st

    class Choices:
        def __init__(self, data: Any) -> None:
            self.draw = data.draw

        def integer(self, low: int, high: int) -> int:
            return int(self.draw(st.integers(low, high)))

        def real(self, low: float, high: float) -> float:
            return float(self.draw(st.floats(low, high, exclude_max=True, allow_subnormal=False)))

        def one_of(self, *choices: Any) -> Any:
            return choices[self.draw(st.integers(0, len(choices) - 1))]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, deadline=None, database=None, report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck), verbosity=hypothesis.Verbosity.quiet,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )  # fmt: skip
    @hypothesis.given(st.data())
    def each(data: Any) -> None:
        sample = op.random(Choices(data))
        try:
            test(sample)
        except Exception as error:
            error.add_note(repr(sample))
            raise

    each()


def load_function(where: str) -> Callable[..., Any]:
    """The function in `path.py:function`."""
    path, _, name = where.rpartition(":")
    allowed = "path.py:function, a function in a Python file"
    if not path or not Path(path).is_file():
        raise OptionError("file", where, allowed)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where Triton and dataclasses look for a function's file
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    found = getattr(module, name, None)
    if not callable(found):
        there = ", ".join(n for n, f in inspect.getmembers(module, callable) if f.__module__ == spec.name)
        raise OptionError("file", where, f"{allowed}; {path} has {there or 'none'}")
    return found


def device_of(backend: str | None) -> str:
    """Where a backend is checked: on the GPU if it runs there."""
    return "cuda" if backend in (None, "triton", "cuda") and torch.cuda.is_available() else "cpu"


class _Plan(NamedTuple):
    op: Op
    backend: str | None
    dtype: torch.dtype
    device: str


def run(options: CheckOptions) -> int:
    """The command. Status 0: all pass; 1: one does not, or nothing could be checked."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    ops = _named(options.ops)
    if options.random < 0:
        raise OptionError("random", options.random, "0 and more")
    if options.random and importlib.util.find_spec("hypothesis") is None:
        raise OptionError("random", options.random, "0, as the package hypothesis, which draws them, is not installed")
    function = None
    if options.file is not None:
        if len(ops) != 1 or not options.ops or options.backend is not None:
            raise OptionError("file", options.file, "one op, which the function computes, and no --backend")
        function = load_function(options.file)
    reports = []
    for plan in _plans(ops, options, function):
        report = check_kernel(*plan, function, options.random, options.seed)
        reports.append(report)
        if options.json:
            for row in report.rows():
                print(json.dumps(row), flush=True)
            print(json.dumps({"op": plan.op.name, "backend": report.backend, "dtype": _short(plan.dtype),
                              "ok": report.ok, "note": report.note, "failures": report.failures}), flush=True)  # fmt: skip
        else:
            print(report, flush=True)
    failed = [f"{r.op} on {r.backend} in {_short(r.dtype)}" for r in reports if not r.ok]
    if not options.json:
        print(
            f"{len(reports) - len(failed)} of {len(reports)} pass"
            + "".join(f"\n  FAILS: {f}" for f in failed)
        )
        if not torch.cuda.is_available() and any(r.backend == "triton" for r in reports):
            print("there is no GPU: triton ran in Triton's interpreter, which shows neither races nor speed")
    return 0 if reports and not failed else 1


def _plans(ops: Sequence[Op], options: CheckOptions, function: Any) -> Iterator[_Plan]:
    """What to check; a backend that cannot serve is named, and is an error if it was asked for."""
    asked = getattr(torch, options.dtype) if options.dtype else None
    for op in ops:
        for backend in (None,) if function else (options.backend,) if options.backend else backends.BACKENDS:
            device = device_of(backend)
            for dtype in (asked,) if asked else _dtypes(device):
                like = torch.empty(1, device=device, dtype=dtype)
                if backend and (why := backends.why_not(op, backend, [like])):
                    if options.backend:
                        raise backends.BackendError(f"{op.name}: {backend} cannot serve: {why}")
                    continue
                yield _Plan(op, backend, dtype, device)


def _dtypes(device: str) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.bfloat16, *((torch.float16,) if device == "cuda" else ()))


def _named(names: Sequence[str]) -> list[Op]:
    known = registry.ops()
    for name in names:
        if name not in known:
            raise OptionError("ops", name, ", ".join(known))
    return [known[name] for name in names or known]


def _carries_gradients(function: Callable[..., Any], op: Op, dtype: torch.dtype, device: str) -> bool:
    args = op.samples[0].build(dtype, device)
    for name in check.differentiable(op, args):
        args[name].requires_grad_()
    try:
        out = function(**args)
    except Exception:
        return True  # the checks say what is wrong
    return any(isinstance(o, Tensor) and o.requires_grad for o in (out if isinstance(out, tuple) else (out,)))


def _say(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


def _share(row: Comparison) -> float:
    """Of the budget; 0 errors within a budget of 0 are none of it."""
    return row.error / row.limit if row.limit else (0.0 if row.error == 0.0 else float("inf"))


def _ratio(row: Comparison) -> float:
    return row.error / row.peer_error if row.peer_error else (1.0 if row.error == 0.0 else float("inf"))


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
