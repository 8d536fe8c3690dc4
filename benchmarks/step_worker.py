"""The measuring half of benchmarks.train_step: it runs in a process of its own, so that allocator settings and peak memory
are that process's alone, and leaves what it measured as JSON.

    python -m benchmarks.step_worker compare|peak '{task}' RESULT.json
"""

from __future__ import annotations

import copy
import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain_gpt import PlainGPT, PlainStep
from fastlm.engine import AdamWConfig, Engine
from fastlm.models import GPT, GPTConfig
from fastlm.testbed import roof, timing
from fastlm.train.build import moved_from_start
from fastlm.train.device import choose_threads

__all__ = ["CANDIDATES", "ORACLE", "Candidate", "MismatchError", "Task", "compare", "peak"]

Batches = Sequence[dict[str, Tensor]]
Step = Callable[[Batches], tuple[Tensor, ...]]  # -> loss, gradient norm before clipping, ...

FIRST_STEPS = 4  # whose losses are compared; the engine captures its CUDA graph in the third


@dataclass(frozen=True)
class Candidate:
    """What is timed: our engine in a dtype, or PyTorch eager or compiled, in float32 or under bfloat16 autocast."""

    engine: bool
    dtype: str
    compile_mode: str | None = None
    needs_gpu: bool = False


CANDIDATES = {
    "fastlm-fp32": Candidate(True, "float32"),
    "fastlm-bf16": Candidate(True, "bfloat16"),
    "eager-fp32": Candidate(False, "float32"),
    "eager-bf16-autocast": Candidate(False, "bfloat16"),
    "compile-fp32": Candidate(False, "float32", "default"),
    "compile-bf16": Candidate(False, "bfloat16", "default"),
    "compile-graphs-bf16": Candidate(False, "bfloat16", "reduce-overhead", needs_gpu=True),
}
ORACLE = "eager-fp32"

# How far the losses and the gradient norms of the first steps may be from eager float32's, relative. Seen with 2 to 12 layers:
# float32 3e-6 and 2e-5; bfloat16 3e-4 and 4e-3, where PyTorch's autocast has 1e-4 and 2e-3. No causal mask: 4e-3 and 5e-2.
TOLERANCES = {"float32": (5e-5, 3e-4), "bfloat16": (2e-3, 2e-2)}


@dataclass(frozen=True)
class Task:
    """What to measure; plain JSON values."""

    config: dict[str, Any]  # GPTConfig's
    batch_size: int
    seq_len: int
    accumulate: int
    candidates: tuple[str, ...]
    device: str
    seconds: float
    seed: int = 0

    @cached_property
    def tokens(self) -> int:
        """In one step."""
        return self.batch_size * self.seq_len * self.accumulate


class MismatchError(RuntimeError):
    """A candidate does not compute what the oracle computes."""


def compare(task: Task) -> dict[str, Any]:
    """Steps of all candidates side by side: first their losses, then interleaved timings and the roofs around them.

    Returns {"roofs", "candidates": {name: measurements or {"absent": why}}}; all times in seconds, memory in bytes.

    Raises:
        MismatchError: losses or gradient norms of the first steps differ by more than TOLERANCES.
    """
    model, batches = _start(task)
    trajectories: dict[str, list[tuple[float, float]]] = {}
    steps: dict[str, Callable[[], object]] = {}
    measured: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys((ORACLE, *task.candidates)):
        candidate = CANDIDATES[name]
        if candidate.needs_gpu and task.device == "cpu":
            measured[name] = {"absent": "needs a GPU"}
            continue
        step: Step | None = None  # one that is not timed must be gone before the next one's memory is counted
        held = _reset_gpu_peak(task.device)
        try:
            step = _step(candidate, copy.deepcopy(model), task.device)
            seconds, losses = _first_steps(step, batches)
        except Exception as error:
            if candidate.engine or name == ORACLE:
                raise
            # A peer that cannot run here is shown with its reason; it does not stop the rest.
            reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
            measured[name] = {"absent": f"{type(error).__name__}: {reason}"}
            continue
        trajectories[name] = losses
        if name in task.candidates:
            steps[name] = partial(step, batches)
            measured[name] = {
                "dtype": candidate.dtype,
                "losses": [loss for loss, _ in losses],
                "grad_norms": [norm for _, norm in losses],
                "first_steps": sum(seconds),
            }
            if task.device == "cuda":
                measured[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - held
    _agree(trajectories)
    del model, step
    before = _roofs(task)
    timings = timing.interleaved(steps, device=task.device, seconds=task.seconds, cold=False)
    after = _roofs(task)
    for name, t in timings.items():
        setup = max(0.0, measured[name].pop("first_steps") - FIRST_STEPS * t.median)
        measured[name] |= {
            "seconds": t.median, "low": t.low, "high": t.high, "rounds": t.rounds, "setup_seconds": setup,
        }  # fmt: skip
    roofs = {
        d: {"before": before[d], "after": after[d], "flop_per_s": max(before[d], after[d])} for d in before
    }
    return {
        "roofs": roofs, "candidates": {name: measured[name] for name in task.candidates}, "tokens": task.tokens,
        "threads": torch.get_num_threads(), "float32_precision": torch.get_float32_matmul_precision(),
    }  # fmt: skip


def peak(task: Task) -> dict[str, Any]:
    """Resident bytes that the one candidate of the task adds, on a CPU, to a process that has run such a step before.

    That first step is a minute model's: it imports what torch imports late, the compiler among it. The peak is that of the
    steps after the first two (`steady`), so that compilation's own memory is left out; what it keeps is not. Where the
    system cannot forget a peak (not Linux), the first steps count too.
    """
    candidate = CANDIDATES[task.candidates[0]]
    minute = replace(
        task, config=task.config | {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_inner": None}, seq_len=8
    )
    for t in (minute, task):
        base = _resident()
        model, batches = _start(t)
        step = _step(candidate, model, t.device)
        del model
        for _ in range(2):
            step(batches)
        forgotten = _forget_peak()
        for _ in range(2):
            step(batches)
    return {"peak_bytes": max(0, _resident(highest=True) - base), "steady": forgotten}


def _start(task: Task) -> tuple[GPT, Batches]:
    """The weights and the micro-batches that all candidates start from.

    Weights of N(0, 1 / width) keep every activation near 1 at any width: at GPT-2's own 0.02 a narrow model is so nearly linear
    that a missing causal mask moves its loss by 1e-5, and another GELU not at all.
    """
    torch.manual_seed(task.seed)
    config = GPTConfig(**task.config | {"initializer_range": task.config["n_embd"] ** -0.5})
    model = moved_from_start(GPT(config), torch.default_generator)
    shape = task.accumulate, task.batch_size, task.seq_len + 1
    ids = torch.randint(task.config["vocab_size"], shape).to(task.device)
    batches = [{"input_ids": row[:, :-1].contiguous(), "targets": row[:, 1:].contiguous()} for row in ids]
    return model, batches


def _step(candidate: Candidate, model: GPT, device: str) -> Step:
    """A whole training step as a function of the micro-batches. The model's weights are taken."""
    optimizer = AdamWConfig()
    if candidate.engine:
        return Engine(model, optimizer, dtype=getattr(torch, candidate.dtype), device=device).step
    plain = PlainGPT(model.config)
    plain.load_state_dict(model.state_dict())
    return PlainStep(plain.to(device), optimizer, candidate.dtype == "bfloat16", candidate.compile_mode)


def _first_steps(step: Step, batches: Batches) -> tuple[list[float], list[tuple[float, float]]]:
    """(seconds, (loss, gradient norm)) of each of the first steps."""
    seconds, losses = [], []
    if isinstance(step, PlainStep):
        step.exact_norm = True
    for _ in range(FIRST_STEPS):
        start = time.perf_counter()
        loss, norm = step(batches)[:2]
        losses.append((loss.item(), norm.item()))  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    if isinstance(step, PlainStep):
        step.exact_norm = False
    return seconds, losses


def _agree(trajectories: dict[str, list[tuple[float, float]]]) -> None:
    """Raise MismatchError unless every candidate's losses and gradient norms are the oracle's."""
    wrong = []
    for name, trajectory in trajectories.items():
        for i, (got, expected) in enumerate(zip(trajectory, trajectories[ORACLE], strict=True)):
            for what, a, b, tolerance in zip(
                ("loss", "gradient norm"), got, expected, TOLERANCES[CANDIDATES[name].dtype], strict=True
            ):
                if not abs(a - b) <= tolerance * abs(b):
                    wrong.append(
                        f"{name}, step {i + 1}: {what} {a:.7g}, {ORACLE} has {b:.7g}, tolerance {tolerance:g}"
                    )
    if wrong:
        raise MismatchError("the candidates do not compute the same thing\n  " + "\n  ".join(wrong))


def _roofs(task: Task) -> dict[str, float]:
    """The fastest GEMM in FLOP/s by dtype: a large square one, and those of this model's MLP."""
    tokens, width = task.batch_size * task.seq_len, task.config["n_embd"]
    sizes = (tokens, 4 * width, width), (tokens, width, 4 * width)
    seconds = min(0.5, task.seconds / 10)
    return {
        name: max(roof.measure(task.device, getattr(torch, name), s, seconds).flop_per_s for s in ((), sizes))
        for name in dict.fromkeys(CANDIDATES[c].dtype for c in task.candidates)
    }


def _reset_gpu_peak(device: str) -> int:
    """Start a new peak of GPU memory; returns the bytes that are held now."""
    gc.collect()
    if device != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(highest: bool = False) -> int:
    """Resident bytes of this process, now or at the highest."""
    if _STATUS.exists():
        field = "VmHWM:" if highest else "VmRSS:"
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) << 10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def _forget_peak() -> bool:
    """Let the peak of resident memory begin anew; False where the system cannot."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def main() -> None:
    what, task, path = sys.argv[1:]
    given = json.loads(task)
    torch.set_num_threads(choose_threads()[0])
    result: dict[str, Any]
    try:
        result = {"compare": compare, "peak": peak}[what](
            Task(**given | {"candidates": tuple(given["candidates"])})
        )
    except MismatchError as error:
        result = {"mismatch": str(error)}
    Path(path).write_text(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    main()
