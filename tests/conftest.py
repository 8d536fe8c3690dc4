"""Test session: Triton's interpreter where there is no GPU, and a record of which backends really ran.

The last lines of a run say how many tests ran on each backend. FASTLM_EXPECT_BACKENDS (a comma list, set by CI) makes
the run fail when one of them ran none. With `-n` (pytest-xdist) tests that share what a file makes once stay together.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

from fastlm import backends, registry

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel module is imported


def _patch_interpreter_once() -> None:
    """Triton's interpreter replaces triton.language anew at every call of a device function; once a kernel will do."""
    from triton import language
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:  # another version: slower, not wrong
        return

    class AlreadyPatched:
        def restore(self):
            pass

    def once(function):
        modules = [m for m in function.__globals__.values() if m is language or m is language.core]
        done = modules and all(m.load.__module__ == interpreter.__name__ for m in modules)
        return AlreadyPatched() if done else patch(function)

    interpreter._patch_lang = once


NO_TRITON = "" if importlib.util.find_spec("triton") else "the package triton is not installed"

if os.environ.get("TRITON_INTERPRET") == "1" and not NO_TRITON:
    _patch_interpreter_once()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

_RAN: Counter[str] = Counter()


def pytest_configure(config):
    config.addinivalue_line("markers", "backend(name): the backend that a test runs")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file that makes something once for its tests runs in one process, other tests wherever there is room."""
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def shares(file):
        return 'scope="module"' in (config.rootpath / file).read_text()

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return file if shares(file) else nodeid

    return Scheduling(config, log)


# Backends that can run here; whole-model tests run on each.
BACKENDS_HERE = [
    pytest.param(b, marks=pytest.mark.backend(b))
    for b in ("reference", "triton", "cpu")
    if b == "reference" or not backends.missing("layer_norm", "forward", b)
]


def backend_label(backend: str) -> str:
    """ "triton" says whether it was interpreted or ran on a GPU."""
    if backend == "triton":
        return "triton-gpu" if torch.cuda.is_available() else "triton-interpreter"
    return "cuda-gpu" if backend == "cuda" else backend


def pytest_runtest_setup(item):
    for mark in item.iter_markers("backend"):
        if NO_TRITON and mark.args[0].startswith("triton"):
            pytest.skip(NO_TRITON)
        item.user_properties.append(("backend", backend_label(mark.args[0])))


def pytest_runtest_logreport(report):
    """Counted where the reports come together: with `-n`, in the process that started the others."""
    if report.when == "call" and report.passed:
        _RAN.update(name for key, name in report.user_properties if key == "backend")


def _missing() -> list[str]:
    expected = [b for b in os.environ.get("FASTLM_EXPECT_BACKENDS", "").split(",") if b]
    return [b for b in expected if not _RAN[b]]


def pytest_terminal_summary(terminalreporter):
    counts = ", ".join(f"{name} {count}" for name, count in sorted(_RAN.items())) or "none"
    terminalreporter.write_line(f"backends that ran (tests passed): {counts}")
    for name in _missing():
        terminalreporter.write_line(f"backend {name} was expected and ran no test", red=True)


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and _missing() and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def op_cases():
    """(op, backend, name of a dtype) for every backend that has the op; a missing one is a visible skip."""
    cases = []
    for op in registry.ops().values():
        for backend in backends.BACKENDS:
            if backend == "cuda" and not (CUDA_SOURCES / f"{op.name}.cu").exists():
                continue
            device = (
                "cuda" if backend == "cuda" or (torch.cuda.is_available() and backend == "triton") else "cpu"
            )
            for dtype in ("float32", "bfloat16", "float16") if device == "cuda" else ("float32", "bfloat16"):
                marks = [pytest.mark.backend(backend)]
                if why := _cannot_run(op, backend, device):
                    marks = [pytest.mark.skip(reason=f"{op.name} on {backend}: {why}")]
                cases.append(pytest.param(op, backend, dtype, marks=marks, id=f"{op.name}-{dtype}-{backend}"))
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


CUDA_SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"


def _cannot_run(op, backend: str, device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no GPU"
    return backends.why_not(op, backend, [torch.empty(1, device=device)])
