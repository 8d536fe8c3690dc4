"""How the rows of `fastlm kernels bench` are shown: a line each as it arrives, and a plot."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from .options import BenchOptions
from .results import Results

__all__ = ["Lines", "MissingPackage", "bytes_text", "plot", "require_matplotlib", "seconds_text"]

_NOISY = 0.5  # quartiles further apart than this part of the median are marked
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Lines:
    """Writes rows as lines of at most about 140 columns. A ratio below 1, a loss, is red like every other failure."""

    def __init__(self, environment: Mapping[str, Any], options: BenchOptions) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.against = options.against
        self.group: tuple[str, ...] = ()
        self.absent: dict[str, dict[str, list[str]]] = {}  # op -> reason -> peers
        state = "what calls leave in the caches" if options.warm else "caches flushed before each call"
        self._print(
            f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}; {state}; "
            "ratio = peer's time / ours: above 1 we are faster; ~ marks a median whose quartiles lie wide apart"
        )

    def row(self, row: Mapping[str, Any]) -> None:
        """One row, with a heading where the op, the shape or the dtype is another than before."""
        dims = " ".join(f"{k}={v}" for k, v in row["dims"].items())
        group = (row["op"], dims, row["dtype"], row["device"])
        peers = {n: p for n, p in row["peers"].items() if "absent" not in p}
        if group != self.group:
            self.group = group
            roof = row["roof"]
            rates = f"{roof['bytes_per_s'] / 1e9:.4g} GB/s, {roof['flop_per_s'] / 1e12:.3g} TFLOP/s"
            checked = "" if row["checked"] == row["dims"] else "; checked at " + " ".join(
                f"{k}={v}" for k, v in row["checked"].items() if v != row["dims"][k]
            )  # fmt: skip
            self._print(f"\n{row['op']} {dims} {row['dtype']} on {row['device']}: roof {rates}{checked}", "bold")
            self._print(
                f"{'':19}{'median':>9} {'quartiles':>17} {'GB/s':>7} {'TFLOP/s':>8} {'of roof':>13} {'memory':>9} "
                f"{'error':>6}  ratio to peer (its error, memory)"
            )  # fmt: skip
        line = Text(f"{row['direction']:9}{row['backend']:10}")
        noisy = row["high"] - row["low"] > _NOISY * row["seconds"]
        line.append(f"{seconds_text(row['seconds']):>9}{'~' if noisy else ' '}", "bold")
        line.append(f"{seconds_text(row['low']) + ' - ' + seconds_text(row['high']):>17} ")
        line.append(f"{row['gbytes_per_s']:7.4g} {row['tflop_per_s']:8.3g} ")
        line.append(f"{row['roof_fraction']:6.1%} {row['bound']:>6} {bytes_text(row['peak_bytes']):>9} ")
        line.append(f"{_error(row['error_ratio']):>6} ")
        for name, peer in peers.items():
            line.append(f" {name} ")
            line.append(f"{peer['ratio']:.2f}", "bold green" if peer["ratio"] >= 1 else "bold red")
            line.append(f" ({_error(peer['error_ratio'])}, {bytes_text(peer['peak_bytes'])})")
        self.console.print(line)
        for name, peer in row["peers"].items():
            reason = peer.get("absent") or peer.get("note")
            if reason:
                who = self.absent.setdefault(row["op"], {}).setdefault(reason, [])
                label = name if "absent" in peer else f"{name}*"
                if label not in who:
                    who.append(label)

    def refused(self, entry: Mapping[str, Any]) -> None:
        """A kernel that is not timed."""
        dims = " ".join(f"{k}={v}" for k, v in entry["dims"].items())
        name = " ".join(part for part in (entry["op"], dims, entry["dtype"], entry["backend"]) if part)
        self._print(f"\n{name}: REFUSED, not timed: {entry['why']}", "bold red")

    def end(self, results: Results) -> None:
        """Absent peers with their reasons, and what was refused."""
        self._print("")
        for op, reasons in self.absent.items():
            for reason, names in reasons.items():
                gone = [n for n in names if not n.endswith("*")]
                there = [n.removesuffix("*") for n in names if n.endswith("*")]
                if gone:
                    self._print(f"{op}: absent: {', '.join(gone)}: {reason}")
                if there:
                    self._print(f"{op}: {', '.join(there)} {reason}")
        refused = results.content.get("refused", [])
        for entry in refused:
            self._print(f"REFUSED: {entry['op']} {entry['dtype']} {entry['backend']}: {entry['why']}", "bold red")
        ratios = [
            (p["ratio"], f"{r['op']} {r['direction']} {_SHORT[r['dtype']]} against {name}")
            for r in results.rows for name, p in r["peers"].items() if "ratio" in p
        ]  # fmt: skip
        if ratios:
            lost = sum(ratio < 1 for ratio, _ in ratios)
            worst, best = min(ratios), max(ratios)
            self._print(
                f"{len(results.rows)} rows, {len(ratios)} comparisons, {lost} lost; "
                f"worst {worst[0]:.2f} ({worst[1]}), best {best[0]:.2f} ({best[1]})"
            )

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style))


def seconds_text(seconds: float) -> str:
    """Four digits and a unit: "12.34 us"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.4g}{unit}"
    return f"{seconds / 1e-9:.4g}ns"


def bytes_text(count: int | None) -> str:
    """In units of 2**20 or 2**30: "12.3M"; "-" for None."""
    if count is None:
        return "-"
    return f"{count / 2**20:.1f}M" if count < 2**30 else f"{count / 2**30:.2f}G"


def _error(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.2f}" if ratio < 1000 else f"{ratio:.0e}"


class MissingPackage(RuntimeError):
    """Something was asked for that needs a package which is not installed."""


def require_matplotlib() -> None:
    """MissingPackage, before anything is measured in vain."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackage("--plot needs the package matplotlib; install fastlm[train]")


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Ratios to every peer, a line of points a row, on a logarithmic axis; left of 1 we lose."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    names = list(dict.fromkeys(n for r in rows for n, p in r["peers"].items() if "ratio" in p))
    figure = Figure(figsize=(10, 1.5 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(r["peers"][name]["ratio"], i) for i, r in enumerate(rows) if "ratio" in r["peers"].get(name, {})]
        axes.plot(*zip(*points, strict=True), "o", label=name, markersize=5)
    labels = [
        f"{r['op']} {' '.join(f'{k}={v}' for k, v in r['dims'].items())} {_SHORT[r['dtype']]} {r['direction']} {r['backend']}"
        for r in rows
    ]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.set_xlabel("peer's time / ours: left of the line we are slower")
    if names:
        axes.legend(loc="best", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
