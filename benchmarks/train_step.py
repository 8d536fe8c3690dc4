"""A whole training step of GPT-2 or an LSTM, ours against PyTorch's, eager and compiled: the same weights, batch and optimizer.

    python -m benchmarks.train_step --case gpt2-512 gpt2-1024 small --out results.json
    python -m benchmarks.train_step --model gpt2 --batch-size 2 --seq-len 512
    python -m benchmarks.train_step --case small --curve 200 --out curve.json

Every contender is a process of its own, and they take turns, one step at a time; before that the losses and gradient norms of
their first steps must agree with eager float32's, or nothing is timed. What is counted:

- model FLOPs a token: 6 N + 6 L C T. N: parameters that multiply a token's activations, that is the matrices of all blocks
  and the head (tied or not, once), without positions, norms and biases; 2 N forward and 4 N backward. L layers, width C and
  T tokens of context: attention's two products take 4 C T a token and layer forward, twice that backward, and causal
  masking needs half of it. Recomputation counts for nothing. Of an LSTM 6 N, N being all matrices but the embedding's lookup.
- roof: the fastest bfloat16 (float32) GEMM, torch's or ours, of one more process that takes its turn in every round.
- peak memory: the most that the contender's process has held from its start to the end of its first four steps, as the
  system counts it (VmHWM): interpreter, libraries, weights, planning and compilation included. Beside it in the file,
  steady_bytes: the most during the third and fourth step only. On a GPU: the most that torch allocated there.
- setup: time of the first four steps beyond four ordinary ones: compilation, autotuning, planning, graph capture.
- settings "malloc": PyTorch's contenders once more with a glibc that keeps its memory and takes huge pages. Few users set
  this; it favours PyTorch, which allocates in every step. Ours run as they are.

--curve trains ours and PyTorch's float32 from the same weights on the same batches of text and compares the loss curves.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import loss_curve
from benchmarks.step_turns import MismatchError, WorkerError, compare
from benchmarks.step_worker import CANDIDATES, Task
from fastlm.models import LSTMConfig
from fastlm.testbed.results import Results
from fastlm.train.config import OptionError, TrainConfig
from fastlm.train.decoder import gpt_config
from fastlm.train.device import choose_device
from fastlm.train.presets import LSTM_PRESETS, PRESETS

__all__ = ["CASES", "TrainStepOptions", "flop_per_token", "main", "matmul_parameters", "run"]

CASES = {
    "gpt2-512": ("gpt2", 2, 512), "gpt2-1024": ("gpt2", 4, 1024), "small": ("small", 8, 256), "lstm": ("lstm", 32, 64),
    "lstm-bytes": ("lstm-bytes", 32, 64),
}  # fmt: skip
LSTM_VOCABULARIES = {"lstm": LSTM_PRESETS["small"].data.vocab_size, "lstm-bytes": 257}
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "malloc": {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
        "MALLOC_TOP_PAD_": str(1 << 26),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    },
}
ENGINE = {"float32": "fastlm-fp32", "bfloat16": "fastlm-bf16"}

Peer = Literal["eager-fp32", "eager-bf16-autocast", "compile-fp32", "compile-bf16", "compile-graphs-bf16"]


@dataclass(frozen=True)
class TrainStepOptions:
    """Times whole training steps of our engine and of PyTorch side by side, with their losses."""

    case: tuple[Literal["gpt2-512", "gpt2-1024", "small", "lstm", "lstm-bytes"], ...] = ()
    """Named models with batches: 124M at 2 x 512 and 4 x 1024, 12M at 8 x 256; two LSTM layers of 512 units with
    4096 tokens, or 257 bytes, at 32 x 64; instead of model, batch-size and seq-len."""
    model: tuple[Literal["tiny", "small", "gpt2", "lstm", "lstm-bytes"], ...] = ("small",)
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
    """Time for the measured rounds of all contenders that fit into memory together; at least five rounds."""
    seed: int = 0
    """Of weights and tokens."""
    curve: int = 0
    """Compare the loss curves of so many steps on text, instead of timing; 200 is what our results have."""
    text: tuple[str, ...] = ()
    """Files, folders or globs for the curve; none: the source of Python's standard library."""
    tokenizer: str | None = None
    """For the curve: a tokenizer.json or a folder that holds one, or "bytes"; default: a BPE is trained on the text."""
    out: Path | None = None
    """Write results to this JSON file as they come, with the environment and the command."""


def matmul_parameters(config: dict[str, Any]) -> int:
    """N of the FLOP count: the matrices of the blocks and the head."""
    if "cell" in config:
        gates, width = {"lstm": 4, "gru": 3, "rnn": 1}[config["cell"]], config["n_hidden"] or config["n_embd"]
        inputs = config["n_embd"] + (config["n_layer"] - 1) * width
        return gates * width * (inputs + config["n_layer"] * width) + int(config["vocab_size"] * config["n_embd"])
    width, inner = config["n_embd"], config["n_inner"] or 4 * config["n_embd"]
    block = 3 * width * width + width * width + 2 * width * inner
    return int(config["n_layer"] * block + config["vocab_size"] * width)


def flop_per_token(config: dict[str, Any], seq_len: int) -> int:
    """Model FLOPs a token, forward and backward: 6 N + 6 L C T."""
    if "cell" in config:
        return 6 * matmul_parameters(config)
    return 6 * matmul_parameters(config) + 6 * config["n_layer"] * config["n_embd"] * seq_len


def run(options: TrainStepOptions) -> int:
    """Exit status 1 if a contender of ours did not compute the same thing or was lost, or a curve strayed."""
    cases = _cases(options)
    results = Results("loss_curve" if options.curve else "train_step", options.out)
    failed = False
    for model, batch_size, seq_len in cases:
        config, task = _task(options, model, batch_size, seq_len)
        dims = {"batch_size": task.batch_size, "seq_len": task.seq_len, "accumulate": task.accumulate}
        label = f"{model}: batch {task.batch_size} x {task.seq_len} tokens x {task.accumulate}"
        print(f"\n{label}", flush=True)
        ours = [ENGINE[d] for d in options.dtype]
        try:
            if options.curve:
                rows = loss_curve.curves(task, ours, _say)
                for row in rows:
                    results.add({"model": model, "dims": dims, "config": config, "device": task.device, **row})
                print(loss_curve.text(rows), flush=True)
                failed |= not all(row["within"] for row in rows)
                continue
            settings = _settings(options, task.device)
            measured = compare(task, (*ours, *options.against), settings, options.seconds, _say)
        except (MismatchError, WorkerError) as error:
            failed = True
            print(f"REFUSED, {error}", flush=True)
            continue
        field = {n: _rates(config, task, measured, c) for n, c in measured["candidates"].items()}
        for dtype in options.dtype:
            if "absent" in field[ENGINE[dtype]]:
                failed = True
                continue
            for name in settings:
                results.add(_row(model, dims, config, task, name, next(iter(settings)), dtype, measured, field))
        print(_table(config, task, measured, field, tuple(settings)), flush=True)
    if not failed:
        results.finish()
    return int(failed)


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _cases(options: TrainStepOptions) -> list[tuple[str, int, int]]:
    """(model, sequences, tokens in each) of everything that is asked for. OptionError for what cannot be."""
    for name in ("model", "dtype", "settings"):
        if not getattr(options, name):
            raise OptionError(name, "none", "one and more")
    for name in ("batch_size", "seq_len", "accumulate"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise OptionError(name, value, "1 and more")
    if not options.seconds > 0:
        raise OptionError("seconds", options.seconds, "numbers above 0")
    if options.curve < 0:
        raise OptionError("curve", options.curve, "0 and more")
    if options.case:
        if options.batch_size or options.seq_len:
            raise OptionError("case", ", ".join(options.case), "a case has its own batch-size and seq-len")
        return [CASES[name] for name in options.case]
    return [
        (m, options.batch_size or _preset(m).optimizer.batch_size, options.seq_len or _preset(m).data.seq_len)
        for m in options.model
    ]


def _preset(model: str) -> TrainConfig:
    return LSTM_PRESETS["small"] if model in LSTM_VOCABULARIES else PRESETS[model]


def _task(options: TrainStepOptions, model: str, batch_size: int, seq_len: int) -> tuple[dict[str, Any], Task]:
    preset = _preset(model)
    if model in LSTM_VOCABULARIES:
        shape = preset.model
        config = dataclasses.asdict(LSTMConfig(LSTM_VOCABULARIES[model], shape.n_embd, n_layer=shape.n_layer))
    else:
        config = dataclasses.asdict(gpt_config(preset, preset.data.vocab_size))
        config["n_positions"] = max(config["n_positions"], seq_len)
    rates = {"lr": preset.optimizer.lr, "min_lr": preset.optimizer.min_lr, "warmup": max(1, options.curve // 10)}
    text = {"sources": options.text, "tokenizer": options.tokenizer, "vocab_size": preset.data.vocab_size}
    data = {**text, **rates, "steps": options.curve} if options.curve else {}
    device = choose_device(options.device)[0].type
    return config, Task(config, batch_size, seq_len, options.accumulate, device, options.seed, data)


def _settings(options: TrainStepOptions, device: str) -> dict[str, dict[str, str]]:
    """Those that change something here; says why another is left out."""
    chosen: dict[str, dict[str, str]] = {name: SETTINGS[name] for name in options.settings}
    why = _no_malloc_settings(device) if "malloc" in chosen else ""
    if why and len(chosen) > 1:
        print(f"settings malloc: absent, {why}", flush=True)
        del chosen["malloc"]
    return chosen


def _no_malloc_settings(device: str) -> str:
    """Why the allocator's settings would change nothing; "" if they do."""
    if device != "cpu":
        return "a GPU's memory does not come from malloc"
    libc = (
        os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) else ""
    )
    return "" if libc else "this system's malloc is not glibc's"


def _rates(
    config: dict[str, Any], task: Task, measured: dict[str, Any], result: dict[str, Any]
) -> dict[str, Any]:
    """A contender's measurements with what follows from them."""
    if "absent" in result:
        return result
    tokens_per_s = task.tokens / result["seconds"]
    flop_per_s = tokens_per_s * flop_per_token(config, task.seq_len)
    roof = measured["roofs"][result["dtype"]]["flop_per_s"]
    return result | {
        "tokens_per_s": tokens_per_s,
        "flop_per_s": flop_per_s,
        "roof_fraction": flop_per_s / roof,
    }


def _peers(field: dict[str, Any], settings: str, first: str, dtype: str) -> dict[str, dict[str, Any]]:
    """PyTorch's contenders under these settings to compare ours with: of its precision, and for bfloat16 float32 too."""
    peers = {}
    for label, c in field.items():
        name, _, under = label.partition(" ")
        candidate = CANDIDATES[name]
        if candidate.engine or (under or first) != settings:
            continue
        if dtype == "bfloat16" or candidate.dtype == dtype:
            absent = "absent" in c or ENGINE[dtype] not in c["ratios"]
            peers[name] = c if absent else c | {"ratio": c["ratios"][ENGINE[dtype]]}
    return peers


def _row(
    model: str, dims: dict[str, int], config: dict[str, Any], task: Task, settings: str, first: str, dtype: str,
    measured: dict[str, Any], field: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Our engine in one dtype beside its peers, PyTorch's contenders under some settings."""
    return {
        "model": model, "dims": dims, "config": config, "matmul_parameters": matmul_parameters(config),
        "flop_per_token": flop_per_token(config, task.seq_len), "settings": settings, "variables": SETTINGS[settings],
        "threads": measured["threads"], "float32_precision": measured["float32_precision"], "device": task.device,
        "roof": measured["roofs"][dtype], "groups": measured["groups"], **field[ENGINE[dtype]],
        "peers": _peers(field, settings, first, dtype),
    }  # fmt: skip


def _table(
    config: dict[str, Any], task: Task, measured: dict[str, Any], field: dict[str, Any], settings: tuple[str, ...]
) -> str:
    """All contenders, one a line, with columns for each setting; what it comes to; the losses of their first steps."""
    ours = [n for n in field if n in ENGINE.values()]
    more = settings[1:]
    head = [
        "step", "ms", "quartiles", *(f"ms {s}" for s in more), "tokens/s", "GFLOP/s", "of roof", "peak MiB",
        *(f"MiB {s}" for s in more), "setup s", *(f"/ {n}" for n in ours),
        *(f"{s} / {n}" for s in more for n in ours),
    ]  # fmt: skip
    lines, absent = [tuple(head)], []
    for name, c in field.items():
        if "absent" in c:
            absent.append(f"{name}: absent, {c['absent']}")
        if " " in name or "absent" in c:
            continue
        others = [field.get(f"{name} {s}", {}) for s in more]

        def over(result: dict[str, Any], own: str, name: str = name) -> str:
            ratio = 1.0 if name == own else result.get("ratios", {}).get(own)
            return "-" if ratio is None else f"{ratio:.2f}"

        lines.append((
            name, f"{1e3 * c['seconds']:.1f}", f"{1e3 * c['low']:.1f} to {1e3 * c['high']:.1f}",
            *(_scaled(o.get("seconds"), 1e3, ".1f") for o in others), f"{c['tokens_per_s']:.0f}",
            f"{c['flop_per_s'] / 1e9:.1f}", f"{c['roof_fraction']:.1%}", _scaled(c["peak_bytes"], 2**-20, ".0f"),
            *(_scaled(o.get("peak_bytes"), 2**-20, ".0f") for o in others), f"{c['setup_seconds']:.1f}",
            *(over(c, own) for own in ours), *(over(o, own) if o else "-" for o in others for own in ours),
        ))  # fmt: skip
    roofs = ", ".join(
        f"{dtype} {r['flop_per_s'] / 1e9:.0f} GFLOP/s ({r['gemm']})" for dtype, r in measured["roofs"].items()
    )
    formula = (
        f"6 N{'' if 'cell' in config else ' + 6 L C T'} = {flop_per_token(config, task.seq_len) / 1e6:.1f} MFLOP a token, "
        f"N = {matmul_parameters(config) / 1e6:.2f}M"
    )
    first = [(n, c["losses"]) for n, c in field.items() if "absent" not in c]
    losses = [("losses of the first steps", *map(str, range(1, 1 + max(len(x) for _, x in first))))] if first else []
    losses += [(name, *(f"{x:.5f}" for x in values)) for name, values in first]
    groups = [f"group {i}: {', '.join(g)}" for i, g in enumerate(measured["groups"], 1) if len(measured["groups"]) > 1]
    return "\n".join([
        *_aligned(lines), f"roof: {roofs}; {formula}", *_verdicts(field, settings), *absent, *groups, *_aligned(losses),
    ])  # fmt: skip


def _verdicts(field: dict[str, Any], settings: tuple[str, ...]) -> list[str]:
    """A line for each dtype of ours: speed against the fastest PyTorch, share of the roof, memory against eager bfloat16."""
    lines = []
    for dtype, name in ENGINE.items():
        c = field.get(name, {"absent": ""})
        if "absent" in c:
            continue
        parts = []
        for s in settings:
            peers = {n: p for n, p in _peers(field, s, settings[0], dtype).items() if "ratio" in p}
            if peers:
                ratio, best = min((p["ratio"], n) for n, p in peers.items())
                parts.append(f"{ratio:.2f} times the fastest PyTorch of settings {s} ({best})")
        eager = field.get("eager-bf16-autocast", {"absent": ""})
        parts.append(f"{c['roof_fraction']:.0%} of the roof")
        if "absent" not in eager and c["peak_bytes"] and eager["peak_bytes"]:
            parts.append(f"{c['peak_bytes'] / eager['peak_bytes']:.2f} of eager-bf16-autocast's peak memory")
        lines.append(f"{name}: {', '.join(parts)}")
    return lines


def _scaled(value: float | None, by: float, form: str) -> str:
    return "-" if value is None else f"{value * by:{form}}"


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
