"""What a run writes while it trains: a line a step, TensorBoard events, a progress bar, a plot of it all.

Numbers come from the device in blocks of ``log_every`` steps, so a GPU never waits for the host in between,
and still every step has its own line.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .durable import replace_file

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

__all__ = ["Costs", "Display", "Metrics", "StatsBuffer", "plot_losses", "read_metrics", "say"]


def say(console: Console, text: str) -> None:
    """A line as it is: no markup, no colours for numbers, no folding."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class Costs:
    """What a run spends beside its steps: ``with costs("data"):`` around each such part of the loop."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("data", "logging", "validation", "checkpoints"), 0.0)
        self.steps, self._seconds = 0, 0.0

    @property
    def step_seconds(self) -> float:
        """Of the steps themselves, in this process."""
        return self._seconds - self.seconds["data"]

    @contextmanager
    def __call__(self, purpose: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[purpose] += time.perf_counter() - start

    def took(self, steps: int, seconds: float) -> None:
        """So many steps are done, in so much time with the assembly of their data."""
        self.steps += steps
        self._seconds += seconds

    def shares(self) -> dict[str, float]:
        """By purpose, the part of the steps' own time; empty before the first step."""
        return {name: spent / self.step_seconds for name, spent in self.seconds.items()} if self.steps else {}

    def __str__(self) -> str:
        if not self.steps:
            return "no step was taken"
        per = {name: 1e3 * spent / self.steps for name, spent in self.seconds.items()}
        parts = ", ".join(f"{name} {per[name]:.2f} ms ({share:.2%})" for name, share in self.shares().items())
        whole = 1e3 * self.step_seconds / self.steps
        return f"{parts}: {sum(self.shares().values()):.2%} of a step's {whole:.1f} ms"


class StatsBuffer:
    """Keeps the scalars of up to ``capacity`` steps on the device until ``take`` reads them together."""

    def __init__(self, capacity: int, device: Any) -> None:
        import torch

        self._rows = torch.zeros(capacity, 3, dtype=torch.float32, device=device)
        self._used = 0

    def put(self, loss: Tensor, grad_norm: Tensor, skipped: Tensor) -> None:
        """Copies three 0-dim float32 tensors; nothing waits."""
        row = self._rows[self._used]
        for place, value in zip(row, (loss, grad_norm, skipped), strict=True):
            place.copy_(value)
        self._used += 1

    @property
    def full(self) -> bool:
        return self._used == len(self._rows)

    def take(self) -> list[tuple[float, float, bool]]:
        """(loss, gradient norm, skipped) of the steps since the last call, in order; waits for the device."""
        rows = self._rows[: self._used].tolist()
        self._used = 0
        return [(loss, norm, skipped != 0) for loss, norm, skipped in rows]


class Metrics:
    """``metrics.jsonl`` and TensorBoard events: one record a step, steps strictly increasing.

    Args:
        directory: the run directory.
        resume_at: the step that the run goes on from. Records of later steps, and a line that a kill cut
            short, are removed first, so that no step is ever missing or there twice. None: a new run.
    """

    def __init__(self, directory: Path, resume_at: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = directory / "metrics.jsonl"
        if resume_at is not None and self._path.exists():
            kept = [record for record in read_metrics(self._path) if record["step"] <= resume_at]
            replace_file(self._path, "".join(_line(record) for record in kept).encode())
        self._file = open(self._path, "a" if resume_at is not None else "x", encoding="utf-8")  # noqa: SIM115
        purge = None if resume_at is None else resume_at + 1
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def write(self, record: Mapping[str, Any]) -> None:
        """One step's numbers, ``step`` among them. Non-finite floats become null: JSON has no others."""
        self._file.write(_line(record))
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                self._events.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        self._file.flush()

    def sync(self) -> None:
        """Puts every record on disk; called before the checkpoint that stands for those steps."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, up to the first line that is not a whole one."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
            complete = line.endswith("\n") and isinstance(record["step"], int)
        except (ValueError, TypeError, KeyError):
            break
        if not complete:
            break
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, separators=(",", ":"), allow_nan=False) + "\n"


class Display:
    """A progress bar with loss, tokens/s and time left; where there is no terminal, a line now and then."""

    def __init__(self, console: Console, steps: int, start: int, quiet_seconds: float = 10.0) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = console
        self._steps = steps
        self._start = start
        self._started = time.monotonic()
        self._quiet_seconds = quiet_seconds
        self._last_line = self._started
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=start, numbers="")
        self._bar.start()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        left = (time.monotonic() - self._started) / max(1, step - self._start) * (self._steps - step)
        numbers = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {_clock(left)} left"
        self._bar.update(self._task, completed=step, numbers=numbers)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line >= self._quiet_seconds:
            self.say(f"step {step}/{self._steps}  {numbers}")
            self._last_line = now

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def plot_losses(
    records: Sequence[Mapping[str, Any]], path: Path, unigram_entropy: float | None = None
) -> None:
    """Draws both losses, the gradient norm and the learning rate over the steps into a PNG at ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, norms = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps, loss = _series(records, "loss")
    losses.plot(steps, loss, color="tab:blue", alpha=0.35, linewidth=0.8, label="training, each step")
    losses.plot(steps, _smooth(loss), color="tab:blue", label="training, running median")
    losses.plot(*_series(records, "val_loss"), "o-", color="tab:orange", markersize=4, label="validation")
    if unigram_entropy is not None:
        losses.axhline(
            unigram_entropy, color="gray", linestyle="--", label="unigram entropy of the validation tokens"
        )
    losses.set_ylabel("loss (nats per token)")
    losses.legend()
    norms.plot(*_series(records, "grad_norm"), color="tab:green", linewidth=0.8)
    norms.set_yscale("log")
    norms.set_ylabel("gradient norm")
    norms.set_xlabel("step")
    rates = norms.twinx()
    rates.plot(*_series(records, "lr"), color="tab:red", linewidth=0.8)
    rates.set_ylabel("learning rate", color="tab:red")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    replace_file(path, image.getvalue())


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float], reach: int = 10) -> list[float]:
    """Medians of windows that stay symmetric at the ends, where a lopsided one would bend a falling curve."""
    reaches = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [median(values[i - r : i + r + 1]) for i, r in enumerate(reaches)]
