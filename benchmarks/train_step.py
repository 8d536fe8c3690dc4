"""A whole training step, ours against PyTorch's, eager and compiled: the same weights, batch and optimizer, no dropout.

    python -m benchmarks.train_step --case gpt2-512 gpt2-1024 small --out results.json
    python -m benchmarks.train_step --case bert bert-mini transformer transformer-full t5 --out results.json
    python -m benchmarks.train_step --model gpt2 --batch-size 2 --seq-len 512
    python -m benchmarks.train_step --case small --curve 200 --out curve.json

Every contender is a process of its own, and they take turns, one step at a time; before that the losses and gradient norms of
their first steps must agree with eager float32's, or nothing is timed. What is counted:

- tokens: of a translation model those of both sides, without padding. transformer has batches of sentences of like lengths, as
  Vaswani et al. made theirs; transformer-random takes pairs as they come, which pads much more than a careful user lets it;
  transformer-full has sentences of one length, without padding. PyTorch gets them padded, ours packed; what padding is a share
  of is both sides' padded tokens. All other models' rows are full, so neither side has padding or a mask for it.
- model FLOPs: see benchmarks/step_flops.py.
- roof: the fastest bfloat16 (float32) GEMM, torch's or ours, of one more process that takes its turn in every round.
- peak memory: the most that the contender's process has held from its start to the end of its first four steps, as the
  system counts it (VmHWM): interpreter, libraries, weights, planning and compilation included. Beside it in the file,
  steady_bytes: the most during the third and fourth step only. On a GPU: the most that torch allocated there.
- setup: time of the first four steps beyond four ordinary ones: compilation, autotuning, planning, graph capture.
- settings "malloc": PyTorch's contenders once more with a glibc that keeps its memory and takes huge pages. Few users set
  this; it favours PyTorch, which allocates in every step. Ours run as they are.

--curve trains ours and PyTorch's float32 from the same weights on the same batches of text, in turns of ten steps, and compares
their loss curves, validation losses and times. An LSTM carries its state from batch to batch; as in all of these there is no
dropout, since the masks would not be the same.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks import loss_curve
from benchmarks.step_flops import flop_per_step, flop_per_token, formula, matmul_parameters
from benchmarks.step_task import SHAPES, Task
from benchmarks.step_turns import MismatchError, WorkerError, compare
from benchmarks.step_worker import CANDIDATES
from fastlm.testbed.results import Results
from fastlm.train.config import OptionError
from fastlm.train.device import choose_device

__all__ = ["CASES", "Case", "TrainStepOptions", "main", "run"]


class Case(NamedTuple):
    """A model of SHAPES and its batch; None for the shape's own."""

    model: str
    batch_size: int | None = None
    seq_len: int | None = None
    rows: str = "full"


CASES = {
    "gpt2-512": Case("gpt2", 2, 512), "gpt2-1024": Case("gpt2", 4, 1024), "small": Case("small"), "lstm": Case("lstm"),
    "lstm-bytes": Case("lstm-bytes"), "bert": Case("bert"), "bert-mini": Case("bert-mini"),
    "transformer": Case("transformer", rows="sorted"), "transformer-full": Case("transformer"),
    "transformer-random": Case("transformer", rows="random"), "t5": Case("t5"),
}  # fmt: skip
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

    case: tuple[
        Literal[
            "gpt2-512", "gpt2-1024", "small", "lstm", "lstm-bytes", "bert", "bert-mini", "transformer", "transformer-full",
            "transformer-random", "t5",
        ],
        ...,
    ] = ()  # fmt: skip
    """Named models with batches: GPT-2 124M at 2 x 512 and 4 x 1024, 12M at 8 x 256; two LSTM layers of 512 units with 4096
    tokens, or 257 bytes, at 32 x 64; BERT's pre-training, base at 8 x 128 and mini (4 layers of 256) at 32 x 128; the base
    Transformer at 32 pairs of about 30 tokens, their lengths alike, equal, or as they come; T5 1.1 small at 4 x (512 + 114);
    instead of model, batch-size, seq-len and rows."""
    model: tuple[
        Literal["tiny", "small", "gpt2", "lstm", "lstm-bytes", "bert", "bert-mini", "transformer", "t5"], ...
    ] = ("small",)
    """Shapes, most as the presets of fastlm train: small has 12 million parameters, gpt2 124 million."""
    batch_size: int | None = None
    """Sequences in a micro-batch; default: the preset's."""
    seq_len: int | None = None
    """Tokens in a sequence; default: the preset's."""
    rows: Literal["full", "sorted", "random"] = "full"
    """Of a translation model: all of seq-len tokens, or of many lengths, batched by length or as they come."""
    accumulate: int = 1
    """Micro-batches in a step."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Of our optimizer, as fastlm train has it."""
    recompute: Literal["none", "mlp", "block"] = "none"
    """What our engine computes again in backward, as fastlm train has it; not of an LSTM."""
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
    validation_windows: int = 256
    """For the curve: windows of held-out text that a validation takes; 0: all of it."""
    out: Path | None = None
    """Write results to this JSON file as they come, with the environment and the command."""


def run(options: TrainStepOptions) -> int:
    """Exit status 1 if a contender of ours did not compute the same thing or was lost, or a curve strayed."""
    cases = _cases(options)
    results = Results("loss_curve" if options.curve else "train_step", options.out)
    failed = False
    for case in cases:
        model, task = case.model, _task(options, case)
        print(f"\n{model}: {task.label}", flush=True)
        ours = [ENGINE[d] for d in options.dtype]
        try:
            if options.curve:
                rows = loss_curve.curves(task, ours, _say)
                for row in rows:
                    results.add({"model": model, "dims": task.dims, "config": task.config, "device": task.device, **row})
                print(loss_curve.text(rows), flush=True)
                failed |= not all(row["within"] and row["validated"] for row in rows)
                continue
            settings = _settings(options, task.device)
            measured = compare(task, (*ours, *options.against), settings, options.seconds, _say)
        except (MismatchError, WorkerError) as error:
            failed = True
            print(f"REFUSED, {error}", flush=True)
            continue
        field = {n: _rates(task, measured, c) for n, c in measured["candidates"].items()}
        for dtype in options.dtype:
            if "absent" in field[ENGINE[dtype]]:
                failed = True
                continue
            for name in settings:
                results.add(_row(model, task, name, next(iter(settings)), dtype, measured, field))
        print(_table(task, measured, field, tuple(settings)), flush=True)
    if not failed:
        results.finish()
    return int(failed)


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _cases(options: TrainStepOptions) -> list[Case]:
    """Everything that is asked for. OptionError for what cannot be."""
    for name in ("model", "dtype", "settings"):
        if not getattr(options, name):
            raise OptionError(name, "none", "one and more")
    for name in ("batch_size", "seq_len", "accumulate"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise OptionError(name, value, "1 and more")
    if not options.seconds > 0:
        raise OptionError("seconds", options.seconds, "numbers above 0")
    for name in ("curve", "validation_windows"):
        if getattr(options, name) < 0:
            raise OptionError(name, getattr(options, name), "0 and more")
    if options.case:
        if options.batch_size or options.seq_len or options.rows != "full":
            raise OptionError("case", ", ".join(options.case), "a case has its own batch-size, seq-len and rows")
        cases = [CASES[name] for name in options.case]
    else:
        cases = [Case(name, options.batch_size, options.seq_len, options.rows) for name in options.model]
    for case in cases:
        shape = SHAPES[case.model]
        if case.rows not in shape.rows:
            raise OptionError("rows", case.rows, f"{', '.join(shape.rows)} for {case.model}")
        if options.curve and shape.preset is None:
            raise OptionError("curve", options.curve, f"0 for {case.model}; a gpt or an lstm learns from plain text")
        if case.seq_len and case.seq_len > (shape.longest or case.seq_len):
            raise OptionError("seq_len", case.seq_len, f"up to {shape.longest} for {case.model}")
    return cases


def _task(options: TrainStepOptions, case: Case) -> Task:
    shape = SHAPES[case.model]
    config, seq_len = dataclasses.asdict(shape.config), case.seq_len or shape.seq_len
    if shape.family == "gpt":
        config["n_positions"] = max(config["n_positions"], seq_len)
    data: dict[str, Any] = {}
    if options.curve and (preset := shape.preset) is not None:
        rates = {"lr": preset.optimizer.lr, "min_lr": preset.optimizer.min_lr, "warmup": max(1, options.curve // 10)}
        text = {"sources": options.text, "tokenizer": options.tokenizer, "vocab_size": preset.data.vocab_size}
        data = {**text, **rates, "steps": options.curve, "windows": options.validation_windows or None}
    return Task(
        shape.family, config, case.batch_size or shape.batch_size, seq_len, options.accumulate,
        choose_device(options.device)[0].type, options.seed, data, round(shape.target_len * seq_len / shape.seq_len),
        case.rows, options.moments, options.recompute,
    )  # fmt: skip


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


def _rates(task: Task, measured: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """A contender's measurements with what follows from them."""
    if "absent" in result:
        return result
    flop_per_s = flop_per_step(task) / result["seconds"]
    roof = measured["roofs"][result["dtype"]]["flop_per_s"]
    return result | {
        "tokens_per_s": task.tokens / result["seconds"],
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
    model: str, task: Task, settings: str, first: str, dtype: str, measured: dict[str, Any], field: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Our engine in one dtype beside its peers, PyTorch's contenders under some settings."""
    return {
        "model": model, "dims": task.dims, "config": task.config, "matmul_parameters": matmul_parameters(task),
        "flop_per_token": flop_per_token(task), "tokens": task.tokens, "padding": task.padding, "flops": formula(task),
        "settings": settings, "variables": SETTINGS[settings],
        "threads": measured["threads"], "float32_precision": measured["float32_precision"], "device": task.device,
        "roof": measured["roofs"][dtype], "groups": measured["groups"], **field[ENGINE[dtype]],
        "peers": _peers(field, settings, first, dtype),
    }  # fmt: skip


def _table(task: Task, measured: dict[str, Any], field: dict[str, Any], settings: tuple[str, ...]) -> str:
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
    first = [(n, c["losses"]) for n, c in field.items() if "absent" not in c]
    losses = [("losses of the first steps", *map(str, range(1, 1 + max(len(x) for _, x in first))))] if first else []
    losses += [(name, *(f"{x:.5f}" for x in values)) for name, values in first]
    groups = [f"group {i}: {', '.join(g)}" for i, g in enumerate(measured["groups"], 1) if len(measured["groups"]) > 1]
    return "\n".join([
        *_aligned(lines), f"roof: {roofs}; {formula(task)}", *_verdicts(field, settings), *absent, *groups, *_aligned(losses),
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
