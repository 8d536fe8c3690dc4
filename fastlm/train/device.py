"""Automatic choices, each with its reason: device, dtype, and how many threads a CPU run takes."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .config import OptionError

__all__ = ["choose_device", "choose_dtype", "choose_threads"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """``auto``, ``cpu`` or ``cuda``. Raises ``OptionError`` if a GPU is asked for and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise OptionError("device", "cuda", "cpu, as torch finds no GPU here")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu"), "as asked" if wanted == "cpu" else "torch finds no GPU"
    device = torch.device("cuda", torch.cuda.current_device())
    return device, torch.cuda.get_device_name(device)


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """``auto``, ``float32`` or ``bfloat16``; auto takes bfloat16 where the chip multiplies it natively."""
    if wanted != "auto":
        return _DTYPES[wanted], "as asked"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"sm_{major}{minor} has bfloat16 tensor cores"
        return torch.float32, f"sm_{major}{minor} has no bfloat16 tensor cores"
    flags = _cpu_flags()
    for flag, what in (("amx_bf16", "AMX tiles"), ("avx512_bf16", "AVX-512 dot products")):
        if flag in flags:
            return torch.bfloat16, f"this CPU has {what} for it ({flag})"
    return torch.float32, "this CPU has no bfloat16 arithmetic (neither amx_bf16 nor avx512_bf16)"


def choose_threads() -> tuple[int, str]:
    """Threads for CPU work: OMP_NUM_THREADS if set, else never more than the process may run on.

    torch counts the machine's cores; a container's quota and an affinity mask can allow far fewer, and then
    threads wait for each other.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked:
        return torch.get_num_threads(), f"OMP_NUM_THREADS={asked}"
    limits = [(torch.get_num_threads(), "cores"), (len(os.sched_getaffinity(0)), "the affinity mask")]
    quota = _cgroup_cpus()
    if quota is not None:
        limits.append((quota, "the container's quota"))
    threads, why = min(limits, key=lambda limit: limit[0])
    return max(1, threads), why


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    # x86 says "flags", Arm "Features"; Arm's bf16 is left to the user, as torch's speed with it varies.
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def _cgroup_cpus() -> int | None:
    """Whole CPUs that the control group of this process allows (version 2), None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None
