"""Loss curves on text: our engine's beside PyTorch's float32, from the same weights, on the same batches.

A curve is compared step by step, and smoothed by a mean over the last 20 steps: a step's loss says more about its batch than
about the arithmetic, and the smoothed one is what a user looks at. Deviations are relative: |ours - theirs| / theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.step_turns import Worker
from benchmarks.step_worker import CANDIDATES, ORACLE, Task

__all__ = ["LIMIT", "curves", "deviations", "smoothed", "text"]

LIMIT = 0.005  # of the smoothed curve, at its worst
WINDOW = 20
_BLOCK = 10  # steps between two words on how far it is


def curves(task: Task, ours: Sequence[str], say: Callable[[str], object]) -> list[dict[str, Any]]:
    """A row for each of our candidates: its losses, the oracle's, and how far they are apart."""
    found = {name: _run(task, name, say) for name in (ORACLE, *ours)}
    rows = []
    for name in ours:
        far = deviations(found[name], found[ORACLE])
        rows.append({
            "candidate": name, "dtype": CANDIDATES[name].dtype, "steps": len(found[name]), "window": WINDOW, "limit": LIMIT,
            "data": task.data, "against": ORACLE, "losses": [_finite(x) for x in found[name]],
            "reference_losses": found[ORACLE], **{k: _finite(v) for k, v in far.items()},
            "within": far["smoothed_worst"] <= LIMIT,
        })  # fmt: skip
    return rows


def deviations(losses: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Worst and mean relative deviation, of the steps and of the smoothed curves; NaN if a loss is."""
    found: dict[str, float] = {}
    for kind, a, b in (("step", losses, reference), ("smoothed", smoothed(losses), smoothed(reference))):
        far = [abs(x - y) / y for x, y in zip(a, b, strict=True)]
        broken = any(math.isnan(x) for x in far)  # max() would pass over it
        found |= {f"{kind}_worst": math.nan if broken else max(far), f"{kind}_mean": sum(far) / len(far)}
    return found


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, WINDOW of them at most."""
    parts = [values[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The losses on the way and the deviations."""
    shown = sorted({*range(0, rows[0]["steps"], max(1, rows[0]["steps"] // 10)), rows[0]["steps"] - 1})
    head = f"{'step':>6} {ORACLE:>14}" + "".join(f" {row['candidate']:>14}" for row in rows)
    lines = [head]
    for i in shown:
        values = [rows[0]["reference_losses"][i], *(row["losses"][i] for row in rows)]
        lines.append(f"{i + 1:>6}" + "".join(f" {math.nan if v is None else v:>14.5f}" for v in values))
    for row in rows:
        values = [row[k] for k in ("smoothed_worst", "smoothed_mean", "step_worst", "step_mean")]
        worst, mean, step_worst, step_mean = (math.nan if v is None else v for v in values)
        lines.append(
            f"{row['candidate']} against {ORACLE}: smoothed over {WINDOW} steps worst {worst:.3%}, mean {mean:.3%} "
            f"(asked {LIMIT:.1%}: {'within' if row['within'] else 'MISSED'}); single steps worst {step_worst:.3%}, "
            f"mean {step_mean:.3%}"
        )
    return "\n".join(lines)


def _run(task: Task, name: str, say: Callable[[str], object]) -> list[float]:
    worker = Worker(task, name, {})
    losses: list[float] = []
    try:
        while (left := task.data["steps"] - len(losses)) > 0:
            losses += worker.ask("run", min(_BLOCK, left))
            say(f"{name}: step {len(losses)}, loss {losses[-1]:.4f}")
    finally:
        worker.close()
    return losses


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
