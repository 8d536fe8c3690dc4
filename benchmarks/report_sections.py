"""What the report says, as sections of text and tables: losing rows first, each device apart."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from benchmarks.report import Run

__all__ = ["Measured", "Section", "Table", "by_device", "candidates", "plot_name", "sections", "shell",
           "step_name", "summary"]  # fmt: skip

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
IDENTITY = ("op", "model", "dims", "settings", "dtype", "direction", "backend")  # what makes a row the same row


@dataclass
class Table:
    """A head and rows of text; `marked` are the numbers of the bad ones, before which `mark` stands where colours do not."""

    head: Sequence[str]
    rows: list[Sequence[str]]
    marked: set[int] = field(default_factory=set)
    mark: str = "slower: "


@dataclass
class Section:
    """A title (level 1: a device) with lines of text, perhaps a table, perhaps a plot by the name of its file."""

    title: str
    level: int
    notes: list[str] = field(default_factory=list)
    table: Table | None = None
    plot: str = ""
    svg: str = ""


class Measured(NamedTuple):
    """A timed row with the run that it comes from."""

    run: Run
    row: Mapping[str, Any]

    @property
    def device(self) -> str:
        """Where it ran; what is compared or drawn together has the same."""
        environment = self.run.environment
        if self.row["device"] != "cpu":
            return str(environment["device"])
        where = environment["device"] if environment.get("kind") == "cpu" else f"CPU beside {environment['device']}"
        threads = self.row.get("threads", environment.get("threads"))
        return f"{where}, {threads} thread{'' if threads == 1 else 's'}"

    @property
    def fastest(self) -> tuple[str, Mapping[str, Any]] | None:
        """The fastest peer that is there."""
        there = [(name, p) for name, p in self.row["peers"].items() if "seconds" in p]
        return min(there, key=lambda peer: ratio_of(peer[1], self.row), default=None)

    @property
    def ratio(self) -> float | None:
        """The fastest peer's time over ours; None without a peer."""
        return None if self.fastest is None else ratio_of(self.fastest[1], self.row)

    @property
    def slower(self) -> bool:
        return self.ratio is not None and not self.ratio >= 1


def ratio_of(peer: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """A peer's time over ours as it was beside it: where not all fit into memory together, ours has several times."""
    return float(peer.get("ratio", peer["seconds"] / row["seconds"]))


def by_device(runs: Sequence[Run], kind: str) -> dict[str, list[Measured]]:
    """The timed rows of a kind by device, the newest of each, worst ratio first and those without a peer last."""
    newest: dict[tuple[str, str], Measured] = {}
    for run in sorted((r for r in runs if r.kind == kind), key=lambda r: str(r.content["started"])):
        for row in run.rows:
            measured = Measured(run, row)
            newest[measured.device, json.dumps({k: row.get(k) for k in IDENTITY}, sort_keys=True)] = measured
    devices: dict[str, list[Measured]] = {}
    for (device, _), measured in newest.items():
        devices.setdefault(device, []).append(measured)
    return {d: sorted(rows, key=lambda m: math.inf if m.ratio is None else m.ratio) for d, rows in sorted(devices.items())}


def candidates(row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Ours and the peers that are there, by name."""
    return {f"fastlm {SHORT[row['dtype']]}": row} | {n: p for n, p in row["peers"].items() if "seconds" in p}


def sections(runs: Sequence[Run]) -> list[Section]:
    """The whole report."""
    found = [_overview(runs)]
    kernels, steps = by_device(runs, "kernels"), by_device(runs, "train_step")
    for device in sorted({*kernels, *steps}):
        found.append(Section(device, 1))
        if rows := steps.get(device):
            found.append(_train_step(device, rows))
        if rows := kernels.get(device):
            found += [_kernels_by_op(device, rows), _kernels(rows)]
    found += [*_curves(runs), *_refused(runs), *_compiled(runs), *_plans(runs)]
    return found


def summary(runs: Sequence[Run]) -> list[Section]:
    """The README's part: for each device its train steps, and its kernels by op."""
    found = []
    kernels, steps = by_device(runs, "kernels"), by_device(runs, "train_step")
    for device in sorted({*kernels, *steps}):
        rows = [*steps.get(device, []), *kernels.get(device, [])]
        found.append(Section(device, 1, [_runs_of(rows)]))
        if device in steps:
            found.append(_steps_in_short(steps[device]))
        if device in kernels:
            found.append(_kernels_by_op(device, kernels[device]))
    text = "Every row, with all peers and what was refused: [benchmarks/results/report.md](benchmarks/results/report.md)."
    found.append(Section("", 0, [text]))
    return found


# --- the overview


def _overview(runs: Sequence[Run]) -> Section:
    head = ("run", "kind", "device", "date", "versions", "command")
    rows: list[Sequence[str]] = []
    for run in runs:
        e, changed = run.environment, ", changed since" if run.environment.get("changed") else ""
        versions = [f"{n} {e[n]}" for n in ("fastlm", "torch", "cuda", "triton", "python") if e.get(n)]
        versions.append(f"commit {e.get('commit') or 'unknown'}{changed}")
        versions += [f"{k}={v}" for k, v in (e.get("variables") or {}).items()]
        ended = "" if run.content["finished"] else " **UNFINISHED**"
        rows.append((f"{run.number} {run.path.name}{ended}", run.kind, f"{e['device']}; {e.get('cores', '?')} cores",
                     str(run.content["started"]), ", ".join(versions), f"`{shell(run.content['command'])}`"))  # fmt: skip
    notes = [
        "Times are medians of interleaved samples, with quartiles. A ratio is a peer's time over ours: above 1 we are faster.",
        "Rows are sorted by the ratio to the fastest peer, the worst first; those that we lose are marked.",
    ]
    if any(not run.content["finished"] for run in runs):
        notes.append("Runs marked UNFINISHED were cut off: they hold what was measured until then.")
    return Section("Measurements", 0, notes, Table(head, rows))


def shell(words: Sequence[str]) -> str:
    """A command as it is typed; Python code in double quotes."""
    return " ".join(f'"{word}"' if "'" in word and '"' not in word else shlex.quote(word) for word in words)


def _count(rows: Sequence[Measured]) -> str:
    compared = [m for m in rows if m.ratio is not None]
    alone = f" {len(rows) - len(compared)} rows have no peer." if len(compared) < len(rows) else ""
    lost = sum(m.slower for m in compared)
    return f"**{lost} of {len(compared)} rows are slower than the fastest peer.**{alone}"


def _runs_of(rows: Iterable[Measured]) -> str:
    """The runs that rows come from, each with its date, versions and whether it was cut off."""
    said = []
    for run in {m.run.number: m.run for m in rows}.values():
        e = run.environment
        cut = "" if run.content["finished"] else ", UNFINISHED"
        said.append(f"{run.path.name} ({str(run.content['started'])[:10]}, torch {e.get('torch')}, triton {e.get('triton')}, "
                    f"commit {e.get('commit') or 'unknown'}{cut})")  # fmt: skip
    return f"From {'; '.join(said)}."


# --- the train step


def _train_step(device: str, rows: Sequence[Measured]) -> Section:
    head = ("step", "which", "time (quartiles)", "tokens/s", "GFLOP/s", "of GEMM roof", "peak memory", "setup",
            "ratio", "losses of the first steps", "run")  # fmt: skip
    table = Table(head, [])
    for m in rows:
        for i, (name, c) in enumerate(candidates(m.row).items()):
            if i == 0 and m.slower:
                table.marked.add(len(table.rows))
            table.rows.append((
                step_name(m.row) if i == 0 else "", f"**{name}**" if i == 0 else name, _spread(c),
                f"{c['tokens_per_s']:.0f}", f"{c['flop_per_s'] / 1e9:.4g}", f"{c['roof_fraction']:.0%}",
                _mib(c.get("peak_bytes")), f"{c['setup_seconds']:.1f} s", f"{ratio_of(c, m.row):.3g}",
                " ".join(f"{x:.4f}" for x in c["losses"]), str(m.run.number) if i == 0 else "",
            ))  # fmt: skip
    notes = [
        _count(rows),
        "Model FLOPs are counted as benchmarks/step_flops.py says, alike for all: matrices by the rows that need them, "
        "attention by the pairs that are seen, no padding. Tokens are real ones, of both sides of a translation. The roof is "
        "the fastest GEMM of that dtype, torch's or ours, of the same rounds. Setup is what the first four steps take beyond "
        "four ordinary ones. Rows in float32 have float32 peers only. Settings malloc: PyTorch's glibc keeps memory and takes "
        "huge pages. Peak memory is what benchmarks/train_step.py of that commit says.",
        *_absent(rows, step_name),
    ]
    return Section("Training steps", 2, notes, table, plot_name(device, "train_step"))


def _steps_in_short(rows: Sequence[Measured]) -> Section:
    head = ("training step", "tokens/s", "of GEMM roof", "fastest PyTorch", "ratio", "memory / its", "ratios to all")
    table = Table(head, [])
    for i, m in enumerate(rows):
        if m.slower:
            table.marked.add(i)
        name, peer = m.fastest or ("none", {})
        table.rows.append((
            f"{step_name(m.row)}, {SHORT[m.row['dtype']]}", f"{m.row['tokens_per_s']:.0f}", f"{m.row['roof_fraction']:.0%}",
            name, _number(m.ratio), _number(_over(m.row.get("peak_bytes"), peer.get("peak_bytes"))), _others(m.row),
        ))  # fmt: skip
    return Section("", 2, [_count(rows)], table)


def step_name(row: Mapping[str, Any]) -> str:
    """Model, batch and settings of a training step."""
    d = row["dims"]
    times = f" x {d['accumulate']}" if d["accumulate"] > 1 else ""
    settings = "" if row.get("settings", "default") == "default" else f", {row['settings']} settings"
    sizes = f"({d['seq_len']} + {d['target_len']})" if "target_len" in d else str(d["seq_len"])
    padded = f", {row['padding']:.0%} padding" if row.get("padding") else ""
    rows = f", {d['rows']} rows{padded}" if d.get("rows", "full") != "full" else ""
    saving = "".join(f", {name} {d[name]}" for name in ("moments", "recompute") if name in d)
    return f"{row['model']}, {d['batch_size']} x {sizes} tokens{times}{rows}{saving}{settings}"


def _curves(runs: Sequence[Run]) -> list[Section]:
    head = ("step", "dtype", "steps", "first and last loss", "PyTorch fp32's", "smoothed: worst, mean",
            "each step: worst, mean", "asked", "best validation loss", "PyTorch fp32's", "ratio of times", "run")  # fmt: skip
    table = Table(head, [], mark="MISSED: ")
    for run in (r for r in runs if r.kind == "loss_curve"):
        for row in run.rows:
            if not (row["within"] and row.get("validated", True)):
                table.marked.add(len(table.rows))
            ends = [f"{_number(c[0])}, {_number(c[-1])}" for c in (row["losses"], row["reference_losses"])]
            far = [
                ", ".join("-" if row[f"{k}_{w}"] is None else f"{row[f'{k}_{w}']:.3%}" for w in ("worst", "mean"))
                for k in ("smoothed", "step")
            ]
            best = row.get("best_validation"), row.get("reference_best_validation")
            held_out = ["-" if loss is None else f"{loss:.5g}" for loss in best]
            table.rows.append((step_name(row), SHORT[row["dtype"]], str(row["steps"]), *ends, *far, f"{row['limit']:.1%}",
                               *held_out, _number(row.get("ratio")), str(run.number)))  # fmt: skip
    notes = [
        "Relative deviation of our loss from PyTorch's in float32, the same weights and batches of text.",
        "Best validation loss: the lowest of those measured on the way; ours may be above PyTorch's by 0.1% in float32 "
        "and 0.5% in bfloat16. Ratio of times: PyTorch's time a step over ours, in turns of ten steps.",
    ]
    return [Section("Loss curves", 1, notes, table)] if table.rows else []


# --- kernels


def _kernels_by_op(device: str, rows: Sequence[Measured]) -> Section:
    """Geometric mean and worst ratio to the fastest peer, for each op and backend by dtype."""
    dtypes = [d for d in SHORT if any(m.row["dtype"] == d for m in rows)]
    groups: dict[tuple[str, str], list[Measured]] = {}
    for m in rows:
        groups.setdefault((m.row["op"], m.row["backend"]), []).append(m)
    table = Table(("kernel", *(f"{SHORT[d]}: mean (worst) ratio, rows lost" for d in dtypes)), [])
    means: list[float] = []
    for (op, backend), group in groups.items():
        cells = []
        for dtype in dtypes:
            ratios = [m.ratio for m in group if m.row["dtype"] == dtype and m.ratio is not None]
            if not ratios:
                cells.append("-")
                continue
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            lost = sum(not r >= 1 for r in ratios)
            cells.append(f"{mean:.3g} ({min(ratios):.3g}), {lost} of {len(ratios)}")
        ratios = [m.ratio for m in group if m.ratio is not None]
        means.append(math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.inf)
        table.rows.append((f"{op} ({backend})", *cells))
    order = sorted(range(len(means)), key=means.__getitem__)
    table.rows = [table.rows[i] for i in order]
    table.marked = {place for place, i in enumerate(order) if not means[i] >= 1}
    note = "Ratio of the fastest peer's time to ours, geometric mean over shapes and directions."
    return Section("Kernels", 2, [_count(rows), note], table, plot_name(device, "kernels"))


def _kernels(rows: Sequence[Measured]) -> Section:
    head = ("op", "dimensions", "dtype", "direction", "backend", "time (quartiles)", "GB/s", "TFLOP/s", "of roof",
            "peak memory", "error", "fastest peer", "ratio", "its memory, error", "ratios to all", "run")  # fmt: skip
    table = Table(head, [])
    for i, m in enumerate(rows):
        if m.slower:
            table.marked.add(i)
        name, peer = m.fastest or ("none", {})
        r = m.row
        table.rows.append((
            r["op"], _dims(r["dims"]), SHORT[r["dtype"]], r["direction"], r["backend"], _spread(r),
            _number(r["gbytes_per_s"]), _number(r["tflop_per_s"]), f"{r['roof_fraction']:.0%}", _mib(r["peak_bytes"]),
            _number(r["error_ratio"]), name, _number(m.ratio),
            f"{_mib(peer.get('peak_bytes'))}, {_number(peer.get('error_ratio'))}", _others(r), str(m.run.number),
        ))  # fmt: skip
    differences: dict[str, set[str]] = {}
    for m in rows:
        for name, peer in m.row["peers"].items():
            if "seconds" in peer and peer.get("note"):
                differences.setdefault(f"{m.row['op']}: {name} {peer['note']}", set()).add(name)
    notes = [
        "Error: the largest error against float64 in units of PyTorch's own in the same dtype. Roof: the least time for the "
        "bytes and operations of the op by the copy and GEMM measured beside it.",
        *_absent(rows, lambda row: str(row["op"])), *differences,
    ]  # fmt: skip
    return Section("Every kernel row", 2, notes, table)


def _absent(rows: Iterable[Measured], name_of: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """A line for each reason why peers are absent."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for m in rows:
        for name, peer in m.row["peers"].items():
            if "absent" in peer:
                why = peer["absent"].replace(f"no {m.row.get('op')}", "no such op")  # one line for all that it lacks
                where = reasons.setdefault((name, why), [])
                if name_of(m.row) not in where:
                    where.append(name_of(m.row))
    return [f"Absent for {', '.join(where)}: {name}, {why}" for (name, why), where in reasons.items()]


# --- the rest


def _refused(runs: Sequence[Run]) -> list[Section]:
    rows: list[Sequence[str]] = [
        (e["op"], _dims(e["dims"]), e["dtype"], e["backend"], e["why"], str(run.number))
        for run in runs
        for e in run.content.get("refused", [])
    ]
    note = "These did not pass the check against float64, or failed, and were not timed."
    head = ("op", "dimensions", "dtype", "backend", "why", "run")
    return [Section("Refused", 1, [note], Table(head, rows, set(range(len(rows))), mark=""))] if rows else []


def _compiled(runs: Sequence[Run]) -> list[Section]:
    """Each kernel's worst figures over its configurations, for each GPU that it was compiled for."""
    groups: dict[tuple[str, str, str, str, int], list[Mapping[str, Any]]] = {}
    for run in (r for r in runs if r.kind == "compile"):
        for row in run.rows:
            groups.setdefault((row["target"], row["op"], row["kernel"], row["language"], run.number), []).append(row)
    found = []
    for target in sorted({key[0] for key in groups}):
        head = ("op", "kernel", "language", "configurations", "registers", "spills", "shared memory", "faults", "run")
        table = Table(head, [], mark="FAULT: ")
        mine = [(key, rows) for key, rows in groups.items() if key[0] == target]
        mine.sort(key=lambda item: (not any(r["fault"] for r in item[1]), -max(r["spill_bytes"] for r in item[1]), item[0]))
        for (_, op, kernel, language, number), rows in mine:
            if faults := [r["fault"] for r in rows if r["fault"]]:
                table.marked.add(len(table.rows))
            registers = sorted(r["registers"] for r in rows)
            table.rows.append((
                op, kernel or "launcher", language, str(len(rows)), f"{registers[0]} to {registers[-1]}",
                f"{max(r['spill_bytes'] for r in rows)} B", f"{max(r['shared_bytes'] for r in rows) / 1024:.4g} KiB",
                f"{len(faults)}: {faults[0]}" if faults else "none", str(number),
            ))  # fmt: skip
        lost = len(table.marked)
        note = f"**{lost} of {len(mine)} kernels have a fault.** Compiled, not run: these say nothing about speed."
        found.append(Section(f"Compiled for {target}", 1, [note], table))
    return found


def _plans(runs: Sequence[Run]) -> list[Section]:
    found = []
    for run in (r for r in runs if r.kind == "device"):
        table = Table(("step", "how it ended", "seconds", "rows or tests"), [], mark="")
        for i, row in enumerate(run.rows):
            tests = row.get("tests") or {}
            counts = [f"{n} {what}" for what, n in tests.items() if what != "names"]
            counts += [f"{row['rows']} rows"] if "rows" in row else []
            failed = f": {', '.join(tests['names'])}" if tests.get("names") else ""
            if row["status"] != "done":
                table.marked.add(i)
            table.rows.append((row["step"], row["status"], f"{row.get('seconds', 0):.0f}", ", ".join(counts) + failed))
        ended = {row["step"] for row in run.rows}
        for name in run.content.get("plan", []):
            if name not in ended:
                table.marked.add(len(table.rows))
                table.rows.append((name, "not reached: the run was cut off", "", ""))
        found.append(Section(f"The plan of run {run.number} on {run.environment['device']}", 1, [], table))
    return found


def plot_name(device: str, kind: str) -> str:
    """The name of a device's plot of a kind, without its suffix."""
    slug = "".join(c if c.isalnum() else "-" for c in device.lower().replace("(", " ").split("  ")[0])
    return f"report-{'-'.join(filter(None, slug.split('-')))}-{kind}"


def _dims(dims: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in dims.items())


def _others(row: Mapping[str, Any]) -> str:
    """Every peer's ratio."""
    ratios = {n: ratio_of(p, row) for n, p in row["peers"].items() if "seconds" in p}
    return ", ".join(f"{name} {_number(ratio)}" for name, ratio in ratios.items()) or "-"


def _spread(measured: Mapping[str, Any]) -> str:
    """Median and quartiles in the unit that suits the median."""
    unit, size = next((u, s) for u, s in (("s", 1), ("ms", 1e-3), ("us", 1e-6), ("ns", 0)) if measured["seconds"] >= s)
    scale = size or 1e-9
    return f"{measured['seconds'] / scale:.4g} {unit} ({measured['low'] / scale:.4g} to {measured['high'] / scale:.4g})"


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _mib(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:.4g} MiB"
