"""All that a lent GPU should tell, in one call and a given time, most valuable first.

    python -m benchmarks.device --minutes 9 --out results     on a GPU
    python -m benchmarks.device --dry-run                     anywhere: the commands with their shares of the time
    python -m benchmarks.device --rehearse                    anywhere: really runs each command at its smallest size

Needs torch, triton and numpy; the tests also pytest, pytest-timeout and hypothesis, the kernel benchmarks rich. Nothing of
fastlm needs to be installed; CUDA C++ is built first if nvcc is there.

Every step is a process of its own, which is interrupted, then killed, when its time is over. Time that a step does not use
goes to those behind it. A failing step does not stop the rest. Results are written as they come:

    <device>-<time>-kernels.json, -train_step.json    rows of the steps that have ended
    <device>-<time>-part.json                         rows of the step that is running
    <device>-<time>-device.json                       the plan and how each step ended
    <device>-<time>.log                               what the steps print
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.report_sections import shell
from benchmarks.train_step import TrainStepOptions
from fastlm import native, registry
from fastlm.testbed.options import BenchOptions
from fastlm.testbed.results import Results, environment

__all__ = ["Step", "execute", "main", "plan", "run_plan", "time_for"]

ROOT = Path(__file__).resolve().parent.parent
GRACE = 6.0  # seconds between the interrupt and the kill: pytest lists its failures in them
CLOSING = 5.0  # seconds kept back for the summary
NEEDED = {"tests": ("pytest", "pytest_timeout", "hypothesis"), "kernels": ("rich",), "compare": ("rich",)}
FIRST_OPS = ("attention", "linear_cross_entropy", "cross_entropy", "layer_norm", "add_layer_norm", "adamw", "gelu")
COMPILED = ("compile", "flex")  # peers whose compilation takes longer than all the rest: in the second pass over the ops
PART = "PART"  # stands for the file that a step writes its rows to


@dataclass(frozen=True)
class Step:
    """A command with its weight in the division of time (seconds of a nine-minute plan), and the least it needs."""

    name: str  # group/what, or the group alone
    command: list[str]
    share: float
    least: float
    kind: str = ""  # of the rows that it writes to PART
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        return self.name.split("/")[0]


def time_for(step: Step, later: Sequence[Step], remaining: float) -> float:
    """Seconds for a step before `later` ones: its share of what remains, at least what it needs; 0 if that is not there."""
    if remaining < step.least:
        return 0.0
    return max(step.least, remaining * step.share / (step.share + sum(s.share for s in later)))


def plan(rehearse: bool = False, gpu: bool = True) -> list[Step]:
    """The steps, most valuable first."""
    names = list(registry.ops())
    ops = [n for n in FIRST_OPS if n in names] + [n for n in names if n not in FIRST_OPS]
    steps = []
    if native.why_not("cuda") and (shutil.which("nvcc") or not gpu):
        # Nothing serves this interpreter yet, so there is no build to lose; the GPU tests need the portable module only.
        build = ["--version"] if rehearse else ["build_ext", "--inplace"]
        variables = {"FASTLM_CPU_ISAS": "portable"} if native.why_not("cpu") else {}
        steps.append(Step("build", [sys.executable, "setup.py", *build], 50, 20, variables=variables))
    selected = ["-k", "triton or cuda or test_engine", "--ignore=tests/test_cuda_emulated.py", "--ignore=tests/test_build.py"]
    manner = ["--collect-only", "-q"] if rehearse else ["-v", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None and not rehearse:
        manner += ["-n", str(min(14, os.cpu_count() or 1))]  # most of the time goes into compiling kernels, on the CPU
    steps.append(Step("tests", [sys.executable, "-m", "pytest", "tests", *selected, *manner], 110, 30))
    for i, op in enumerate(ops):
        options = BenchOptions(
            ops=(op,), shapes=_shapes(op, rehearse), dtype=("bfloat16",), direction=("forward", "backward"),
            against=tuple(p for p in BenchOptions().against if p not in COMPILED), seconds=0.05 if rehearse else 0.2,
            out=Path(PART),
        )  # fmt: skip
        steps.append(Step(f"kernels/{op}", _call("fastlm.testbed.bench", options), 30 if i < 3 else 16, 15, "kernels"))
    bf16 = ("eager-bf16-autocast", "compile-bf16", "compile-graphs-bf16")
    for name, dtypes, peers, share in (
        ("eager", ("float32", "bfloat16"), ("eager-fp32", "eager-bf16-autocast"), 45),
        ("compiled", ("bfloat16",), bf16, 100),
    ):
        model = "tiny" if rehearse else "gpt2"
        train = TrainStepOptions(
            model=(model,), dtype=dtypes, against=peers, settings=("default",), seconds=0.5 if rehearse else 10.0,  # type: ignore[arg-type]
            out=Path(PART),
        )  # fmt: skip
        steps.append(Step(f"train_step/{name}", _call("benchmarks.train_step", train), share, 30, "train_step"))
    for op in ops:  # the same rows again with all peers, and in float32
        options = BenchOptions(
            ops=(op,), shapes=_shapes(op, rehearse), dtype=("bfloat16", "float32"), seconds=0.05 if rehearse else 0.2,
            out=Path(PART),
        )  # fmt: skip
        steps.append(Step(f"compare/{op}", _call("fastlm.testbed.bench", options), 12, 20, "kernels"))
    return steps


def _shapes(op: str, smallest: bool) -> str:
    """The op's set for GPUs; or the smallest of all its shapes, as dimensions."""
    sets = registry.get(op).shapes
    if not smallest:
        return "large" if "large" in sets else "default"

    def size(dims: Any) -> float:
        return math.prod(v for v in dims.values() if isinstance(v, int) and not isinstance(v, bool))

    dims = min((dims for shapes in sets.values() for dims in shapes), key=size)
    return ",".join(f"{name}={value}" for name, value in dims.items())


def _call(module: str, options: Any) -> list[str]:
    """Runs a command by its options, without the package that reads them from a command line."""
    name = type(options).__name__
    source = module if module.startswith("benchmarks") else "fastlm.testbed.options"
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    changed = [
        f"{name}=Path({value.as_posix()!r})" if isinstance(value, Path) else f"{name}={value!r}"
        for name, value in given.items()
        if value != getattr(type(options), name, None)
    ]
    code = (
        f"from pathlib import Path; from {source} import {name}; from {module} import run; "
        f"raise SystemExit(run({name}({', '.join(changed)})))"
    )
    return [sys.executable, "-c", code]


def run_plan(steps: Sequence[Step], seconds: float, stem: Path, log: IO[str]) -> Results:
    """Run the steps within a time; the results of each are on disk when it ends, and the summary is returned."""
    summary = Results("device", stem.with_name(f"{stem.name}-device.json"))
    summary.content["plan"] = [step.name for step in steps]
    collected: dict[str, Results] = {}
    part = stem.with_name(f"{stem.name}-part.json")
    named = part.relative_to(ROOT) if part.is_relative_to(ROOT) else part  # steps run in ROOT
    end = time.monotonic() + seconds - CLOSING
    for i, step in enumerate(steps):
        allowed = time_for(step, steps[i + 1 :], end - time.monotonic())
        row: dict[str, Any] = {"step": step.name, "command": [Path(step.command[0]).name, *step.command[1:]]}
        missing = [p for p in NEEDED.get(step.group, ()) if importlib.util.find_spec(p) is None]
        if missing:
            row |= {"status": "failed", "why": f"needs {', '.join(missing)}, which is not installed here"}
        elif not allowed:
            row |= {"status": "not reached"}
        else:
            command = [argument.replace(PART, named.as_posix()) for argument in step.command]
            print(f"{step.name}: up to {allowed:.0f} s", flush=True)
            start = log.tell()
            status, taken = execute(command, allowed, log, step.variables)
            output = _since(log, start)
            row |= {"status": status, "seconds": round(taken, 1), "allowed": round(allowed, 1)}
            if step.group == "tests":
                row["tests"] = _outcomes(output)
            if status.startswith("failed"):
                row["why"] = output.replace(f"{ROOT}/", "").replace(f"{sys.prefix}/", "")[-1500:]
            if step.kind:
                row["rows"] = _collect(part, step.kind, stem, collected, status == "done")
        summary.add(row)
        print(_line(row), flush=True)
    for results in collected.values():
        whole = all(r["status"] == "done" for r in summary.rows if _kind(steps, r["step"]) == results.content["kind"])
        if whole:
            results.finish()
    summary.finish()
    return summary


def execute(
    command: Sequence[str], seconds: float, log: IO[str], variables: dict[str, str] | None = None
) -> tuple[str, float]:
    """Run a command for at most so long, output to `log`; ("done", "failed (status n)" or "timed out", seconds taken)."""
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | (variables or {}), stdin=subprocess.DEVNULL, stdout=log,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    timed_out = False
    try:
        try:
            process.wait(max(0.1, seconds - GRACE))
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(GRACE, seconds))
    finally:  # whatever happens, and whatever it has started
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    taken = time.monotonic() - start
    if timed_out:
        return "timed out", taken
    return ("done" if process.returncode == 0 else f"failed (status {process.returncode})"), taken


def _collect(part: Path, kind: str, stem: Path, collected: dict[str, Results], done: bool) -> int:
    """Move the rows of a step to the file of their kind; how many they are."""
    try:
        content = json.loads(part.read_text())
    except (OSError, ValueError):
        return 0
    if kind not in collected:
        collected[kind] = Results(kind, stem.with_name(f"{stem.name}-{kind}.json"))
    results = collected[kind]
    if refused := content.get("refused"):
        results.content.setdefault("refused", []).extend(refused)
    for row in content["rows"]:
        results.add(row)
    part.unlink()
    return len(content["rows"])


def _kind(steps: Sequence[Step], name: str) -> str:
    return next(step.kind for step in steps if step.name == name)


_VERDICT = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
_ALONE = re.compile(rf"(tests/.+?::.+?) +{_VERDICT}\b.*")  # test PASSED [ 10%]
_WORKER = re.compile(rf"(?:\[gw\d+\] \[ *\d+%\] )?{_VERDICT} (tests/.+?::.+?)(?: - .*)?")  # [gw1] [ 10%] PASSED test


def _outcomes(output: str) -> dict[str, Any]:
    """How many tests passed, failed, ..., and the names of those that failed, from what `pytest -v` printed."""
    outcomes: dict[str, str] = {}
    for line in map(str.rstrip, output.splitlines()):
        if found := _ALONE.fullmatch(line):
            test, verdict = found.groups()
        elif found := _WORKER.fullmatch(line):
            verdict, test = found.groups()
        else:
            continue
        if test not in outcomes or verdict == "ERROR":  # a test that passes may still fail when it cleans up
            outcomes[test] = verdict.lower()
    failed = [test for test, verdict in outcomes.items() if verdict in ("failed", "error")]
    return dict(Counter(outcomes.values())) | {"names": failed[:50]}


def _since(log: IO[str], start: int) -> str:
    """What was written to the log from a position on; the log then stands at its end."""
    log.seek(0, os.SEEK_END)
    with open(log.name, errors="replace") as again:
        again.seek(start)
        return again.read()


def _line(row: dict[str, Any]) -> str:
    said = f"{row['step']}: {row['status']}"
    if "seconds" in row:
        said += f" after {row['seconds']:.0f} s"
    if "rows" in row:
        said += f", {row['rows']} rows"
    said += "".join(f", {n} {what}" for what, n in row.get("tests", {}).items() if what != "names")
    return said if "why" not in row else f"{said}\n    " + row["why"][-600:].replace("\n", "\n    ")


def _show(steps: Sequence[Step], seconds: float) -> None:
    """The commands with the time each gets if all take the time they get."""
    remaining = seconds - CLOSING
    for i, step in enumerate(steps):
        allowed = time_for(step, steps[i + 1 :], remaining)
        remaining -= allowed
        words = [f"{k}={v}" for k, v in step.variables.items()] + ["python", *step.command[1:]]
        print(f"{allowed:5.0f} s  {step.name}\n         {shell(words)}" if allowed else f"    not reached  {step.name}")


def _short_name() -> str:
    """Of the device, as part of a file's name: h100, or the processor's maker and line."""
    name = re.sub(r"\((r|tm)\)", " ", environment()["device"].lower()).split("(")[0]
    words = [w for w in re.findall(r"[a-z0-9]+", name) if w not in ("nvidia", "amd", "intel", "geforce", "instinct")]
    return words[0] if words else "device"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: 9)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results; a rehearsal's: none)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="steps or groups of steps, such as "
                        "tests, kernels, train_step, compare, kernels/attention")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the commands with their shares of the time")
    parser.add_argument("--rehearse", action="store_true", help="really run each command, at its smallest size")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes: got {options.minutes}; allowed: a finite number above 0")
    gpu = torch.cuda.is_available()
    steps = plan(options.rehearse, gpu)
    known = {name for step in steps for name in (step.name, step.group)}
    if unknown := sorted(set(options.only) - known):
        parser.error(f"--only: got {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
    steps = [s for s in steps if not options.only or {s.name, s.group} & {*options.only, "build"}]
    seconds = 60 * options.minutes
    if not gpu:
        print("There is no GPU here: " + ("a rehearsal of the plan at its smallest sizes; " if options.rehearse else
              "a dry run; ") + "no figure of it is a GPU's.")  # fmt: skip
    if options.dry_run or not (gpu or options.rehearse):
        _show(steps, seconds)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a step does not outlive us
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or (Path(scratch) if options.rehearse else ROOT / "benchmarks" / "results")
        folder.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now(datetime.UTC)
        stem = folder.resolve() / f"{_short_name()}-{now:%Y%m%d-%H%M}{'-rehearsal' if options.rehearse else ''}"
        with stem.with_name(stem.name + ".log").open("w+") as log:
            summary = run_plan(steps, seconds, stem, log)
    counts = Counter(row["status"].split(" (")[0] for row in summary.rows)
    print("\n" + ", ".join(f"{n} {status}" for status, n in counts.items()))
    if not gpu:
        print("No GPU took part: these results say that the plan runs, and nothing about a GPU.")
    return int(any(row["status"].startswith("failed") for row in summary.rows))


if __name__ == "__main__":
    raise SystemExit(main())
