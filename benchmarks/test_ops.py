"""Every op by pytest-benchmark, generated from the registry: forward, backward and both.

    pytest benchmarks --benchmark-only [-k "layer_norm and bfloat16"]

A group is an op at one shape, in one dtype and direction; in it every backend that can serve here stands beside what a
PyTorch user writes (eager). Shapes are small, so that all of it ends in a few minutes on two cores; a backend that
cannot serve is skipped with the reason, and what is wrong fails and is not timed. This is wall time with the device
synchronised, so what a call costs the host is in it. For kernel times, caches flushed, at real sizes, with all peers:
`fastlm kernels bench`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastlm import backends, check, registry
from fastlm.registry import Op
from fastlm.testbed import peers
from fastlm.testbed.contender import DIRECTIONS, Contender, schema_arguments
from fastlm.testbed.shapes import full_dimensions, shrunk
from fastlm.testbed.timing import keep_memory

GPU = torch.cuda.is_available()
DTYPES = (torch.float32, torch.bfloat16)
SECONDS = 0.3  # a benchmark's share


def _cases() -> Iterator[Any]:
    for op in registry.ops().values():
        for dtype in DTYPES:
            dims = shrunk(op, full_dimensions(op, op.shapes["default"][0]), dtype, flops=5e8, elements=4e6)
            for direction in DIRECTIONS if op.backward is not None else ("forward",):
                for who in (*backends.BACKENDS, "eager"):
                    label = f"{op.name}-{str(dtype)[6:]}-{direction}-{who}"
                    yield pytest.param(op, dims, dtype, direction, who, id=label)


@functools.cache
def _checked(
    name: str, dims: tuple[tuple[str, Any], ...], dtype: torch.dtype, backend: str, device: str
) -> None:
    """The contract's budget at this shape; AssertionError on a miss."""
    op = registry.get(name)
    check.check_budget(op, op.case(**dict(dims)), dtype, backend, device)


@pytest.mark.parametrize(("op", "dims", "dtype", "direction", "who"), list(_cases()))
def test_op(
    benchmark: Any, op: Op, dims: dict[str, Any], dtype: torch.dtype, direction: str, who: str
) -> None:
    device = "cuda" if GPU and who != "cpu" else "cpu"
    args = op.case(**dims).build(dtype, device)
    benchmark.group = f"{op.name} {' '.join(f'{k}={v}' for k, v in dims.items())} {str(dtype)[6:]} {direction}"
    backend: str | None = None
    if who == "eager":
        peer = peers.find("eager", op, args, direction)
        contender = Contender(op, peer.function, peer.prepare(args))
    else:
        if who == "triton" and backends.interpreting():
            pytest.skip("TRITON_INTERPRET=1: the interpreter's speed means nothing")
        if why := backends.why_not(op, who, schema_arguments(op, args)):
            pytest.skip(f"{op.name} on {who}: {why}")
        _checked(op.name, tuple(dims.items()), dtype, who, device)
        contender, backend = Contender(op, op.function, args), who
    call = contender.call(direction)

    def run() -> None:
        call()
        if GPU:
            torch.cuda.synchronize()

    keep_memory()
    with backends.use_backend(backend):
        rounds = _rounds(run, lambda: contender.setup(direction))
        benchmark.pedantic(run, setup=lambda: contender.setup(direction), rounds=rounds, warmup_rounds=2)


def _rounds(run: Callable[[], object], setup: Callable[[], object]) -> int:
    """As many as fit the time by the second call, 5 at least."""
    for _ in range(2):
        setup()
        start = time.perf_counter()
        run()
        taken = time.perf_counter() - start
    return min(200, max(5, int(SECONDS / max(taken, 1e-6))))
