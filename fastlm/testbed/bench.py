"""`fastlm kernels bench`: times ours and its peers side by side, and refuses to time what is wrong.

For each op, dtype and backend: the contract's budget check on the op's samples, then for each shape the same check on
the data to be timed. What does not pass is named and not timed; the others still are, and the exit status is 1. Where
float64 would take too long at that size, the check is of the largest of its dimensions halved until it does not; the
row then says at which ("checked").

One row for each op, dimensions, dtype, backend and direction: see `_Row`. Times are medians of interleaved samples
(timing.py), memory is that of a call of its own (contender.py), the roof is measured beside each shape (roof.py).
Bytes and operations are those that the op has to move and do (Op.cost), whatever a candidate really does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, check
from ..registry import Op
from ..train.config import OptionError
from . import bench_report, peers, roof
from .contender import DIRECTIONS, Contender, available_memory, error_ratio, schema_arguments
from .options import BenchOptions
from .results import Results
from .shapes import chosen_ops, chosen_shapes, shrunk
from .timing import CandidateError, Timing, interleaved, keep_memory

__all__ = ["run"]

# What float64 may cost, a second or two: operations, and elements of the arguments (several copies of each are held).
_EXACT_FLOPS = {"cpu": 2e10, "cuda": 2e12}
_EXACT_ELEMENTS = {"cpu": 1e8, "cuda": 3e8}


class Refused(Exception):
    """A kernel that is not timed; the message says why."""


def run(options: BenchOptions) -> int:
    """Exit status: 1 if anything was refused, 0 otherwise. OptionError for an op, a shape or a peer that there is not."""
    ops = chosen_ops(options.ops)
    plan = [(op, chosen_shapes(op, options.shapes)) for op in ops]
    for name in options.against:
        if name not in peers.NAMES:
            raise OptionError("against", name, ", ".join(peers.NAMES))
    for direction in options.direction:
        if direction not in DIRECTIONS:
            raise OptionError("direction", direction, ", ".join(DIRECTIONS))
    if not 0 < options.seconds < math.inf:
        raise OptionError("seconds", options.seconds, "a finite number above 0")
    if options.plot is not None:
        bench_report.require_matplotlib()
    keep_memory()
    results = Results("kernels", options.out)
    show = bench_report.Lines(results.content["environment"], options)
    try:
        for op, shapes in plan:
            for dtype_name in options.dtype:
                for row in _rows(op, shapes, getattr(torch, dtype_name), options, show, results):
                    results.add(row)
                    show.row(row)
        results.finish()
    finally:  # an interrupted run keeps and draws what it has
        show.end(results)
        if options.plot is not None and results.rows:
            bench_report.plot(results.rows, options.plot)
    return 1 if results.content.get("refused") else 0


def _rows(
    op: Op, shapes: Sequence[Mapping[str, Any]], dtype: torch.dtype, options: BenchOptions, show: bench_report.Lines,
    results: Results,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of an op in a dtype, as they are measured."""

    def refuse(backend: str, why: str, dims: Mapping[str, Any] | None = None) -> None:
        entry = {"op": op.name, "dims": dict(dims or {}), "dtype": _name(dtype), "backend": backend, "why": why}
        results.content.setdefault("refused", []).append(entry)
        show.refused(entry)

    passed: list[tuple[str, str]] = []
    for backend, device in _backends(op, dtype, options.backend):
        try:
            _check_contract(op, dtype, backend, device)
            passed.append((backend, device))
        except Refused as error:
            refuse(backend, str(error))
    for dims in shapes:
        for device in dict.fromkeys(device for _, device in passed):
            there = [b for b, d in passed if d == device]
            try:
                stage = _Stage(op, dims, dtype, device, options)
            except Exception as error:  # no room for it: the other shapes may still fit
                for backend in there:
                    refuse(backend, f"its data cannot be made: {_text(error)}", dims)
                continue
            for backend in there:
                try:
                    yield from stage.rows(backend)
                except Refused as error:
                    refuse(backend, str(error), dims)


def _backends(op: Op, dtype: torch.dtype, asked: Sequence[str]) -> list[tuple[str, str]]:
    """(backend, device): those asked for, else the one chosen by itself and on a GPU the other native one too."""
    if asked:
        gpu = torch.cuda.is_available()
        return [(b, "cuda" if b == "cuda" or (b != "cpu" and gpu) else "cpu") for b in asked]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = schema_arguments(op, op.samples[0].build(dtype, device))
    chosen = [backends.choose(op, args).backend]
    if device == "cuda":
        others = [b for b in ("triton", "cuda") if b not in chosen]
        chosen += [b for b in others if not backends.why_not(op, b, args)]
    return [(b, device) for b in chosen]


def _check_contract(op: Op, dtype: torch.dtype, backend: str, device: str) -> None:
    """Refused unless the backend can serve, is worth timing, and passes the budget check on every sample."""
    if device == "cuda" and not torch.cuda.is_available():
        raise Refused("there is no GPU")
    if backend == "triton" and backends.interpreting():
        raise Refused("TRITON_INTERPRET=1: the interpreter is for tests, its speed means nothing")
    if why := backends.why_not(op, backend, schema_arguments(op, op.samples[0].build(dtype, device))):
        raise Refused(f"it cannot serve: {why}")
    for sample in op.samples:
        try:
            check.check_budget(op, sample, dtype, backend, device)
        except Exception as error:
            raise Refused(f"it does not pass its contract: {_text(error)}") from error


class _Stage:
    """One op at one shape in one dtype: the data, the exact results, and the peers, for all backends of a device."""

    def __init__(
        self, op: Op, dims: Mapping[str, Any], dtype: torch.dtype, device: str, options: BenchOptions
    ) -> None:
        self.op, self.dims, self.dtype, self.device, self.options = op, dict(dims), dtype, device, options
        _make_room(op, self.dims, dtype, device, 1 + len(options.against))
        self.args: dict[str, Any] = op.case(**dims).build(dtype, device)
        self.cost = op.cost(**self.args)
        self.checked = shrunk(op, self.dims, dtype, _EXACT_FLOPS[device], _EXACT_ELEMENTS[device])
        self.small = self.args if self.checked == self.dims else op.case(**self.checked).build(dtype, device)
        self.directions: list[str] = [d for d in options.direction if d == "forward" or op.backward is not None]
        self.exact, self.torch_values = _truth(op, self.small)
        if {"compile", "flex"} & set(options.against):
            torch._dynamo.reset()  # torch gives up on a function that was compiled for too many shapes
        self.peers = {d: {str(n): self._peer(n, d) for n in options.against} for d in self.directions}
        self.roof = roof.measure(device, dtype, seconds=options.seconds / 4)

    def _peer(self, name: str, direction: str) -> _Rival:
        try:
            peer = peers.find(name, self.op, self.args, direction)
            twin = peer if self.small is self.args else peers.find(name, self.op, self.small, direction)
            ratio = self._peer_errors(twin, direction) if peer.comparable else None
            contender = Contender(self.op, peer.function, peer.prepare(self.args), peer.spoils)
        except peers.Absent as error:
            return _Rival(None, str(error))
        except Exception as error:  # not installed right, out of memory, does not compile: its failure, shown as such
            return _Rival(None, f"failed: {_text(error)}")
        return _Rival(contender, peer.note, ratio)

    def _peer_errors(self, peer: peers.Peer, direction: str) -> float:
        args = peer.prepare(self.small)
        same = all(args[k] is v for k, v in self.small.items())
        exact, torch_values = (self.exact, self.torch_values) if same else _truth(self.op, args)
        contender = Contender(self.op, peer.function, args, peer.spoils)
        return error_ratio(contender.evaluate(direction != "forward"), torch_values, exact)

    def rows(self, backend: str) -> Iterator[dict[str, Any]]:
        """A row for each direction. Raises Refused if the results are wrong, or a call fails."""
        with backends.use_backend(backend):
            ours = Contender(self.op, self.op.function, self.args)
            values = self._our_results(backend)
            for direction in self.directions:
                shown = {n: v for n, v in values.items() if direction != "forward" or not n.startswith("d_")}
                yield self._row(direction, backend, ours, error_ratio(shown, self.torch_values, self.exact))

    def _our_results(self, backend: str) -> dict[str, Tensor]:
        """Outputs and gradients of ours. Raises Refused if they are not within the budget."""
        small = Contender(self.op, self.op.function, self.small)
        try:
            with check.poisoned_memory():
                values = small.evaluate()
            if values.keys() != self.exact.keys():
                raise AssertionError(f"got {list(values)}, expected {list(self.exact)}")
            compared = check.compare_all(
                self.op, self.small, values, self.torch_values, self.exact, self.dtype
            )
        except Exception as error:
            raise Refused(f"it fails at {self.checked}: {_text(error)}") from error
        if wrong := [str(c) for c in compared if not c.ok]:
            raise Refused(f"it is wrong at {self.checked}: {'; '.join(wrong)}")
        return values

    def _row(self, direction: str, backend: str, ours: Contender, ratio: float) -> dict[str, Any]:
        rivals = self.peers[direction]
        field = {"ours": ours} | {n: r.contender for n, r in rivals.items() if r.contender is not None}
        failed: dict[str, str] = {}
        timings = self._time(field, direction, failed)
        memory = {name: field[name].peak_bytes(direction) for name in timings}
        for contender in field.values():
            contender.graph = None
        mine = timings["ours"]
        flops, moved = _amounts(self.cost, direction)
        found: dict[str, dict[str, Any]] = {}
        for name, rival in rivals.items():
            if name not in timings:
                found[name] = {"absent": failed.get(name, rival.note)}
                continue
            found[name] = _times(timings[name]) | {
                "ratio": timings[name].median / mine.median,
                "error_ratio": _number(rival.error_ratio),
                "peak_bytes": memory[name],
                "note": rival.note,
            }
        return {
            "op": self.op.name, "dims": self.dims, "dtype": _name(self.dtype), "direction": direction,
            "backend": backend, "device": self.device, **_times(mine),
            "gbytes_per_s": moved / mine.median / 1e9, "tflop_per_s": flops / mine.median / 1e12,
            "roof_fraction": self.roof.floor(flops, moved) / mine.median, "bound": self.roof.bound(flops, moved),
            "flops": flops, "bytes": moved, "roof": self.roof.as_dict(), "peers": found,
            "peak_bytes": memory["ours"], "error_ratio": _number(ratio), "checked": self.checked,
            "cold": not self.options.warm,
        }  # fmt: skip

    def _time(
        self, field: dict[str, Contender], direction: str, failed: dict[str, str]
    ) -> dict[str, Timing]:
        """Time all that run; a peer that raises is left out and named in `failed`. Refused if ours raises."""
        setup = any(c.needs_setup(direction) for c in field.values())
        while True:
            calls = {name: c.call(direction) for name, c in field.items() if name not in failed}
            try:
                return interleaved(
                    calls, device=self.device, seconds=self.options.seconds, cold=not self.options.warm,
                    setup=(lambda name: field[name].setup(direction)) if setup else None,
                )  # fmt: skip
            except CandidateError as error:
                if error.name == "ours":
                    raise Refused(f"it fails at {self.dims}: {_text(error.__cause__ or error)}") from error
                failed[error.name] = f"failed: {_text(error.__cause__ or error)}"


class _Rival(NamedTuple):
    contender: Contender | None
    note: str  # why it is absent, or in what it differs
    error_ratio: float | None = None


def _truth(op: Op, args: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients in float64, and as PyTorch has them in the arguments' dtype."""
    return check.evaluate(op.peer, op, check.widened(dict(args))), check.evaluate(op.peer, op, dict(args))


def _make_room(op: Op, dims: Mapping[str, Any], dtype: torch.dtype, device: str, contenders: int) -> None:
    """MemoryError before the system has to kill what has asked for too much."""
    args = {k: v for k, v in op.case(**dims).build(dtype, "meta").items() if isinstance(v, Tensor)}
    copies = {k: contenders if k in op.mutates else 1 for k in args}
    # While they are drawn there are float64 copies, and a gradient is as large as its input.
    needed = sum(v.nbytes * (copies[k] + 1) for k, v in args.items()) + 8 * max(v.numel() for v in args.values())
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory()
    if free is not None and needed > free:
        raise MemoryError(f"it needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free")


def _amounts(cost: Any, direction: str) -> tuple[float, float]:
    """(operations, bytes) of a direction."""
    forward, backward = direction != "backward", direction != "forward"
    return (
        forward * cost.forward_flops + backward * cost.backward_flops,
        forward * cost.forward_bytes + backward * cost.backward_bytes,
    )


def _times(timing: Timing) -> dict[str, Any]:
    return {
        "seconds": timing.median, "low": timing.low, "high": timing.high, "rounds": timing.rounds,
        "left_out": timing.left_out,
    }  # fmt: skip


def _number(value: float | None) -> float | None:
    """JSON has no infinity: an error that is not finite is written as 1e308, far beyond any other."""
    return None if value is None else min(value, 1e308)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _text(error: BaseException) -> str:
    """Type and first lines of an error, on one line, its files without their folders: results go to others."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    message = re.sub(r"(?<![\w./:])/(?:[^\s/:'\"]+/)+", "", " ".join(lines))[:400]
    return message if isinstance(error, (AssertionError, backends.BackendError)) else f"{type(error).__name__}: {message}"
