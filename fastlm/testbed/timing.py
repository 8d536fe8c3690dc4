"""Time several functions side by side: interleaved rounds, caches flushed, medians with quartiles.

What is done against flattering oneself, and against noise:
- every round runs every candidate once, in an order shuffled anew by a fixed seed, so that drift hits all alike;
- the first call of each (compilation, autotuning) is timed apart; then all run in turn for a while, so that clocks
  are up and memory is touched;
- `cold`, the default: before every sample a buffer larger than the last-level cache is written, so that inputs come
  from memory, as they do in a step that has run everything else in between. One sample is then one call. With
  cold=False caches keep what the runs before have left, and very short functions are called several times a sample;
- on a GPU a sample is the time between two events, and a spin kernel queued before them covers the launch latency of
  what takes the host up to 2 ms to queue (longer ones wait for the host in real life too);
- on a CPU it is the wall clock, with the threads that torch has. After `keep_memory()` freed memory stays with the
  process, as it does on a GPU, where torch keeps it; else half the time of a memory-bound function goes into page
  faults of its fresh result;
- on a CPU that others use too, a sample begins with a yield, so as to have a time slice before it, and samples during
  which the system took a core away from this process are left out, for all candidates or for none: they say how long
  the others ran. With as many threads as cores there may be no other samples: give torch a thread less.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["CandidateError", "Timing", "interleaved", "keep_memory"]

_SHORTEST_SAMPLE = 1e-4  # seconds; the clock and the call itself cost about 1e-7
_LONGEST_BACKLOG = 2e-3  # seconds of launching that are hidden on a GPU
_SMALLEST_FLUSH = 64 << 20  # bytes, where the size of the cache is unknown or small


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one candidate: median and quartiles of the samples, which are in the order of the rounds."""

    samples: tuple[float, ...]
    first: float  # the very first call, compilation included
    calls: int = 1  # a sample is the mean of so many
    left_out: int = 0  # samples that are not among these, because the process lost a core during them

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """The lower quartile."""
        return self._quartiles()[0]

    @property
    def high(self) -> float:
        """The upper quartile."""
        return self._quartiles()[2]

    @property
    def rounds(self) -> int:
        return len(self.samples)

    def _quartiles(self) -> list[float]:
        if len(self.samples) == 1:
            return [self.samples[0]] * 3
        return statistics.quantiles(self.samples, n=4, method="inclusive")


class CandidateError(RuntimeError):
    """A candidate raised; `name` is its name, `__cause__` what it raised."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(f"{name}: {type(error).__name__}: {error}")
        self.name = name


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, device: torch.device | str, seconds: float = 1.0,
    min_rounds: int = 5, max_rounds: int = 10_000, setup: Callable[[str], object] | None = None, cold: bool = True,
    backlog: bool = True, seed: int = 0,
) -> dict[str, Timing]:  # fmt: skip
    """Time functions of no arguments side by side. See the module's docstring for the method.

    Args:
        candidates: the functions by name; what they return is dropped at once.
        device: where they run, "cpu" or "cuda".
        seconds: wall time of the measured rounds of all candidates together; the warm-up takes about a quarter more.
        min_rounds, max_rounds: bounds on the rounds, whatever the time.
        setup: called with a candidate's name before each of its samples, untimed; a sample is then one call.
        cold: flush the caches before every sample.
        backlog: on a GPU, hide launch latency behind a spin kernel.
        seed: of the order of the rounds.

    Returns:
        A Timing for each candidate, in the order given.

    Raises:
        CandidateError: a candidate (or its setup) raised; nothing is timed past it.
        ValueError: nothing to time, or bounds that contradict each other.
    """
    if not candidates:
        raise ValueError("candidates: got none; allowed: one and more")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"min_rounds: got {min_rounds}; allowed: 1 to max_rounds, {max_rounds}")
    device = torch.device(device)
    meter = _Gpu(device, cold, backlog) if device.type == "cuda" else _Cpu(cold)
    prepare = setup or (lambda name: None)
    first: dict[str, float] = {}
    for name, function in candidates.items():
        with _blaming(name):
            prepare(name)
            first[name] = meter.wall(function)[0]
    several = not cold and setup is None
    calls = _warm_up(candidates, prepare, meter, seconds / 4, several)

    order, shuffle = list(candidates), random.Random(seed)
    samples: dict[str, list[_Sample]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = perf_counter()
        for done in range(max_rounds):
            if done >= min_rounds and perf_counter() - start >= seconds:
                break
            shuffle.shuffle(order)
            readings: list[tuple[str, Callable[[], _Sample]]] = []
            for name in order:
                with _blaming(name):
                    prepare(name)
                    readings.append((name, meter.sample(name, candidates[name], calls[name])))
            for name, read in readings:
                samples[name].append(read())
    finally:
        if collecting:
            gc.enable()
    kept = {name: [s for s in taken if not s.preempted] for name, taken in samples.items()}
    if min(map(len, kept.values())) < min_rounds:
        kept = samples
    return {
        name: Timing(tuple(s.seconds for s in kept[name]), first[name], calls[name], len(samples[name]) - len(kept[name]))
        for name in candidates
    }


class _Sample(NamedTuple):
    seconds: float  # of a call
    preempted: bool = False


def keep_memory() -> bool:
    """Have the C library keep freed memory for this process from now on; False where it is not glibc.

    Without it large blocks go back to the system when freed, and the next one is zeroed page by page at first touch.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_max = -1, -4  # malloc.h
    return mallopt is not None and mallopt(mmap_max, 0) == 1 and mallopt(trim_threshold, -1) == 1


def _warm_up(
    candidates: Mapping[str, Callable[[], object]], prepare: Callable[[str], object], meter: _Cpu | _Gpu,
    seconds: float, several: bool,
) -> dict[str, int]:  # fmt: skip
    """Keep the device busy with all in turn; returns how many calls make a sample of each."""
    shortest = dict.fromkeys(candidates, math.inf)
    start = perf_counter()
    while True:
        for name, function in candidates.items():
            with _blaming(name):
                prepare(name)
                whole, queued = meter.wall(function)
            meter.launch[name] = min(meter.launch.get(name, math.inf), queued)
            shortest[name] = min(shortest[name], whole)
        if perf_counter() - start >= seconds:
            break
    if not several:
        return dict.fromkeys(candidates, 1)
    return {name: max(1, math.ceil(_SHORTEST_SAMPLE / max(t, 1e-9))) for name, t in shortest.items()}


class _Cpu:
    """Samples by the wall clock."""

    def __init__(self, cold: bool) -> None:
        self.launch: dict[str, float] = {}
        size = max(_SMALLEST_FLUSH, 2 * _last_level_cache())
        self.buffer = torch.zeros(size // 8, dtype=torch.int64) if cold else None

    def wall(self, function: Callable[[], object]) -> tuple[float, float]:
        """Seconds of one call, and until it returned."""
        start = perf_counter()
        function()
        taken = perf_counter() - start
        return taken, taken

    def sample(self, name: str, function: Callable[[], object], calls: int) -> Callable[[], _Sample]:
        if self.buffer is not None:
            self.buffer.add_(1)
        _yield_core()
        losses, start = _lost_cores(), perf_counter()
        for _ in range(calls):
            function()
        taken = (perf_counter() - start) / calls
        sample = _Sample(taken, _lost_cores() > losses)
        return lambda: sample


class _Gpu:
    """Samples by events."""

    def __init__(self, device: torch.device, cold: bool, backlog: bool) -> None:
        self.device = device
        self.launch: dict[str, float] = {}
        size = max(_SMALLEST_FLUSH, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.buffer = torch.zeros(size // 4, dtype=torch.int32, device=device) if cold else None
        self.cycles_per_s = self._spin_rate() if backlog else 0.0

    def wall(self, function: Callable[[], object]) -> tuple[float, float]:
        torch.cuda.synchronize(self.device)
        start = perf_counter()
        function()
        queued = perf_counter() - start
        torch.cuda.synchronize(self.device)
        return perf_counter() - start, queued

    def sample(self, name: str, function: Callable[[], object], calls: int) -> Callable[[], _Sample]:
        with torch.cuda.device(self.device):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            hidden = calls * self.launch[name] + 2e-5  # the events are queued too
            if self.cycles_per_s and hidden <= _LONGEST_BACKLOG:
                torch.cuda._sleep(int(1.5 * hidden * self.cycles_per_s))
            if self.buffer is not None:
                self.buffer.add_(1)
            before.record()
            for _ in range(calls):
                function()
            after.record()

        def read() -> _Sample:
            after.synchronize()
            return _Sample(float(before.elapsed_time(after)) * 1e-3 / calls)

        return read

    def _spin_rate(self) -> float:
        """Cycles of torch's spin kernel a second, at clocks that the spinning itself has raised."""
        cycles = 2_000_000
        with torch.cuda.device(self.device):
            for _ in range(3):
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
                torch.cuda._sleep(cycles)
                after.record()
                after.synchronize()
        return cycles / (before.elapsed_time(after) * 1e-3)


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CandidateError(name, error) from error


def _yield_core() -> None:
    """Let the others have their turn now."""
    if hasattr(os, "sched_yield"):
        os.sched_yield()


def _lost_cores() -> int:
    """How often the system has taken a core from a thread of this process that wanted to run; 0 if it does not say."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource is not None else 0


def _last_level_cache() -> int:
    """Bytes of the largest cache of this CPU, as Linux says; 0 where it does not."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()  # "32768K"
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) << (10 if text[-1] == "K" else 20))
    return max(sizes)
