"""Measurements on disk: one JSON file a run, rewritten whole and atomically as rows arrive.

    {"format": 1, "kind": "kernels" | "train_step" | ..., "command": [...], "started": ISO 8601 UTC,
     "finished": true if the run came to its end, "environment": {...}, "rows": [{...}, ...]}

A cut-off run leaves every row that it had measured. `environment` says what the numbers are true of; rows of different
devices are never compared.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import info

__all__ = ["FORMAT", "Results", "environment"]

FORMAT = 1


def environment() -> dict[str, Any]:
    """What measurements depend on: device, versions, threads, and the commit of the source tree if it is one."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "device": gpu.name if gpu else info.chip(),
        "kind": "gpu" if gpu else "cpu",
        "compute_capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
        "memory_gib": round((gpu.total_memory if gpu else _memory()) / 2**30, 1),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": info.installed("triton"),
        "packages": {name: info.installed(name) for name in ("liger-kernel", "cut-cross-entropy")},
        "fastlm": info.version(),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "variables": {
            k: v for k, v in sorted(os.environ.items())
            if k.startswith(("FASTLM_", "OMP_", "MKL_", "KMP_", "MALLOC_", "GLIBC_", "TRITON_"))
            and not any(mark in v for mark in ("/", "\\"))  # a path says nothing about speed
        },
    }  # fmt: skip


class Results:
    """A run's rows, kept in a file from the first on; without a path only in memory.

    Args:
        kind: what the rows are.
        path: the file; its folder is made. An existing file is replaced at the first row.
        command: what repeats the run; default: the process's arguments.
    """

    def __init__(self, kind: str, path: Path | None = None, command: list[str] | None = None) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "kind": kind,
            "command": command
            or ["python", *(Path(a).name if os.path.isabs(a) else a for a in sys.orig_argv[1:])],
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "finished": False,
            "environment": environment(),
            "rows": [],
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row (plain JSON values) and write the file."""
        self.extend([row])

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows and write the file once."""
        self.rows.extend(map(dict, rows))
        self._write()

    def finish(self) -> None:
        """Mark the run as complete."""
        self.content["finished"] = True
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps(self.content, indent=1, allow_nan=False) + "\n")
        new.replace(self.path)


def _git(*arguments: str) -> str | None:
    """What git says of this source tree; None for an installed package or without git."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
