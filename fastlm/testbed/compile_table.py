"""Rows of compiled kernels as text: a table within 120 columns, and what changed between two sets of them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .compiled import Group, Row
from .targets import TARGETS

__all__ = ["LEGEND", "Change", "changes", "table"]

WIDTH = 120
LEGEND = """\
regs, spill, shared: registers and spilled bytes of a thread, bytes of shared memory of a program; st: stages
tensor: instructions for tensor cores / of them those of more than a warp (wgmma, tcgen05.mma); local: on local memory
16B/less: accesses to global memory of 16 bytes a thread and more / of fewer (all counted as they stand in the code)
resident: warps that a multiprocessor holds at most of what it has room for, and what forbids more
s: seconds to compile, - from a cache or with its whole file
configuration: what differs among the configurations of a kernel; 16*i32 is an integer known to be a multiple of 16"""
_HEAD = "  {:19}{:>5}{:>6}{:>7}{:>6}{:>3}{:>7}{:>6}{:>9}{:>6} {:4}{:>6}  "
_TITLES = ("kernel", "regs", "spill", "shared", "warps", "st", "tensor", "local", "16B/less", "resi", "dent", "s")
_BOUNDS = {"registers": "regs", "shared": "shar", "warps": "warp", "programs": "prog", "tensor memory": "tmem"}
_FIGURES = ("registers", "spill_bytes", "shared_bytes", "warps", "stages", "instructions", "tensor_core",
            "warpgroup", "local_memory", "wide", "narrow", "resident_warps")  # fmt: skip


def table(group: Group, max_spill: int) -> str:
    """The rows of one op, GPU and language."""
    rows, job = group.rows, group.job
    kernels = len({row.kernel for row in rows})
    language = "Triton" if job.language == "triton" else "CUDA C++"
    title = f"{job.op} for {job.target} ({TARGETS[job.target].chip}), {language}: "
    title += f"{_count(len(rows), 'configuration')} of {_count(kernels, 'kernel')}, {group.seconds:.1f} s"
    lines = [title, _HEAD.format(*_TITLES).replace("resi dent", "resident ") + "configuration"]
    for row in sorted(rows, key=lambda r: r.kernel):  # stable: in the order of the calls
        different = _distinct(row, [r for r in rows if r.kernel == row.kernel and not r.error])
        lines += _lines(row, different)
        if fault := row.fault(max_spill):
            lines.append(f"    FAULT: {fault if row.error else fault.upper()}"[: 2 * WIDTH])
    return "\n".join(lines)


def _lines(row: Row, different: str) -> list[str]:
    if row.error:
        return [f"  {row.kernel or '(launcher)'}"]
    most = TARGETS[row.target].warps
    head = _HEAD.format(
        row.kernel, row.registers, row.spill_bytes, row.shared_bytes, row.warps or "?",
        "-" if row.stages is None else row.stages, f"{row.tensor_core}/{row.warpgroup}", row.local_memory,
        f"{row.wide}/{row.narrow}", "?" if row.resident_warps is None else f"{row.resident_warps}/{most}",
        _BOUNDS.get(row.bound or "", ""),
        "-" if row.seconds is None else f"{row.seconds:.1f}",
    )  # fmt: skip
    parts = textwrap.wrap(different, WIDTH - len(head)) or [""]
    return [(head + parts[0]).rstrip(), *(" " * len(head) + part for part in parts[1:])]


def _distinct(row: Row, alike: Sequence[Row]) -> str:
    """What tells a configuration from the others of its kernel, without saying the same thing twice."""
    if row.language == "cuda":
        return "<" + ", ".join(row.configuration.values()) + ">" if row.configuration else ""
    columns = {name: [r.configuration.get(name, "") for r in alike] for name in row.configuration}
    columns = {name: values for name, values in columns.items() if len(set(values)) > 1}
    # A tensor's dtype, or that it is None, is left out where it follows from what is shown before.
    said = [values for values in columns.values() if set(values) <= {"True", "False"}]
    words = []
    for name, values in columns.items():
        if any(value.startswith("*") for value in values):
            shown = list(zip(*said, strict=True)) if said else [()] * len(alike)
            if len(set(zip(shown, values, strict=True))) == len(set(shown)):
                continue
            said.append(values)
        value = row.configuration[name].lstrip("*").replace(" ", "-")
        if value != "False":
            words.append(name if value == "True" else f"{name}={value}")
    return " ".join(words)


class Change(NamedTuple):
    """A kernel before and after; None where it is not there."""

    before: Row | None
    after: Row | None
    calls: Sequence[str]

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Figures and constants that differ, as (before, after)."""
        if self.before is None or self.after is None:
            return {}
        found = {f: (getattr(self.before, f), getattr(self.after, f)) for f in _FIGURES}
        one, two = self.before.configuration, self.after.configuration
        found |= {name: (one.get(name), two.get(name)) for name in dict.fromkeys([*one, *two])}
        return {name: pair for name, pair in found.items() if pair[0] != pair[1]}

    def __str__(self) -> str:
        row = self.after or self.before
        assert row is not None
        arguments = ", ".join(row.configuration.values()) if row.language == "cuda" else ""
        where = f"{row.op} {row.target} {row.kernel}" + (f"<{arguments}>" if arguments else "")
        if self.before is None or self.after is None:
            word = "new" if self.before is None else "gone"
            what = f"{word}: {row.registers} registers, spill {row.spill_bytes}, shared {row.shared_bytes}"
        else:
            what = ", ".join(
                f"{n.removesuffix('_bytes')} {a} -> {b}" for n, (a, b) in self.differences.items()
            )
        more = f" and {len(self.calls) - 1} more" if self.calls[1:] else ""
        return f"{where}: {what}" + (f" [{self.calls[0]}{more}]" if self.calls else "")

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        row = self.after or self.before
        assert row is not None
        return {
            "op": row.op, "target": row.target, "language": row.language, "kernel": row.kernel,
            "calls": list(self.calls), "new": self.before is None, "gone": self.after is None,
            "differences": {name: list(pair) for name, pair in self.differences.items()},
        }  # fmt: skip


def changes(before: Iterable[Group], after: Iterable[Group]) -> list[Change]:
    """What differs, launch by launch: the same calls of the same ops start these kernels and those."""
    old, new = _launches(before), _launches(after)
    calls: dict[tuple[int, int], tuple[Row | None, Row | None, list[str]]] = {}
    for key in dict.fromkeys([*new, *old]):
        one, two = old.get(key), new.get(key)
        calls.setdefault((id(one), id(two)), (one, two, []))[2].append(key[3])
    matched = {id(row) for one, two, _ in calls.values() if one and two for row in (one, two)}
    found = []
    for one, two, labels in calls.values():
        alone = (one is None or two is None) and id(one or two) not in matched
        change = Change(one, two, [label for label in dict.fromkeys(labels) if label])
        if alone or change.differences:
            found.append(change)
    return sorted(found, key=lambda c: [(c.after or c.before).op, (c.after or c.before).target])  # type: ignore[union-attr]


def _launches(groups: Iterable[Group]) -> Mapping[tuple[Any, ...], Row]:
    found: dict[tuple[Any, ...], Row] = {}
    for group in groups:
        job = (group.job.op, group.job.target, group.job.language)
        for (call, kernel, times), row in group.launches.items():
            found[(*job, call, kernel, times)] = row
        for row in group.rows:
            if row.language == "cuda" and not row.error:
                found[(*job, "", row.kernel, *row.configuration.values())] = row
    return found


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")
