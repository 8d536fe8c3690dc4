"""Loss curves on text: our engine's beside PyTorch's float32, from the same weights, on the same batches.

A curve is compared step by step, and smoothed by a mean over the last 20 steps: a step's loss says more about its batch than
about the arithmetic, and the smoothed one is what a user looks at. Deviations are relative: |ours - theirs| / theirs.

The contenders take turns of ten steps, in an order shuffled anew; a step's time is the median over the turns, without the first
one, in which memory is planned. Ten times on the way, and at the end, each one's loss on held-out text is measured; ours must
in the best of these be no higher than PyTorch's in its best, but for rounding.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.step_task import Task
from benchmarks.step_turns import Worker
from benchmarks.step_worker import CANDIDATES, ORACLE

__all__ = ["LIMIT", "VALIDATION_LIMIT", "curves", "deviations", "smoothed", "text"]

LIMIT = 0.005  # of the smoothed curve, at its worst
# Relative; a run from other random weights is further away. In bfloat16 a curve may stray as far as that.
VALIDATION_LIMIT = {"float32": 0.001, "bfloat16": LIMIT}
WINDOW = 20
_BLOCK = 10  # steps in a turn
_VALIDATIONS = 10


def curves(task: Task, ours: Sequence[str], say: Callable[[str], object]) -> list[dict[str, Any]]:
    """A row for each of our candidates: its losses and times beside the oracle's, and how far they are apart."""
    found = _run(task, (ORACLE, *ours), say)
    reference = found[ORACLE]
    best, seconds = _best(reference), _step_seconds(reference, task)
    rows = []
    for name in ours:
        mine = found[name]
        limit = VALIDATION_LIMIT[CANDIDATES[name].dtype]
        far = deviations(mine["losses"], reference["losses"])
        rows.append({
            "candidate": name, "dtype": CANDIDATES[name].dtype, "steps": len(mine["losses"]), "window": WINDOW, "limit": LIMIT,
            "data": _told(task.data), "against": ORACLE, "losses": [_finite(x) for x in mine["losses"]],
            "reference_losses": reference["losses"], **{k: _finite(v) for k, v in far.items()},
            "within": far["smoothed_worst"] <= LIMIT,
            "validation": [_finite(x) for x in mine["validation"]], "reference_validation": reference["validation"],
            "validated_at": reference["validated_at"], "validation_tokens": reference["validation_tokens"],
            "validation_limit": limit, "best_validation": _finite(_best(mine)), "reference_best_validation": best,
            "validated": _best(mine) <= best * (1 + limit),
            "seconds_per_step": _step_seconds(mine, task), "reference_seconds_per_step": seconds,
            "ratio": seconds / _step_seconds(mine, task),
            "seconds": sum(mine["turns"]), "reference_seconds": sum(reference["turns"]),
        })  # fmt: skip
    return rows


def _told(data: dict[str, Any]) -> dict[str, Any]:
    """The options without the folders of one machine."""
    tokenizer = data["tokenizer"]
    return data | {
        "sources": [Path(source).name for source in data["sources"]],
        "tokenizer": None if tokenizer is None else Path(tokenizer).name,
    }


def _best(run: dict[str, Any]) -> float:
    """The lowest validation loss; NaN if one is."""
    losses: list[float] = run["validation"]
    return math.nan if any(math.isnan(x) for x in losses) else min(losses)


def _step_seconds(run: dict[str, Any], task: Task) -> float:
    turns = run["turns"]
    if len(turns) > 2:  # the last may be shorter, and the first plans memory
        return statistics.median(turns[1 : task.data["steps"] // _BLOCK]) / _BLOCK
    return float(sum(turns) / task.data["steps"])


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
    """The losses on the way, the deviations, the validation losses and the times."""
    shown = sorted({*range(0, rows[0]["steps"], max(1, rows[0]["steps"] // 10)), rows[0]["steps"] - 1})
    head = f"{'step':>10} {ORACLE:>14}" + "".join(f" {row['candidate']:>14}" for row in rows)
    lines = [head]

    def line(label: str, values: Sequence[float | None]) -> None:
        lines.append(f"{label:>10}" + "".join(f" {math.nan if v is None else v:>14.5f}" for v in values))

    for i in shown:
        line(str(i + 1), [rows[0]["reference_losses"][i], *(row["losses"][i] for row in rows)])
    for i, at in enumerate(rows[0]["validated_at"]):
        line(f"val {at}", [rows[0]["reference_validation"][i], *(row["validation"][i] for row in rows)])
    for row in rows:
        values = [row[k] for k in ("smoothed_worst", "smoothed_mean", "step_worst", "step_mean", "best_validation")]
        worst, mean, step_worst, step_mean, best = (math.nan if v is None else v for v in values)
        lines += [
            f"{row['candidate']} against {ORACLE}: smoothed over {WINDOW} steps worst {worst:.3%}, mean {mean:.3%} "
            f"(asked {LIMIT:.1%}: {'within' if row['within'] else 'MISSED'}); single steps worst {step_worst:.3%}, "
            f"mean {step_mean:.3%}",
            f"  best validation loss {best:.5f} nats over {row['validation_tokens']} tokens, {ORACLE} has "
            f"{row['reference_best_validation']:.5f} (asked no more than {row['validation_limit']:.1%} above it: "
            f"{'held' if row['validated'] else 'MISSED'}); {1e3 * row['seconds_per_step']:.1f} ms a step, "
            f"{1e3 * row['reference_seconds_per_step']:.1f}: ratio {row['ratio']:.2f}",
        ]
    return "\n".join(lines)


def _run(task: Task, names: Sequence[str], say: Callable[[str], object]) -> dict[str, dict[str, Any]]:
    """All contenders side by side: losses, seconds of each turn, validation losses and after how many steps these were."""
    steps = task.data["steps"]
    every = max(1, round(steps / _VALIDATIONS / _BLOCK)) * _BLOCK
    found: dict[str, dict[str, Any]] = {n: {"losses": [], "turns": [], "validation": [], "validated_at": []} for n in names}
    workers: dict[str, Worker] = {}
    shuffle, done = random.Random(task.seed), 0
    try:
        for name in names:
            workers[name] = Worker(task, name, {})
        while done < steps:
            count = min(_BLOCK, steps - done)
            done += count
            turns = list(names)
            shuffle.shuffle(turns)
            for name in turns:
                mine, turn = found[name], workers[name].ask("run", count)
                mine["losses"] += turn["losses"]
                mine["turns"].append(turn["seconds"])
            if done % every == 0 or done == steps:
                for name in names:
                    held_out = workers[name].ask("validate")
                    found[name]["validation"].append(held_out["loss"])
                    found[name]["validated_at"].append(done)
                    found[name]["validation_tokens"] = held_out["tokens"]
                last = [f"{n} {r['losses'][-1]:.4f}, held out {r['validation'][-1]:.4f}" for n, r in found.items()]
                say(f"step {done}: {'; '.join(last)}")
    finally:
        for worker in workers.values():
            worker.close()
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
