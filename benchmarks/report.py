"""Tables, plots and one HTML page from the results on disk, losses before wins.

    python -m benchmarks.report                    all of benchmarks/results/*.json
    python -m benchmarks.report a.json b.json      these

Writes report.md, report.html (one file, plots inside, nothing from the network) and the plots as SVG to --out, and a short
table between `<!-- report -->` and `<!-- /report -->` in --readme. Rows of different devices are never in one table or plot.
Of a row that was measured in several runs the newest counts. A file that cannot be read is named and left out, and the exit
status is then 1.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report_page, report_sections
from fastlm.testbed.results import FORMAT

__all__ = ["BrokenError", "Run", "load", "main", "replaced", "write"]

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- report -->", "<!-- /report -->"

# What a row must have to be shown.
TIMED = ("device", "dtype", "dims", "seconds", "low", "high", "rounds", "roof_fraction", "peak_bytes", "peers")
FIELDS = {
    "kernels": ("op", "direction", "backend", "gbytes_per_s", "tflop_per_s", "error_ratio", *TIMED),
    "train_step": ("model", "settings", "tokens_per_s", "flop_per_s", "setup_seconds", "losses", "flop_per_token", *TIMED),
    "loss_curve": ("model", "dims", "dtype", "device", "steps", "losses", "reference_losses", "smoothed_worst", "smoothed_mean",
                   "step_worst", "step_mean", "limit", "within"),
    "compile": ("op", "target", "language", "kernel", "registers", "spill_bytes", "shared_bytes", "fault"),
    "device": ("step", "status"),
}


class BrokenError(ValueError):
    """A file that is not a result; the message says why."""


@dataclass(frozen=True)
class Run:
    """One file of results. `number` is how the report refers to it."""

    number: int
    path: Path
    content: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.content["kind"])

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        rows: list[Mapping[str, Any]] = self.content["rows"]
        return rows

    @property
    def environment(self) -> Mapping[str, Any]:
        environment: Mapping[str, Any] = self.content["environment"]
        return environment


def load(path: Path) -> Mapping[str, Any]:
    """The content of a file of results. BrokenError if it is another format's, or a row lacks what is to be shown."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BrokenError(f"cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise BrokenError(f"is of format {found!r}; allowed: {FORMAT}")
    for name, kind in (("kind", str), ("command", list), ("started", str), ("finished", bool), ("environment", dict),
                       ("rows", list)):  # fmt: skip
        if not isinstance(content.get(name), kind):
            raise BrokenError(f"has no {name!r}")
    if content["kind"] not in FIELDS:
        raise BrokenError(f"is of kind {content['kind']!r}; allowed: {', '.join(FIELDS)}")
    if not isinstance(content["environment"].get("device"), str):
        raise BrokenError("does not say which device it was measured on")
    for i, row in enumerate(content["rows"]):
        _check_row(f"row {i + 1}", row, FIELDS[content["kind"]])
    for i, entry in enumerate(content.get("refused", [])):
        _check_row(f"refused {i + 1}", entry, ("op", "dims", "dtype", "backend", "why"))
    return content


def _check_row(where: str, row: Any, fields: Iterable[str]) -> None:
    if not isinstance(row, dict):
        raise BrokenError(f"{where} is no object")
    if missing := [f for f in fields if f not in row]:
        raise BrokenError(f"{where} has no {', '.join(missing)}")
    timed = {where: row} if "seconds" in fields else {}
    for name, peer in row["peers"].items() if timed else ():
        if not isinstance(peer, dict) or ("seconds" in peer) == ("absent" in peer):
            raise BrokenError(f"{where}: peer {name} has neither seconds nor a reason for its absence, or both")
        if "seconds" in peer:
            timed[f"{where}: peer {name}"] = peer
    for place, measured in timed.items():
        seconds = measured["seconds"]
        if not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise BrokenError(f"{place}: seconds {seconds!r}; allowed: finite numbers above 0")


def write(runs: Sequence[Run], out: Path) -> str:
    """Write report.md, report.html and the plots to a folder; returns the README's table, in Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    sections, summary = report_sections.sections(runs), report_sections.summary(runs)
    for old in out.glob("report-*.svg"):
        old.unlink()
    for name, svg in report_page.plots(runs).items():
        (out / f"{name}.svg").write_text(svg)
        for section in sections:
            if section.plot == name:
                section.svg = svg
    (out / "report.md").write_text(report_page.markdown(sections))
    (out / "report.html").write_text(report_page.html(sections))
    return report_page.markdown(summary, level=2, folder="benchmarks/results/")


def replaced(text: str, table: str) -> str:
    """A README with what stands between the markers replaced. ValueError if they are not there once each, in order."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"needs one line {START} and after it one line {END}, for the table between them")
    pattern = re.compile(re.escape(START) + ".*" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{START}\n{table.strip()}\n{END}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="results (default: benchmarks/results/*.json)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the report")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with the markers")
    options = parser.parse_args(arguments)
    status = 0
    runs: list[Run] = []
    for path in options.files or sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        try:
            runs.append(Run(len(runs) + 1, path, load(path)))
        except BrokenError as error:
            print(f"benchmarks.report: {path} {error}; left out", file=sys.stderr)
            status = 1
    if not runs:
        print("benchmarks.report: error: there are no results to report", file=sys.stderr)
        return 1
    table = write(runs, options.out)
    try:
        options.readme.write_text(replaced(options.readme.read_text(), table))
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {options.readme}: {error}", file=sys.stderr)
        return 1
    print(f"{len(runs)} runs: {options.out / 'report.md'}, {options.out / 'report.html'}, {options.readme}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
