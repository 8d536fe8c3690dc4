"""One contender of benchmarks.train_step in a process of its own, so that allocator, threads and peak memory are its alone.

    python -m benchmarks.step_worker '{task}' NAME

NAME is one of CANDIDATES, or "roof". Commands come as lines of JSON on standard input, each answered by a line on standard
output; between them the process waits, so that whoever asks decides whose turn it is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from benchmarks.plain_gpt import PlainStep
from benchmarks.step_task import FAMILIES, Task, batches, for_peer, model_of
from fastlm.data import Loader, ValidationLoader, prepare
from fastlm.engine import AdamWConfig, Engine, gemm
from fastlm.train.build import moved_from_start
from fastlm.train.device import choose_threads
from fastlm.train.schedule import learning_rate

__all__ = ["CANDIDATES", "ORACLE", "TOLERANCES", "Candidate", "Contender", "Curve", "GemmRoof"]

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
# float32 3e-6 and 2e-5; bfloat16 of GPT-2 3e-4 and 4e-3, where PyTorch's autocast has 1e-4 and 2e-3, of the others 1e-3 and
# 7e-3, where it has 9e-4 and 4e-3. No causal mask: 4e-3 and 5e-2.
TOLERANCES = {"float32": (5e-5, 3e-4), "bfloat16": (2e-3, 2e-2)}


class Contender:
    """One candidate with its weights and micro-batches, which are the same for all.

    Weights of N(0, 1 / width) keep every activation near 1 at any width: at GPT-2's own 0.02 a narrow model is so nearly linear
    that a missing causal mask moves its loss by 1e-5, and another GELU not at all.
    """

    def __init__(self, task: Task, name: str) -> None:
        self.task, self.candidate = task, CANDIDATES[name]
        family = FAMILIES[task.family]
        torch.manual_seed(task.seed)
        model = moved_from_start(model_of(task, **family.start(family.config(**task.config))), torch.default_generator)
        self.batches: Sequence[dict[str, Tensor]] = batches(task)
        self.trainer = trainer_of(self.candidate, model, task)
        if isinstance(self.trainer, PlainStep):
            self.batches = [for_peer(batch) for batch in self.batches]

    def first_steps(self) -> dict[str, Any]:
        """Losses and gradient norms of the first steps, their seconds together, and the memory of this process.

        peak_bytes: the most that the process has held since its start, interpreter, libraries and compiler included (on a
            GPU: the most that torch held there). steady_bytes: the most during the later half of these steps, with what
            is held between them but without the memory that only planning or compiling took; None where the system cannot
            forget a peak. held_bytes: what is held now.
        """
        losses, norms, peaks, seconds = [], [], [], 0.0
        if isinstance(self.trainer, PlainStep):
            self.trainer.exact_norm = True
        for half in range(2):
            forgotten = half == 0 or _forget_peak(self.task.device)
            for _ in range(FIRST_STEPS // 2):
                start = time.perf_counter()
                loss, norm = self.trainer.step(self.batches)[:2]
                losses.append(loss.item())  # waits for a GPU
                norms.append(norm.item())
                seconds += time.perf_counter() - start
            peaks.append(_memory(self.task.device, highest=True))
        if isinstance(self.trainer, PlainStep):
            self.trainer.exact_norm = False
        return {
            "losses": losses, "grad_norms": norms, "first_steps": seconds, "peak_bytes": max(peaks),
            "steady_bytes": peaks[1] if forgotten else None, "held_bytes": _memory(self.task.device),
            "free_bytes": _free(self.task.device), "threads": torch.get_num_threads(),
            "float32_precision": torch.get_float32_matmul_precision(),
        }  # fmt: skip

    def steps(self, count: int) -> float:
        """Seconds a step."""
        start = time.perf_counter()
        for _ in range(count):
            self.trainer.step(self.batches)
        _wait(self.task.device)
        return (time.perf_counter() - start) / count


class GemmRoof:
    """Matrix products whose fastest is the roof: a large square one and those of the task's MLP, by torch and by the engine."""

    def __init__(self, task: Task) -> None:
        self.device = task.device
        tokens, inner, width = task.mlp
        square = 1024 if task.device == "cpu" else 8192
        sizes = (square, square, square), (tokens, inner, width), (tokens, width, inner)
        self.products: dict[str, dict[str, tuple[float, Callable[[], object]]]] = {}
        for dtype in (torch.float32, torch.bfloat16):
            group = self.products.setdefault(str(dtype).removeprefix("torch."), {})
            for m, n, k in sizes:
                # Products of random numbers: zeros draw less power and clock higher.
                a, b = (torch.randn(s, device=task.device).to(dtype) for s in ((m, k), (k, n)))
                out = torch.zeros(m, n, device=task.device, dtype=dtype)
                group[f"torch {m} {n} {k}"] = 2.0 * m * n * k, partial(torch.mm, a, b, out=out)
                group[f"engine {m} {n} {k}"] = 2.0 * m * n * k, partial(gemm.product, a, b, out)

    @torch.no_grad()
    def measure(self, seconds: float) -> dict[str, dict[str, float]]:
        """FLOP/s of every product by dtype, each called for about so long."""
        return {d: {n: self._rate(*p, seconds) for n, p in group.items()} for d, group in self.products.items()}

    def _rate(self, flops: float, call: Callable[[], object], seconds: float) -> float:
        call()
        _wait(self.device)
        start, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - start < seconds:
            call()
            _wait(self.device)
            count += 1
        return flops * count / (time.perf_counter() - start)


class Curve:
    """A training run on text, from the model's ordinary initial weights, by the schedule of fastlm train.

    task.data: sources (files; none: Python's standard library), tokenizer, vocab_size, steps, lr, min_lr, warmup. A recurrent
    model carries its state from batch to batch of a text that goes on, and is validated as all are: each window from nothing.
    """

    def __init__(self, task: Task, name: str) -> None:
        self.task, data = task, task.data
        dataset = prepare(data["sources"] or None, tokenizer=data["tokenizer"], vocab_size=data["vocab_size"])
        recurrent = task.family == "lstm"
        self.loader = Loader(dataset.training, task.batch_size, task.seq_len, task.seed, contiguous=recurrent)
        self.held_out = ValidationLoader(dataset.validation, task.batch_size, task.seq_len, windows=data["windows"])
        torch.manual_seed(task.seed)
        model = model_of(task, vocab_size=dataset.tokenizer.vocab_size)
        self.trainer, self.done = trainer_of(CANDIDATES[name], model, task), 0

    def run(self, count: int) -> dict[str, Any]:
        """The losses of the next so many steps, and their seconds together without those of reading the text."""
        losses, seconds, data = [], 0.0, self.task.data
        for _ in range(count):
            lr = learning_rate(
                self.done, peak=data["lr"], minimum=data["min_lr"], warmup=data["warmup"], steps=data["steps"]
            )
            micro_batches = [self._moved(self.loader.next_batch()) for _ in range(self.task.accumulate)]
            start = time.perf_counter()
            losses.append(self.trainer.step(micro_batches, lr=lr)[0].item())  # waits for a GPU
            seconds += time.perf_counter() - start
            self.done += 1
        return {"losses": losses, "seconds": seconds}

    def validate(self) -> dict[str, Any]:
        """The mean loss of held-out text, always the same, and over how many tokens it was taken."""
        nats, tokens = 0.0, 0
        for batch in self.held_out:
            loss, count = self.trainer.evaluate(self._moved(batch))
            nats, tokens = nats + loss.item(), tokens + int(count.item())
        return {"loss": nats / tokens, "tokens": tokens}

    def _moved(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.to(self.task.device) for n, t in batch.items()}


def trainer_of(candidate: Candidate, model: nn.Module, task: Task) -> Engine | PlainStep:
    """What trains our model, or PyTorch's with its weights: `step`, (micro-batches, lr=None) -> loss, gradient norm before
    clipping, ...; and `evaluate`, batch -> summed loss, terms."""
    optimizer = AdamWConfig(lr=FAMILIES[task.family].lr)
    if candidate.engine:
        optimizer = dataclasses.replace(optimizer, moments=getattr(torch, task.moments))
        if task.recompute != "none":
            model.recompute = task.recompute  # type: ignore[assignment]
        return Engine(model, optimizer, dtype=getattr(torch, candidate.dtype), device=task.device)
    plain = FAMILIES[task.family].plain(model.config)
    plain.load_state_dict(model.state_dict())
    return PlainStep(plain.to(task.device), optimizer, candidate.dtype == "bfloat16", candidate.compile_mode)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


_STATUS, _CLEAR, _MEMINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")


def _field(path: Path, name: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


def _memory(device: str, highest: bool = False) -> int:
    """Bytes of this process, now or at the highest: resident, or on a GPU allocated there."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if highest else torch.cuda.memory_allocated()
    if _STATUS.exists():
        return _field(_STATUS, "VmHWM" if highest else "VmRSS")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def _forget_peak(device: str) -> bool:
    """Let the peak of memory begin anew; False where the system cannot."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _free(device: str) -> int | None:
    """Bytes that are still to be had; None if the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _field(_MEMINFO, "MemAvailable") if _MEMINFO.exists() else None


def serve(task: Task, name: str, commands: TextIO, replies: TextIO) -> None:
    """Make the contender, then answer commands, {"do": a method, "with": arguments}, until there are no more.

    A reply is {"result": ...} or {"error": the exception in a line}, upon which the process should not be asked again.
    """
    contender: Any = None
    for line in commands:
        command = json.loads(line)
        try:
            if contender is None:
                contender = GemmRoof(task) if name == "roof" else (Curve if task.data else Contender)(task, name)
            reply = {"result": getattr(contender, command["do"])(*command["with"])}
        except Exception as error:
            reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
            reply = {"error": f"{type(error).__name__}: {reason}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    task, name = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print must not meet the replies
    torch.set_num_threads(choose_threads()[0])
    serve(Task(**json.loads(task)), name, sys.stdin, replies)


if __name__ == "__main__":
    main()
