"""What `fastlm info` prints: versions, chip, and whether each backend can serve, or why not and what to do.

Reads metadata instead of importing Triton or its kernels, so it also works where they are broken.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import torch

from fastlm import native

__all__ = ["chip", "installed", "report", "version"]

# Instruction sets that decide which CPU variant runs, as Linux spells them.
ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
OLDEST_GPU = (8, 0)


def version() -> str:
    """fastlm's own version."""
    project = Path(__file__).parent.parent / "pyproject.toml"
    if project.exists():  # a source tree speaks for itself; installed metadata may be older
        return str(tomllib.loads(project.read_text())["project"]["version"])
    return importlib.metadata.version("fastlm")


def installed(package: str) -> str:
    """The version of an installed package; "" if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpuinfo() -> dict[str, str]:
    """First value of each field of /proc/cpuinfo; empty where there is no such file."""
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def chip() -> str:
    """The processor's name, on x86 its family and model, which a name may hide, and the instruction sets that matter here."""
    info = _cpuinfo()
    name = info.get("model name") or info.get("Model") or platform.processor() or platform.machine()
    if "cpu family" in info and "model" in info:
        name += f", family {info['cpu family']} model {info['model']}"
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True).stdout.strip() or name
    present = set((info.get("flags") or info.get("Features") or "").split())
    flags = " ".join(f for f in ISA_FLAGS if f in present) or "instruction sets unknown"
    return f"{name} ({platform.machine()}; {flags})"


def _cores() -> str:
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    per_socket = _cpuinfo().get("cpu cores", "")
    cores = f", {per_socket} cores a socket" if per_socket else ""
    threads = torch.get_num_threads()
    return f"{total} logical processors{cores}; {usable} usable here, torch runs {threads} threads"


def _no_gpu() -> str:
    """Why torch has no GPU to offer; empty if it has one."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a CPU build; on a machine with a GPU install the CUDA build"
    return "torch sees no GPU: check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"


def _gpus() -> str:
    if why := _no_gpu():
        return f"none: {why}"
    lines = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return "; ".join(lines)


def _cuda_version() -> str:
    toolkit = torch.version.cuda or (f"HIP {torch.version.hip}" if torch.version.hip else "none (CPU build)")
    nvcc = native.build_record().get("nvcc")
    return f"{toolkit} in torch; nvcc at install: {nvcc or 'not found'}"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        remedy = "pip install triton" if sys.platform == "linux" else "Triton has no wheel for this system"
        return f"no: triton is not installed; {remedy}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "yes, but TRITON_INTERPRET=1: kernels run in Triton's interpreter, for tests only"
    if why := _no_gpu():
        return f"no: {why}; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, for tests only"
    return "yes"


def _remedy(reason: str) -> str:
    """What to do about a module that is not there."""
    for word, remedy in (
        ("no C++ compiler", "install g++ or clang++ and reinstall fastlm"),
        ("Python.h", "install the Python headers and reinstall fastlm"),
        ("nvcc was not found", "install the CUDA toolkit or set CUDA_HOME, and reinstall fastlm"),
        ("FASTLM_CUDA=0", "reinstall fastlm without FASTLM_CUDA=0"),
    ):
        if word in reason:
            return f"; {remedy}"
    return ""


def _cpu() -> str:
    if why := native.why_not("cpu"):
        return f"no: {why}{_remedy(why)}"
    record = native.build_record()
    module = native.load("cpu")
    notes = [str(module.build), f"{len(module.functions())} functions"]
    if missing := record.get("openmp_missing"):
        notes.append(str(missing))
    skipped = record.get("skipped", {}).items()
    left_out = [f"{name}: {why}" for name, why in skipped if name.startswith("_cpu")]
    return f"yes: {module.__name__} ({'; '.join(notes + left_out)})"


def _cuda() -> str:
    if why := native.why_not("cuda"):
        return f"no: {why}{_remedy(why)}"
    module = native.load("cuda")
    built = f"{module.__name__} ({module.build})"
    if why := _no_gpu():
        return f"no: {built} is there, but {why}"
    if torch.version.hip:
        return f"no: {built} is there, but this torch drives an AMD GPU; use the triton backend"
    capability = torch.cuda.get_device_capability()
    archs = [int(a) for a in re.findall(r"sm_(\d+)", module.build)]
    if capability < OLDEST_GPU or capability[0] * 10 + capability[1] < min(archs):
        return f"no: {built} needs sm_{min(archs)} or newer, this GPU is sm_{capability[0]}{capability[1]}"
    return f"yes: {built}"


def _line(label: str, value: Callable[[], str]) -> str:
    # A report on a broken installation is when it is needed most: any failure becomes its line.
    try:
        text = value()
    except Exception as error:
        text = f"unknown ({type(error).__name__}: {error})"
    return f"{label:<10} {text}"


def report() -> str:
    """The text of `fastlm info`: versions, chip and GPU, then a line for each backend. Never raises."""
    lines = [
        _line("fastlm", version),
        _line("python", lambda: f"{platform.python_version()} on {platform.platform()}"),
        _line("torch", lambda: torch.__version__),
        _line("triton", lambda: installed("triton") or "not installed"),
        _line("CUDA", _cuda_version),
        _line("chip", chip),
        _line("threads", _cores),
        _line("GPU", _gpus),
        "",
        "Backends",
        _line("reference", lambda: "yes: plain PyTorch, on any device"),
        _line("triton", _triton),
        _line("cpu", _cpu),
        _line("cuda", _cuda),
    ]
    return "\n".join(lines)
