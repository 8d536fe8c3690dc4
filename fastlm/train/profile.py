"""Where a training step's time goes: every op call timed, by kind of layer, beside the least that it could take.

The engine records its passes on the tapes that a `Profile` gives it for some steps (`Engine.tape_class`); the steps before and
after run on the engine's own, at no cost. On a CPU an op's time is the wall clock around its call, on a GPU the time between
two events, and the steps that are profiled run without a CUDA graph.

Floors: the operations of a call over the fastest matrix product measured here (torch's or the engine's own, at this model's
sizes), or its bytes over the speed of a copy beyond all caches, whichever takes longer; both counted by the op's `cost`, for a
matrix product by its operands. What still lies in a cache can come in under the floor of its bytes.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastlm.engine import Engine, gemm
from fastlm.engine.core import UpdateTape
from fastlm.engine.tape import Enough, Tape
from fastlm.registry import Cost, Op

from .durable import replace_file

if TYPE_CHECKING:
    from fastlm.testbed.roof import Roof

__all__ = ["Line", "Profile", "Span", "cost_of", "measure_roof"]

T = TypeVar("T")

WARM_UP = 3  # steps before the first that is profiled: memory is planned in the first, taken in the second

LANES = ("step", "forward", "backward", "optimizer", "data")
_KINDS = {
    "embedding": ("embedding", "embedding_layer_norm"),
    "norm + residual": ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"),
    "attention": ("attention", "varlen_attention", "rotary_embedding"),
    "activation": ("gelu", "silu", "relu", "relu_squared", "geglu", "swiglu", "reglu"),
    "head + loss": ("linear_cross_entropy", "linear_distillation_loss"),
    "loss": ("cross_entropy", "distillation_loss", "kl_div"),
    "optimizer": ("adamw", "sgd", "lion", "adafactor", "muon"),
}
_KIND_OF = {op: kind for kind, ops in _KINDS.items() for op in ops}  # an op that is not here is a kind of its own
_ROLES = {
    "c_attn": "qkv", "in_proj": "qkv", "c_proj": "proj", "out_proj": "proj", "c_fc": "fc", "lm_head": "head", "wte": "head",
}  # fmt: skip


class Span(NamedTuple):
    """One call: seconds from the first span on, and the operations and bytes that it cannot do without."""

    start: float
    seconds: float
    name: str
    kind: str
    lane: str
    cost: tuple[float, float]
    details: dict[str, Any]


@dataclass
class Line:
    """A kind of layer, forward or backward: seconds and floor in a step, and what they are made of."""

    seconds: float = 0.0
    floor: float = 0.0
    flops: float = 0.0
    moved: float = 0.0
    calls: float = 0.0


class Profile:
    """Notes `steps` steps of an engine after `warm_up` others.

    ``with profile.step(): batches = profile.data(feed.next); engine.step(batches)`` around every step; once `done`, ``table()``
    and ``write_trace()``.
    """

    def __init__(self, engine: Engine, steps: int, warm_up: int = WARM_UP) -> None:
        self.engine, self.steps, self.warm_up = engine, steps, warm_up
        self.spans: list[Span] = []
        self.own = 0.0  # seconds of the profiler's own counting in the steps, where the host waits for the ops
        self.gemms: dict[tuple[int, int, int], float] = {}  # (m, n, k) -> operations, of all products
        self._seen, self._noting = 0, False
        self._clock: _Clock = _Events() if engine.device.type == "cuda" else _Clock()
        self._open: list[tuple[Callable[[], tuple[float, float]], dict[str, Any]]] = []
        places = sorted((p.data_ptr(), name) for name, p in engine.model.named_parameters())
        self._addresses, self._names = [a for a, _ in places], [n for _, n in places]
        self._roof: Roof | None = None

    @property
    def done(self) -> bool:
        """Whether all steps have been noted."""
        return self._seen >= self.warm_up + self.steps

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one training step with the assembly of its data."""
        self._noting = self.warm_up <= self._seen < self.warm_up + self.steps
        self._seen += 1
        if not self._noting:
            yield
            return
        engine = self.engine
        before = engine.tape_class, engine.update_class
        engine.tape_class, engine.update_class = partial(_Recorder, self), partial(_Updater, self)
        try:
            with self.span(f"step {self._seen}", "step", "step"):
                yield
        finally:
            engine.tape_class, engine.update_class = before
            for read, call in self._open:
                if call.pop("ran"):
                    self.spans.append(Span(*read(), **call))
            self._open.clear()

    def data(self, assemble: Callable[[], T]) -> T:
        """What `assemble` returns, noted in the lane of the data."""
        if not self._noting:
            return assemble()
        with self.span("batches", "data", "data"):
            return assemble()

    @contextlib.contextmanager
    def span(
        self, name: str, kind: str, lane: str, cost: tuple[float, float] = (0.0, 0.0), **details: Any
    ) -> Iterator[dict[str, Any]]:
        """Note what happens inside as one call. Yields its record, of which `cost` may still be set, or `ran` to False."""
        call = {"name": name, "kind": kind, "lane": lane, "cost": cost, "details": details, "ran": True}
        end = self._clock.begin()
        try:
            yield call
        finally:
            self._open.append((end(), call))

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Around the profiler's own work between two spans, which is left out of the step."""
        start = time.perf_counter()
        yield
        if self.engine.device.type != "cuda":
            self.own += time.perf_counter() - start

    def role(self, weight: Tensor) -> str:
        """What a matrix is for, from the name of the parameter that holds it."""
        i = bisect_right(self._addresses, weight.data_ptr()) - 1
        path = [part for part in self._names[i].split(".")[:-1] if not part.isdigit()] if i >= 0 else []
        leaf = self._names[i].split(".")[-1].removesuffix("_weight") if i >= 0 else "?"
        path += [leaf] if leaf not in ("weight", "?") else []
        role = _ROLES.get(path[-1], ".".join(path[-2:])) if path else leaf
        return f"GEMM {path[-2]} proj" if role == "proj" and len(path) > 1 else f"GEMM {role}"

    # --- what it comes to

    def roof(self) -> Roof:
        """Measured at the first call, at the sizes of the products that took most operations."""
        if self._roof is None:
            largest = sorted(self.gemms, key=lambda size: -self.gemms[size])[:3]
            self._roof = measure_roof(self.engine.device, self.engine.dtype, largest)
        return self._roof

    def step_seconds(self) -> float:
        """Of a mean step, without the profiler's own counting."""
        return (sum(s.seconds for s in self.spans if s.lane == "step") - self.own) / self.steps

    def lines(self) -> dict[tuple[str, str], Line]:
        """By kind and lane, for a mean step, in the order of their first calls."""
        roof = self.roof()
        found: dict[tuple[str, str], Line] = {}
        for span in (s for s in self.spans if s.lane != "step"):
            line = found.setdefault((span.kind, span.lane), Line())
            line.seconds += span.seconds / self.steps
            line.floor += roof.floor(*span.cost) / self.steps
            line.flops += span.cost[0] / self.steps
            line.moved += span.cost[1] / self.steps
            line.calls += 1 / self.steps
        return found

    def table(self) -> str:
        """Milliseconds of a mean step by kind of layer, forward and backward, beside their floors."""
        lines, roof, whole = self.lines(), self.roof(), self.step_seconds()
        lanes = ("forward", "backward")
        head = ("", "calls", *(f"{lane}{x}" for lane in lanes for x in (" ms", " floor", " of it")), "of step", "rate")
        rows = [head]
        for kind in dict.fromkeys(kind for kind, _ in lines):
            parts = [line for (k, _), line in lines.items() if k == kind]
            both = Line(*(sum(getattr(p, f) for p in parts) for f in ("seconds", "floor", "flops", "moved", "calls")))
            cells = [lines.get((kind, lane)) for lane in lanes]
            if not any(cells):  # optimizer and data: neither
                cells = [both, None]
            rows.append((
                kind, f"{both.calls:.0f}", *(c for line in cells for c in _cells(line)), f"{both.seconds / whole:.1%}",
                _rate(both, roof),
            ))  # fmt: skip
        total = sum(line.seconds for line in lines.values())
        floor = sum(line.floor for line in lines.values())
        rest, step = f"{1e3 * (whole - total):.2f}", (f"{1e3 * whole:.2f}", f"{1e3 * floor:.2f}", f"{floor / whole:.0%}")
        rows.append(("other: Python, small torch calls", "", rest, *[""] * 5, f"{1 - total / whole:.1%}", ""))
        rows.append(("step", "", *step, *[""] * 3, "100.0%", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        text = ["  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))]) for r in rows]
        fastest = max(roof.gemms, key=lambda g: g.flop_per_s)
        return "\n".join([
            f"mean of {self.steps} steps, {roof.dtype} on {self.engine.device.type}; roofs measured now: GEMM "
            f"{roof.flop_per_s / 1e9:.0f} GFLOP/s ({fastest.m} x {fastest.n} x {fastest.k}), "
            f"copy {roof.bytes_per_s / 1e9:.1f} GB/s",
            *(line.rstrip() for line in text),
        ])  # fmt: skip

    def write_trace(self, path: Path) -> None:
        """A Chrome trace (chrome://tracing, ui.perfetto.dev): a span for each call, a lane for each of LANES."""
        events: list[dict[str, Any]] = [
            {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "fastlm train"}},
        ]
        for tid, lane in enumerate(LANES):
            events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": lane}})
            events.append({"name": "thread_sort_index", "ph": "M", "pid": 1, "tid": tid, "args": {"sort_index": tid}})
        first = min((s.start for s in self.spans), default=0.0)
        for s in self.spans:
            counted = dict(zip(("flops", "bytes"), s.cost, strict=True)) if any(s.cost) else {}
            events.append({
                "name": s.name, "cat": s.kind, "ph": "X", "ts": 1e6 * (s.start - first), "dur": 1e6 * s.seconds, "pid": 1,
                "tid": LANES.index(s.lane), "args": {**s.details, **counted},
            })  # fmt: skip
        replace_file(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False).encode())


def measure_roof(device: torch.device, dtype: torch.dtype, sizes: Sequence[tuple[int, int, int]], seconds: float = 0.5) -> Roof:
    """A device's copy speed, and for each (m, n, k) the faster of torch's product and the engine's; the fastest call of each.

    Random numbers are drawn from a generator of its own: what a run draws does not depend on it.
    """
    from fastlm.testbed.roof import Gemm, Roof
    from fastlm.testbed.timing import interleaved

    generator = torch.Generator(device).manual_seed(0)
    source = torch.ones(16 << 20, device=device)
    candidates: dict[str, Callable[[], object]] = {"copy": partial(torch.zeros_like(source).copy_, source)}
    sizes = sizes or ((1024, 1024, 1024),)
    for m, n, k in sizes:
        a, b = (torch.randn(s, generator=generator, device=device).to(dtype) for s in ((m, k), (k, n)))
        out = torch.zeros(m, n, device=device, dtype=dtype)
        candidates[f"torch {m} {n} {k}"] = partial(torch.mm, a, b, out=out)
        candidates[f"engine {m} {n} {k}"] = partial(gemm.product, a, b, out)
    with torch.no_grad():
        timings = interleaved(candidates, device=device, seconds=seconds, cold=False)
    gemms = tuple(
        Gemm(m, n, k, min(min(timings[f"{who} {m} {n} {k}"].samples) for who in ("torch", "engine"))) for m, n, k in sizes
    )
    name = str(dtype).removeprefix("torch.")
    return Roof(str(device), name, 2.0 * source.nbytes / min(timings["copy"].samples), gemms)


class _Recorder(Tape):
    """The engine's tape, noting every call. again: it runs a segment of the forward pass anew, within backward."""

    def __init__(self, profile: Profile, *args: Any, again: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self._profile, self._again = profile, again
        self._costs: dict[int, tuple[tuple[float, float], dict[str, Any]]] = {}  # of backward, by height on the tape

    def forward(self, op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
        with self._profile.counting():
            cost, shapes, height = cost_of(op, args), _shapes(op, args), len(self._entries)
        with self._ahead(op.name, _KIND_OF.get(op.name, op.name), cost[:2], shapes) as call:
            try:
                out = super().forward(op, args)
            except Enough:  # its last value kept was an input: it did not run
                call["ran"] = any(n not in op.position for n in op.saved)
                self._costs[height] = (cost[2:], shapes)
                raise
        together = len(self._entries) > height and self._entries[height][1][0] is None
        if together:  # its gradients came with it
            call["cost"] = (cost.forward_flops + cost.backward_flops, cost.forward_bytes + cost.backward_bytes)
        self._costs[height] = ((0.0, 0.0) if together else cost[2:], shapes)
        return out

    def backward(
        self, name: str, *d_outputs: Tensor | None, into: Mapping[str, Tensor] | None = None,
        **parameters: Tensor | None,
    ) -> Any:  # fmt: skip
        cost, shapes = self._costs.pop(len(self._entries) - 1, ((0.0, 0.0), {}))
        with self._profile.span(name, _KIND_OF.get(name, name), "backward", cost, **shapes):
            return super().backward(name, *d_outputs, into=into, **parameters)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (n, k), item = weight.shape, weight.element_size()
        m = x.numel() // k
        kind = self._profile.role(weight)
        self._profile.gemms[m, n, k] = self._profile.gemms.get((m, n, k), 0.0) + 2.0 * m * n * k
        cost = 2.0 * m * n * k, float(item * (m * k + n * k + m * n))
        with self._ahead(kind, kind, cost, {"m": m, "n": n, "k": k}) as call:
            try:
                return super().linear(x, weight, bias)
            except Enough:
                call["ran"] = False
                raise

    def linear_backward(
        self, dy: Tensor, weight: Tensor, bias: Tensor | None, weight_rows: slice = slice(None),
        bias_rows: slice = slice(None),
    ) -> Tensor:  # fmt: skip
        (n, k), item = weight[weight_rows].shape, weight.element_size()
        m = dy.numel() // n
        products = 1 + (weight in self.gradients)
        # dy, x and the weight are read, dx written, the weight's gradient, of 4 bytes or more, written, and read if added to
        passes = 1 + (weight not in self.stale)
        moved = item * (m * n + n * k + m * k) + (products - 1) * (item * m * k + passes * max(4, item) * n * k)
        kind = self._profile.role(weight[weight_rows])
        cost = 2.0 * products * m * n * k, float(moved)
        with self._profile.span(kind, kind, "backward", cost, m=m, n=n, k=k):
            return super().linear_backward(dy, weight, bias, weight_rows, bias_rows)

    def _ahead(
        self, name: str, kind: str, cost: tuple[float, float], details: dict[str, Any]
    ) -> contextlib.AbstractContextManager[dict[str, Any]]:
        """A call of the forward pass, the first or once more."""
        again = self._again
        return self._profile.span(name, "recomputed" if again else kind, LANES[1 + again], cost, **details)

    def _segment(self, start: int, record: bool) -> Tape:
        again = record or self._again
        tape = _Recorder(self._profile, self.arena, self.gradients, self._seeds, record, stale=self.stale, again=again)
        tape._sites = start
        return tape


class _Updater(UpdateTape):
    """The optimizer's op, noted."""

    def __init__(self, profile: Profile, engine: Engine) -> None:
        super().__init__(engine)
        self._profile = profile

    def forward(self, op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
        cost, shapes = cost_of(op, args), _shapes(op, args)
        with self._profile.span(op.name, _KIND_OF.get(op.name, op.name), "optimizer", cost[:2], **shapes):
            return super().forward(op, args)


class _Clock:
    """The wall: for what has run when its call returns."""

    def __init__(self) -> None:
        self._base = time.perf_counter()

    def begin(self) -> Callable[[], Callable[[], tuple[float, float]]]:
        """Start a span; calling what this returns ends it, and calling what that returns tells (start, seconds)."""
        start = time.perf_counter()

        def end() -> Callable[[], tuple[float, float]]:
            taken = time.perf_counter() - start
            return lambda: (start - self._base, taken)

        return end


class _Events(_Clock):
    """A GPU's own: for what has only been queued when its call returns."""

    def __init__(self) -> None:
        self._first = self._record()

    def begin(self) -> Callable[[], Callable[[], tuple[float, float]]]:
        before = self._record()

        def end() -> Callable[[], tuple[float, float]]:
            after = self._record()

            def read() -> tuple[float, float]:
                after.synchronize()
                return 1e-3 * self._first.elapsed_time(before), 1e-3 * before.elapsed_time(after)

            return read

        return end

    def _record(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def cost_of(op: Op, args: Sequence[Any]) -> Cost:
    """The op's own count, for arguments in the order of its schema."""
    named = {name: a for (name, _, _), a in zip(op.arguments, args, strict=True)}
    if "left" in named:  # attention's public options, from what it makes of them
        named |= {"window": (named["left"], named["right"]), "alignment": "top-left" if named["top_left"] else "bottom-right"}
    taken = inspect.signature(op.cost).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in taken):
        return op.cost(**named)
    return op.cost(**{p.name: named[p.name] for p in taken if p.name in named})


def _shapes(op: Op, args: Sequence[Any]) -> dict[str, Any]:
    """{argument: "bfloat16[2, 512, 768]"} of the tensors, and the other arguments as they are."""
    names = (name for name, _, _ in op.arguments)
    return {
        n: f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}" if isinstance(a, Tensor) else a
        for n, a in zip(names, args, strict=True) if a is not None
    }  # fmt: skip


def _cells(line: Line | None) -> tuple[str, str, str]:
    if line is None:
        return "", "", ""
    floor = (f"{1e3 * line.floor:.2f}", f"{line.floor / line.seconds:.0%}") if line.floor else ("", "")
    return f"{1e3 * line.seconds:.2f}", *floor


def _rate(line: Line, roof: Roof) -> str:
    """By what sets the floor."""
    if not line.flops and not line.moved:
        return ""
    if roof.bound(line.flops, line.moved) == "flops":
        return f"{line.flops / line.seconds / 1e9:.0f} GFLOP/s"
    return f"{line.moved / line.seconds / 1e9:.1f} GB/s"
