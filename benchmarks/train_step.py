"""A whole training step of GPT-2, ours against PyTorch's, eager and compiled: the same weights, batch and optimizer.

    python -m benchmarks.train_step --model small gpt2 --batch-size 2 --seq-len 512 --out results.json

All candidates run side by side in one process, in interleaved rounds; before that the losses and gradient norms of their
first steps must agree with eager float32's, or nothing is timed. What is counted:

- model FLOPs a token: 6 N + 6 L C T. N: parameters that multiply a token's activations, that is the matrices of all blocks
  and the head (tied or not, once), without positions, norms and biases; 2 N forward and 4 N backward. L layers, width C and
  T tokens of context: attention's two products take 4 C T a token and layer forward, twice that backward, and causal
  masking needs half of it. Recomputation counts for nothing.
- roof: the fastest bfloat16 (float32) GEMM that torch reaches in that process, the better of a measurement before and one
  after the timings.
- peak memory: on a CPU what one candidate adds to the resident memory of a process of its own, untimed (in one process they
  would share what malloc keeps); on a GPU the most that torch allocated for it.
- setup: time of the first four steps beyond four ordinary ones: compilation, autotuning, planning, graph capture.
- settings "malloc": everything once more in a process whose glibc keeps its memory and takes huge pages. Few users set this;
  it favours PyTorch, which allocates in every step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.step_worker import CANDIDATES, Task
from fastlm.testbed.results import Results
from fastlm.train.build import gpt_config
from fastlm.train.config import PRESETS, OptionError
from fastlm.train.device import choose_device

__all__ = ["TrainStepOptions", "flop_per_token", "main", "matmul_parameters", "run"]

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "default": {},
    "malloc": {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    },
}
ENGINE = {"float32": "fastlm-fp32", "bfloat16": "fastlm-bf16"}

Peer = Literal["eager-fp32", "eager-bf16-autocast", "compile-fp32", "compile-bf16", "compile-graphs-bf16"]


@dataclass(frozen=True)
class TrainStepOptions:
    """Times whole training steps of our engine and of PyTorch side by side, with their losses."""

    model: tuple[Literal["tiny", "small", "gpt2"], ...] = ("small",)
    """Shapes, as the presets of fastlm train: small has 12 million parameters, gpt2 124 million."""
    batch_size: int | None = None
    """Sequences in a micro-batch; default: the preset's."""
    seq_len: int | None = None
    """Tokens in a sequence; default: the preset's."""
    accumulate: int = 1
    """Micro-batches in a step."""
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Of our engine."""
    against: tuple[Peer, ...] = (
        "eager-fp32",
        "eager-bf16-autocast",
        "compile-fp32",
        "compile-bf16",
        "compile-graphs-bf16",
    )
    """PyTorch's steps; compile-graphs: mode reduce-overhead, on a GPU."""
    settings: tuple[Literal["default", "malloc"], ...] = ("default", "malloc")
    """Of the allocator; malloc: only where glibc is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    seconds: float = 30.0
    """Time for the measured rounds of one model and settings, all candidates together; at least five rounds."""
    seed: int = 0
    """Of weights and tokens."""
    skip_memory: bool = False
    """Leave out peak memory on a CPU, which takes a process for each candidate."""
    out: Path | None = None
    """Write results to this JSON file as they come, with the environment and the command."""


def matmul_parameters(config: dict[str, Any]) -> int:
    """N of the FLOP count: the matrices of the blocks and the head."""
    width, inner = config["n_embd"], config["n_inner"] or 4 * config["n_embd"]
    block = 3 * width * width + width * width + 2 * width * inner
    return int(config["n_layer"] * block + config["vocab_size"] * width)


def flop_per_token(config: dict[str, Any], seq_len: int) -> int:
    """Model FLOPs a token, forward and backward: 6 N + 6 L C T."""
    return 6 * matmul_parameters(config) + 6 * config["n_layer"] * config["n_embd"] * seq_len


def run(options: TrainStepOptions) -> int:
    """Exit status 1 if a candidate did not compute the same thing or a measurement broke off."""
    results = Results("train_step", options.out)
    failed = False
    for model in options.model:
        config, task = _task(options, model)
        for settings in options.settings:
            label = f"{model}: batch {task.batch_size} x {task.seq_len} tokens x {task.accumulate}, settings {settings}"
            if settings == "malloc" and (why := _no_malloc_settings(task.device)):
                print(f"\n{label}: absent, {why}", flush=True)
                continue
            measured = _measure(task, settings, options.skip_memory)
            if "error" in measured:
                failed = True
                print(f"\n{label}: REFUSED, {measured['error']}", flush=True)
                continue
            for dtype in options.dtype:
                results.add(_row(model, config, task, settings, dtype, measured))
            print(f"\n{label}\n{_table(config, task, measured)}", flush=True)
    if not failed:
        results.finish()
    return int(failed)


def _task(options: TrainStepOptions, model: str) -> tuple[dict[str, Any], Task]:
    preset = PRESETS[model]
    batch_size = preset.optimizer.batch_size if options.batch_size is None else options.batch_size
    seq_len = preset.data.seq_len if options.seq_len is None else options.seq_len
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len), ("accumulate", options.accumulate)):
        if value < 1:
            raise OptionError(name, value, "1 and more")
    for name in ("model", "dtype", "settings"):
        if not getattr(options, name):
            raise OptionError(name, "none", "one and more")
    if not options.seconds > 0:
        raise OptionError("seconds", options.seconds, "numbers above 0")
    config = dataclasses.asdict(gpt_config(preset, preset.data.vocab_size))
    config["n_positions"] = max(config["n_positions"], seq_len)
    return config, Task(
        config, batch_size, seq_len, options.accumulate,
        (*(ENGINE[d] for d in options.dtype), *options.against), choose_device(options.device)[0].type,
        options.seconds, options.seed,
    )  # fmt: skip


def _no_malloc_settings(device: str) -> str:
    """Why the allocator's settings would change nothing; "" if they do."""
    if device != "cpu":
        return "a GPU's memory does not come from malloc"
    libc = (
        os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) else ""
    )
    return "" if libc else "this system's malloc is not glibc's"


def _measure(task: Task, settings: str, skip_memory: bool) -> dict[str, Any]:
    """The worker's comparison, with each candidate's peak memory; {"error": why} if there is none."""
    with (
        tempfile.TemporaryDirectory() as cache
    ):  # empty at first, so that compilation is seen at its full price
        measured = _worker("compare", task, settings, cache)
        if task.device == "cpu" and not skip_memory:
            for name, result in measured.get("candidates", {}).items():
                if "absent" not in result:
                    alone = _worker("peak", dataclasses.replace(task, candidates=(name,)), settings, cache)
                    result |= {"peak_absent": alone["error"]} if "error" in alone else alone
    return measured


def _worker(what: str, task: Task, settings: str, cache: str) -> dict[str, Any]:
    """The result of a process of its own; {"error": why} if it left none."""
    path = Path(cache) / "result.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.step_worker",
        what,
        json.dumps(dataclasses.asdict(task)),
        str(path),
    ]
    environment = os.environ | SETTINGS[settings] | {"TORCHINDUCTOR_CACHE_DIR": str(Path(cache) / "inductor")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(path.read_text())
        return {"error": result["mismatch"]} if "mismatch" in result else result
    if done.returncode < 0:
        return {"error": f"the process was killed by signal {-done.returncode} (9: often for want of memory)"}
    return {"error": f"the process ended with status {done.returncode}\n{done.stderr[-2000:]}"}


def _rates(
    config: dict[str, Any], task: Task, measured: dict[str, Any], result: dict[str, Any]
) -> dict[str, Any]:
    """A candidate's measurements with what follows from them."""
    if "absent" in result:
        return result
    tokens_per_s = task.tokens / result["seconds"]
    flop_per_s = tokens_per_s * flop_per_token(config, task.seq_len)
    roof = measured["roofs"][result["dtype"]]["flop_per_s"]
    return {"peak_bytes": None} | result | {
        "tokens_per_s": tokens_per_s,
        "flop_per_s": flop_per_s,
        "roof_fraction": flop_per_s / roof,
    }


def _row(
    model: str, config: dict[str, Any], task: Task, settings: str, dtype: str, measured: dict[str, Any]
) -> dict[str, Any]:
    """Our engine in one dtype beside its peers: those that compute in that precision, and for bfloat16 the float32 ones too."""
    candidates = {name: _rates(config, task, measured, c) for name, c in measured["candidates"].items()}
    ours = candidates.pop(ENGINE[dtype])
    peers = {
        name: c if "absent" in c else c | {"ratio": c["seconds"] / ours["seconds"]}
        for name, c in candidates.items()
        if not CANDIDATES[name].engine and (dtype == "bfloat16" or CANDIDATES[name].dtype == dtype)
    }
    dims = {"batch_size": task.batch_size, "seq_len": task.seq_len, "accumulate": task.accumulate}
    return {
        "model": model, "dims": dims, "config": config, "matmul_parameters": matmul_parameters(config),
        "flop_per_token": flop_per_token(config, task.seq_len), "settings": settings, "variables": SETTINGS[settings],
        "threads": measured["threads"], "float32_precision": measured["float32_precision"], "device": task.device,
        "roof": measured["roofs"][dtype], **ours, "peers": peers,
    }  # fmt: skip


def _table(config: dict[str, Any], task: Task, measured: dict[str, Any]) -> str:
    """All candidates, one a line, and the losses of their first steps."""
    candidates = {name: _rates(config, task, measured, c) for name, c in measured["candidates"].items()}
    ours = [name for name in candidates if CANDIDATES[name].engine]
    head = (
        "step",
        "ms",
        "quartiles",
        "tokens/s",
        "GFLOP/s",
        "of roof",
        "peak MiB",
        "setup s",
        *(f"/ {n}" for n in ours),
    )
    lines, absent = [head], []
    for name, c in candidates.items():
        if "absent" in c:
            absent.append(f"{name}: absent, {c['absent']}")
            continue
        peak = c.get("peak_bytes")
        lines.append((
            name, f"{1e3 * c['seconds']:.1f}", f"{1e3 * c['low']:.1f} to {1e3 * c['high']:.1f}", f"{c['tokens_per_s']:.0f}",
            f"{c['flop_per_s'] / 1e9:.1f}", f"{c['roof_fraction']:.1%}", "-" if peak is None else f"{peak / 2**20:.0f}",
            f"{c['setup_seconds']:.1f}", *(f"{c['seconds'] / candidates[n]['seconds']:.2f}" for n in ours),
        ))  # fmt: skip
    roofs = ", ".join(
        f"{dtype} {r['flop_per_s'] / 1e9:.0f} GFLOP/s" for dtype, r in measured["roofs"].items()
    )
    n = matmul_parameters(config)
    formula = (
        f"6 N + 6 L C T = {flop_per_token(config, task.seq_len) / 1e6:.1f} MFLOP a token, N = {n / 1e6:.2f}M"
    )
    losses = [
        ("losses of the first steps", *map(str, range(1, 1 + len(next(iter(_losses(candidates).values()))))))
    ]
    losses += [(name, *(f"{x:.5f}" for x in values)) for name, values in _losses(candidates).items()]
    return "\n".join([*_aligned(lines), f"roof: {roofs}; {formula}", *absent, *_aligned(losses)])


def _losses(candidates: dict[str, Any]) -> dict[str, list[float]]:
    return {name: c["losses"] for name, c in candidates.items() if "absent" not in c}


def _aligned(lines: list[tuple[str, ...]]) -> list[str]:
    """Columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    ]


def main(arguments: list[str] | None = None) -> int:
    import tyro

    config = tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff
    options = tyro.cli(TrainStepOptions, prog="python -m benchmarks.train_step", description=__doc__, args=arguments,
                       config=config)  # fmt: skip
    try:
        return run(options)
    except OptionError as error:
        print(f"benchmarks.train_step: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
