"""The report as Markdown, as one HTML page, and its plots."""

from __future__ import annotations

import html as escape
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.report_sections import Measured, Section, Table, by_device, candidates, plot_name, step_name

if TYPE_CHECKING:
    from benchmarks.report import Run

__all__ = ["html", "markdown", "plots"]

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em; color: #1b1b1b }
table { border-collapse: collapse; margin: .6em 0; font-size: 12px; display: block; overflow-x: auto }
th, td { border: 1px solid #d5d5d5; padding: 2px 7px; text-align: left; vertical-align: top }
th { background: #f2f2f2 } tr.lost { background: #fde4e1 } svg { max-width: 100%; height: auto }
"""


def markdown(sections: Sequence[Section], level: int = 1, folder: str = "") -> str:
    """Sections as Markdown. level: of the titles of level 0; folder: where the plots are, with a slash."""
    parts = []
    for section in sections:
        if section.title:
            parts.append(f"{'#' * (level + section.level)} {section.title}")
        parts.append("\n".join(f"- {note}" for note in section.notes) if section.notes[1:] else "".join(section.notes))
        if section.table is not None:
            parts.append(_markdown_table(section.table))
        if section.plot:
            parts.append(f"![{section.title}]({folder}{section.plot}.svg)")
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head)]
    for i, row in enumerate(table.rows):
        lines.append([table.mark + row[0], *row[1:]] if i in table.marked else row)
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def html(sections: Sequence[Section]) -> str:
    """Sections as one page that needs nothing else."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>fastlm: measurements</title><style>{_STYLE}</style>"]
    for section in sections:
        if section.title:
            parts.append(f"<h{section.level + 1}>{escape.escape(section.title)}</h{section.level + 1}>")
        parts += [f"<p>{_inline(note)}</p>" for note in section.notes]
        if section.svg:
            parts.append(section.svg[section.svg.index("<svg") :])
        if section.table is not None:
            head = "".join(f"<th>{escape.escape(c)}</th>" for c in section.table.head)
            parts.append(f"<table><tr>{head}</tr>")
            for i, row in enumerate(section.table.rows):
                lost = " class=lost" if i in section.table.marked else ""
                parts.append(f"<tr{lost}>{''.join(f'<td>{_inline(c)}</td>' for c in row)}</tr>")
            parts.append("</table>")
    return "\n".join(parts) + "\n"


def _inline(text: str) -> str:
    """The Markdown that our texts use: bold and code."""
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape.escape(text))
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)


def plots(runs: Sequence[Run]) -> dict[str, str]:
    """SVG by file name: for each device its kernels' ratios and its training steps' rates."""
    found = {}
    for kind, draw in (("kernels", _kernels), ("train_step", _train_steps)):
        for device, rows in by_device(runs, kind).items():
            compared = [m for m in rows if m.ratio is not None]
            if compared:
                found[plot_name(device, kind)] = _svg(draw(device, compared))
    return found


def _svg(figure: Any) -> str:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastlm"}):  # small, and the same every time
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def _kernels(device: str, rows: Sequence[Measured]) -> Any:
    """A line of points an op and dtype, at the ratio to the fastest peer; left of 1 we lose."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    labels = sorted({f"{m.row['op']} {m.row['dtype']} ({m.row['backend']})" for m in rows}, reverse=True)
    figure = Figure(figsize=(9, 1.4 + 0.27 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for direction, marker in (("forward", ">"), ("backward", "<"), ("both", "o")):
        points = [
            (m.ratio, labels.index(f"{m.row['op']} {m.row['dtype']} ({m.row['backend']})"))
            for m in rows if m.row["direction"] == direction
        ]  # fmt: skip
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=direction, markersize=5, alpha=0.7)
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=1)
    low, high = axes.get_xlim()
    axes.axvspan(min(low, 0.8), 1.0, color="red", alpha=0.07)
    axes.set_xlim(min(low, 0.8), max(high, 1.25))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_xlabel("fastest peer's time / ours; left of the line we are slower")
    axes.set_title(device, fontsize=9)
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.legend(fontsize=8)
    return figure


def _train_steps(device: str, rows: Sequence[Measured]) -> Any:
    """Tokens a second of ours and of the peers, a group of bars for each step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.6 + sum(0.55 + 0.25 * len(candidates(m.row)) for m in rows)), layout="constrained")
    sizes = [len(candidates(m.row)) + 1 for m in rows]
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, m in zip(panels, rows, strict=True):
        field = candidates(m.row)
        colours = ["tab:blue", *["tab:gray"] * (len(field) - 1)]
        bars = axes.barh(range(len(field)), [c["tokens_per_s"] for c in field.values()], color=colours)
        axes.bar_label(bars, fmt="{:.0f}", fontsize=7, padding=2)
        axes.set_yticks(range(len(field)), list(field), fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(step_name(m.row), fontsize=8, loc="left")
    panels[-1].set_xlabel("tokens a second")
    figure.suptitle(device, fontsize=9)
    return figure
