"""``fastlm kernels compile``: every kernel for GPUs that are not here, and what the compilers made of it.

    fastlm kernels compile [OP ...] [--arch sm_90 ...] [--max-spill N] [--file path.py] [--json FILE] [--against REV]

Compiles the Triton kernels in every configuration that they ship (which: fastlm/testbed/gpu_code.py) and the CUDA C++
kernels if there is an nvcc, reads the machine code, and prints one row for each kernel and configuration. The status
is 1 if one does not compile, spills more than allowed, or needs more shared memory than its GPU has.
"""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from time import perf_counter

from .. import backends, registry
from ..train.config import OptionError
from . import cuda_code
from .compile_table import LEGEND, changes, table
from .compiled import Group, Job, compile_jobs
from .options import CompileOptions
from .results import Results
from .targets import TARGETS

__all__ = ["run"]

_ROOT = Path(__file__).resolve().parent.parent.parent


def run(options: CompileOptions) -> int:
    """Compile, print, and write what `options` ask for. 0: all well; 1: a fault, each of which is named.

    Raises:
        OptionError: the options cannot be used.
        BackendError: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise backends.BackendError(
            "kernels compile needs the package triton, also to read what nvcc makes; Triton has wheels for Linux only"
        )
    ops = _ops(options)
    commit = _commit(options.against) if options.against is not None else ""
    results = Results("compile", options.json)
    start, cpu = perf_counter(), _cpu_seconds()
    print(LEGEND)
    no_cuda = "--file names a Triton file" if options.file is not None else cuda_code.why_not(_ROOT)
    print(
        f"CUDA C++ kernels are NOT compiled: {no_cuda}"
        if no_cuda
        else "CUDA C++ kernels are compiled by nvcc"
    )
    jobs = _jobs(options, ops, cuda=not no_cuda)
    groups = _compile(_ROOT, jobs, options.max_spill, results)
    rows = [row for group in groups for row in group.rows]
    faults = [row for row in rows if row.fault(options.max_spill)]
    kernels = len({(row.op, row.language, row.kernel) for row in rows})
    verdict = f"{len(faults)} FAULTS" if faults else "no fault"
    print(
        f"\n{len(rows)} configurations of {kernels} kernels of {len(ops)} ops for {', '.join(options.arch)} in "
        f"{perf_counter() - start:.0f} s ({_cpu_seconds() - cpu:.0f} s of CPU): {verdict}"
    )
    for row in faults:
        calls = f" [{row.calls[0]}]" if row.calls else ""
        name = row.kernel or "launcher"
        print(f"FAULT {row.op} {row.target} {name}: {row.fault(options.max_spill)}{calls}")
    if options.against is not None:
        _compare(options.against, commit, groups, results)
    results.finish()
    return 1 if faults else 0


def _ops(options: CompileOptions) -> list[str]:
    """The ops that are meant; OptionError for options that cannot be used."""
    if options.max_spill < 0:
        raise OptionError("max_spill", options.max_spill, "0 and more")
    if options.file is not None:
        if not Path(options.file).is_file():
            raise OptionError("file", options.file, "a file with the launchers forward and backward")
        if len(options.ops) != 1:
            raise OptionError(
                "ops", " ".join(options.ops) or "none", "with --file the one op that the file is for"
            )
    there = [name for name in registry.ops() if _has_triton(_ROOT, name) or name in cuda_code.sources(_ROOT)]
    allowed = list(registry.ops()) if options.file is not None else there
    for name in options.ops:
        if name not in allowed:
            raise OptionError("ops", name, ", ".join(allowed))
    return list(dict.fromkeys(options.ops)) or there


def _has_triton(root: Path, op: str) -> bool:
    return (root / "fastlm" / "kernels" / f"{op}.py").exists()


def _jobs(options: CompileOptions, ops: Sequence[str], cuda: bool) -> list[Job]:
    jobs = []
    for op in ops:
        for target in dict.fromkeys(options.arch):
            if options.file is not None or _has_triton(_ROOT, op):
                file = None if options.file is None else str(Path(options.file).resolve())
                jobs.append(Job(op, target, "triton", file, every=options.every))
            if cuda and TARGETS[target].backend == "cuda" and op in cuda_code.sources(_ROOT):
                jobs.append(Job(op, target, "cuda"))
    return jobs


def _compile(root: Path, jobs: Sequence[Job], max_spill: int, results: Results | None) -> list[Group]:
    """Compile, showing how far it is; with `results`, tables as they come, and rows into the results."""
    groups: list[Group] = []
    shown = sys.stderr.isatty()
    with closing(compile_jobs(root, jobs, flags_of=_ROOT)) as arriving:
        for i, job in enumerate(jobs):
            if shown:
                word = f"[{i}/{len(jobs)}] {job.op} for {job.target}"
                print(f"\r\x1b[K{word}", end="", file=sys.stderr, flush=True)
            group = next(arriving)
            groups.append(group)
            if shown:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            if results is not None:
                print(f"\n{table(group, max_spill)}", flush=True)
                results.extend(row.as_json(max_spill) for row in group.rows)
    return groups


def _compare(revision: str, commit: str, after: Sequence[Group], results: Results) -> None:
    """Compile the same calls with the kernels of a revision; print and keep what differs."""
    with tempfile.TemporaryDirectory(prefix="fastlm-") as folder:
        archive = subprocess.run(
            ["git", "-C", str(_ROOT), "archive", "--format=tar", commit], check=True, capture_output=True
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        tree = Path(folder).resolve()
        jobs = [
            group.job._replace(file=None, calls=group.calls)
            for group in after
            if (_has_triton(tree, group.job.op) if group.job.language == "triton"
                else group.job.op in cuda_code.sources(tree))
        ]  # fmt: skip
        print(f"\nagainst {revision} ({commit[:12]}), by the same calls:", flush=True)
        before = _compile(tree, jobs, 0, None)
    for message in dict.fromkeys(
        f"{row.op} {row.target} {row.kernel or 'launcher'} did not compile then: {row.error}"
        for group in before
        for row in group.rows
        if row.error
    ):
        print(message)
    found = changes(before, after)
    for change in found:
        print(change)
    if not found:
        print("no kernel differs")
    results.content["against"] = {
        "revision": revision,
        "commit": commit,
        "changes": [change.as_json() for change in found],
    }


def _cpu_seconds() -> float:
    """That this process and the processes it has waited for have taken."""
    return sum(os.times()[:4])


def _commit(revision: str) -> str:
    """The commit that a revision names."""
    command = ["git", "-C", str(_ROOT), "rev-parse", "--verify", "--quiet", "--end-of-options"]
    try:
        done = subprocess.run([*command, f"{revision}^{{commit}}"], capture_output=True, text=True)
    except OSError as error:
        raise OptionError("against", revision, f"only where git runs ({error})") from error
    if done.returncode:
        raise OptionError("against", revision, "a revision of the git repository that holds this source tree")
    return done.stdout.strip()
