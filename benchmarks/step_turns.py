"""Processes that take turns: every contender of a training step in one of its own, only one of them running at a time.

A round gives each a turn, in an order shuffled anew, so that whatever else the machine does hits all alike. As many contenders
as fit into memory are there together; if not all of them do, PyTorch's come in several groups, each beside all of our engine's,
and are compared with what our engine took in that group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.step_task import Task
from benchmarks.step_worker import CANDIDATES, FIRST_STEPS, ORACLE, TOLERANCES

__all__ = ["MismatchError", "Worker", "WorkerError", "agree", "compare"]

ROOT = Path(__file__).resolve().parent.parent
SHORTEST_TURN = 0.05  # seconds; very short steps are done several times in a turn
GEMM_SECONDS = 0.02  # for each matrix product in a round
REST = 0.01  # seconds between two turns: OpenMP's threads spin for a while after the last one
MIN_ROUNDS = 5


class MismatchError(RuntimeError):
    """A candidate does not compute what the oracle computes."""


class WorkerError(RuntimeError):
    """A worker that has ended or failed; the message says why."""


class Worker:
    """A process of benchmarks.step_worker. Its standard error goes to a file, whose last line is the reason if it dies.

    variables: environment variables beside this process's.
    """

    def __init__(self, task: Task, name: str, variables: Mapping[str, str]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
        command = [sys.executable, "-m", "benchmarks.step_worker", json.dumps(dataclasses.asdict(task)), name]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | dict(variables), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, text=True,
        )  # fmt: skip

    def ask(self, do: str, *arguments: Any) -> Any:
        """The result of a method of the worker's contender. WorkerError if it failed, or the process ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, "with": arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(self._end())
        reply = json.loads(line)
        if "error" in reply:
            self.close()
            raise WorkerError(reply["error"])
        return reply["result"]

    def close(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what a process that has died never read
                    pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def _end(self) -> str:
        status = self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ["no message"])[-1][:200]
        self.close()
        if status < 0:
            return f"the process was killed by signal {-status} (9: often for want of memory)"
        return f"the process ended with status {status}: {last}"


def agree(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise MismatchError unless every candidate's losses and gradient norms are the oracle's."""
    wrong = []
    for label, first in found.items():
        kinds = ("losses", "grad_norms")
        for kind, tolerance in zip(kinds, TOLERANCES[CANDIDATES[label.split()[0]].dtype], strict=True):
            for i, (a, b) in enumerate(zip(first[kind], found[ORACLE][kind], strict=True)):
                if not abs(a - b) <= tolerance * abs(b):
                    what = {"losses": "loss", "grad_norms": "gradient norm"}[kind]
                    wrong.append(f"{label}, step {i + 1}: {what} {a:.7g}, {ORACLE} has {b:.7g}, tolerance {tolerance:g}")
    if wrong:
        raise MismatchError("the candidates do not compute the same thing\n  " + "\n  ".join(wrong))


def compare(
    task: Task, names: Sequence[str], settings: Mapping[str, Mapping[str, str]], seconds: float,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Steps of all candidates side by side: their first losses, then rounds of timed turns with the GEMM roof among them.

    Args:
        names: of CANDIDATES. Our engine's run under the first of the settings only.
        settings: {name: environment variables}; PyTorch's candidates run under each.
        seconds: for the rounds of a group, at least MIN_ROUNDS of them.
        say: told what goes on.

    Returns {"roofs": {dtype: {"flop_per_s", "gemm"}}, "candidates": {label: measurements or {"absent": why}}, "groups", ...};
    labels are names, followed by the settings unless these are the first. Times in seconds, memory in bytes.

    Raises:
        MismatchError: losses or gradient norms of the first steps differ by more than TOLERANCES.
        WorkerError: the oracle could not run, so that nothing can be compared.
    """
    first_settings = next(iter(settings))
    ours = [n for n in names if CANDIDATES[n].engine]
    labels = {
        n if s == first_settings else f"{n} {s}": (n, s)
        for s in settings for n in dict.fromkeys((ORACLE, *names) if s == first_settings else names)
        if s == first_settings or n not in ours
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {
        label: {"absent": "needs a GPU"}
        for label, (n, _) in labels.items() if CANDIDATES[n].needs_gpu and task.device == "cpu"
    }  # fmt: skip
    order = [label for label in labels if label not in found]
    order.sort(key=lambda label: (label != ORACLE, labels[label][0] not in ours))
    samples: dict[str, list[float]] = {label: [] for label in labels}
    rates: dict[str, dict[str, list[float]]] = {}
    here: dict[str, Worker] = {}
    made: dict[str, Worker] = {}
    groups: list[list[str]] = []
    with tempfile.TemporaryDirectory() as cache:  # empty at first, so that compilation is seen at its full price
        inductor = {"TORCHINDUCTOR_CACHE_DIR": str(Path(cache) / "inductor")}
        try:
            here["roof"] = Worker(task, "roof", {})
            waiting = list(order)
            if task.device == "cuda":  # all import at once; nothing is on the GPU before the first command
                made = {n: Worker(task, labels[n][0], {**settings[labels[n][1]], **inductor}) for n in order}
            while waiting:
                label = waiting.pop(0)
                name, setting = labels[label]
                say(f"{label}: first steps")
                worker = made.pop(label, None) or Worker(task, name, {**settings[setting], **inductor})
                try:
                    found[label] = worker.ask("first_steps")
                except WorkerError as error:
                    found[label] = {"absent": str(error)}
                    if label == ORACLE:
                        raise WorkerError(f"{ORACLE}, which all are compared with: {error}") from error
                else:
                    here[label] = worker
                    agree({n: first for n, first in found.items() if "absent" not in first})
                if label == ORACLE and ORACLE not in names:
                    here.pop(ORACLE).close()
                if waiting and (labels[waiting[0]][0] in ours or _room(found, here)):
                    continue
                groups.append([n for n in here if n != "roof"])
                say(f"rounds of {', '.join(groups[-1])}")
                taken = _rounds(here, found, rates, seconds, len(groups))
                for n, turns in taken.items():
                    samples[n] += turns
                    if labels[n][0] not in ours:
                        mine = {own: statistics.median(taken[own]) for own in ours if own in taken}
                        found[n]["ratios"] = {own: statistics.median(turns) / median for own, median in mine.items()}
                for gone in [n for n in here if n != "roof" and labels[n][0] not in ours]:
                    here.pop(gone).close()
        finally:
            for worker in (*here.values(), *made.values()):
                worker.close()
    for label, turns in samples.items():
        if "absent" not in found[label] and turns:
            _summarise(found[label], CANDIDATES[labels[label][0]].dtype, turns)
    first = found[ORACLE]
    medians = {d: {n: statistics.median(r) for n, r in of.items()} for d, of in rates.items()}
    fastest = {d: max(of, key=of.__getitem__) for d, of in medians.items()}
    return {
        "roofs": {d: {"flop_per_s": of[fastest[d]], "gemm": fastest[d], "all": of} for d, of in medians.items()},
        "candidates": {label: found[label] for label in labels if labels[label][0] in names}, "groups": groups,
        "tokens": task.tokens, "threads": first["threads"], "float32_precision": first["float32_precision"],
    }  # fmt: skip


def _room(found: Mapping[str, Mapping[str, Any]], here: Mapping[str, Worker]) -> bool:
    """Whether one more fits beside those that are here, if it is like the largest of them."""
    there = [first for label, first in found.items() if label in here]
    if not there or there[-1]["free_bytes"] is None:
        return True
    largest = max(first["peak_bytes"] for first in found.values() if "absent" not in first)
    swing = max(first["peak_bytes"] - first["held_bytes"] for first in there)
    return bool(there[-1]["free_bytes"] >= 1.1 * largest + swing)


def _rounds(
    here: dict[str, Worker], found: dict[str, dict[str, Any]], rates: dict[str, dict[str, list[float]]],
    seconds: float, seed: int,
) -> dict[str, list[float]]:  # fmt: skip
    """Timed turns until the time is over: seconds a step of each. A worker that dies on the way is absent from then on."""
    counts = {
        n: max(1, math.ceil(SHORTEST_TURN * FIRST_STEPS / found[n]["first_steps"])) for n in here if n != "roof"
    }
    taken: dict[str, list[float]] = {n: [] for n in counts}
    shuffle, start, done = random.Random(seed), time.perf_counter(), 0
    while done < MIN_ROUNDS or time.perf_counter() - start < seconds:
        turns = list(here)
        shuffle.shuffle(turns)
        for label in turns:
            time.sleep(REST)
            try:
                if label == "roof":
                    for dtype, of in here[label].ask("measure", GEMM_SECONDS).items():
                        for name, rate in of.items():
                            rates.setdefault(dtype, {}).setdefault(name, []).append(rate)
                else:
                    taken[label].append(here[label].ask("steps", counts[label]))
            except WorkerError as error:
                if label == "roof":
                    raise
                found[label] = {"absent": f"after {done} rounds: {error}"}
                del here[label], taken[label]
        done += 1
    return taken


def _summarise(first: dict[str, Any], dtype: str, turns: Sequence[float]) -> None:
    """Add median and quartiles."""
    low, median, high = statistics.quantiles(turns, n=4, method="inclusive")
    first |= {
        "dtype": dtype, "seconds": median, "low": low, "high": high, "rounds": len(turns),
        "setup_seconds": max(0.0, first["first_steps"] - FIRST_STEPS * median),
    }  # fmt: skip
