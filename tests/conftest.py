"""Test session: Triton's interpreter where there is no GPU, and a record of which backends really ran.

The last lines of a run say how many tests ran on each backend. FASTLM_EXPECT_BACKENDS (a comma list, set by CI) makes
the run fail when one of them ran none.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch

from fastlm import backends, native, registry

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel module is imported

_RAN: Counter[str] = Counter()


def pytest_configure(config):
    config.addinivalue_line("markers", "backend(name): the backend that a test runs")


# Backends that can run here; whole-model tests run on each.
BACKENDS_HERE = [
    pytest.param(b, marks=pytest.mark.backend(b))
    for b in ("reference", "triton", "cpu")
    if b != "cpu" or not native.why_not("cpu")
]


def backend_label(backend: str) -> str:
    """ "triton" says whether it was interpreted or ran on a GPU."""
    if backend == "triton":
        return "triton-gpu" if torch.cuda.is_available() else "triton-interpreter"
    return "cuda-gpu" if backend == "cuda" else backend


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.when == "call" and outcome.get_result().passed:
        for mark in item.iter_markers("backend"):
            _RAN[backend_label(mark.args[0]) if mark.args[0] in ("triton", "cuda") else mark.args[0]] += 1


def _missing() -> list[str]:
    expected = [b for b in os.environ.get("FASTLM_EXPECT_BACKENDS", "").split(",") if b]
    return [b for b in expected if not _RAN[b]]


def pytest_terminal_summary(terminalreporter):
    counts = ", ".join(f"{name} {count}" for name, count in sorted(_RAN.items())) or "none"
    terminalreporter.write_line(f"backends that ran (tests passed): {counts}")
    for name in _missing():
        terminalreporter.write_line(f"backend {name} was expected and ran no test", red=True)


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and _missing():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def op_cases(first: int | None = None, with_backward: bool = False):
    """(op, sample, dtype, backend, device) for every backend that has the op; a missing one is a visible skip.

    first: only that many samples of each op; with_backward: only ops that have one.
    """
    gpu = torch.cuda.is_available()
    cases = []
    for op in registry.ops().values():
        if with_backward and op.backward is None:
            continue
        for sample in op.samples[:first]:
            for backend in backends.BACKENDS:
                device = "cuda" if backend == "cuda" or (gpu and backend == "triton") else "cpu"
                dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if device == "cuda" else [])
                for dtype in dtypes:
                    marks = [pytest.mark.backend(backend)]
                    if why := _cannot_run(op, backend, device):
                        if backend == "cuda" and op.name not in CUDA_OPS:
                            continue
                        marks = [pytest.mark.skip(reason=f"{op.name} on {backend}: {why}")]
                    label = f"{op.name}-{sample.edge}-{str(dtype)[6:]}-{backend}"
                    cases.append(pytest.param(op, sample, dtype, backend, device, marks=marks, id=label))
    return cases


def available(op):
    """(backend, device) for every backend that has the op and runs here."""
    places = [
        (b, "cuda" if torch.cuda.is_available() and b in ("triton", "cuda") else "cpu")
        for b in backends.BACKENDS
    ]
    return [
        pytest.param(backend, device, marks=pytest.mark.backend(backend), id=backend)
        for backend, device in places
        if not _cannot_run(op, backend, device)
    ]


CUDA_OPS = ("layer_norm", "cross_entropy", "adamw")  # those with a CUDA C++ implementation


def _cannot_run(op, backend: str, device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no GPU"
    return backends.why_not(op, backend, [torch.empty(1, device=device)])
