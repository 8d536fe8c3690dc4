"""The training run: from options to a finished model, through any number of interruptions.

One step is: fill the buffers, ``engine.step``, keep the device's numbers on the device. Every ``log_every``
steps, and before anything else happens between steps, those numbers are read, recorded and shown to the
guard. A checkpoint is taken only between steps, after the records up to it are on disk; so whenever the
process dies, the newest checkpoint and the records up to its step are the state of an uninterrupted run.
What is taken is a copy in memory, which one thread writes while the steps go on; the next checkpoint, and the
end of the run, wait for it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

import fastlm
from fastlm.data import DataError, Tokenizer
from fastlm.engine import StepStats, audit, gradients
from fastlm.tasks import Result

from . import checkpoint, generators
from .build import build, choose_hardware, moved_from_start
from .checkpoint import Checkpoint, CheckpointError
from .config import TrainConfig, to_json
from .directory import RunDirectory
from .durable import replace_file
from .finish import publish, sample_text, summary, write_report
from .guard import SpikeGuard
from .interrupts import Interrupts
from .log import Costs, Display, Metrics, StatsBuffer, plot_losses, read_metrics, say
from .profile import Profile
from .saver import Saver
from .schedule import learning_rate
from .validate import validate

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["train"]


@dataclass(frozen=True)
class Best:
    """The best validation so far, by its `Scores.score`; of step 0: none."""

    score: float = math.inf
    step: int = 0
    text: str = ""


def train(config: TrainConfig, console: Console) -> int:
    """Runs or resumes what ``config`` describes, to its end or to the first signal.

    Returns:
        The exit status: 0 finished, or ``max_minutes`` are over and it is saved; 1 failed, and what could be
        saved is; 128 + the signal's number when interrupted and saved.

    Raises:
        OptionError, DataError: before any training, with what is wrong.
        CheckpointError: none of the run's checkpoints can be used; or the system refused to write.
    """
    validate(config)
    started = time.monotonic()
    directory = RunDirectory(config)
    try:
        return _Run(config, directory, console, started).run()
    except OSError as error:  # the disk, most likely full, under the records or the results
        newest = next(iter(checkpoint.list_checkpoints(directory.checkpoints)), None)
        kept = f"the last checkpoint is {newest}; resume with: {directory.resume_command()}"
        raise CheckpointError(f"{error}; {kept if newest else 'nothing was saved'}") from error
    finally:
        directory.close()


class _Run:
    """The parts of a run. Everything is made in the constructor, ``run`` goes through the steps."""

    def __init__(
        self, config: TrainConfig, directory: RunDirectory, console: Console, started: float
    ) -> None:
        self.directory, self.console, self.started = directory, console, started
        config = choose_hardware(config, console)
        profiled = config.run.profile
        run = dataclasses.replace(config.run, out=str(directory.path), resume=False, profile=0, plan=False)
        self.config = config = dataclasses.replace(config, run=run)
        self.parts = build(config, console)
        directory.store(config)
        self.engine, self.data, self.loader = self.parts.engine, self.parts.data, self.parts.data.loader
        self.profile = Profile(self.engine, profiled) if profiled else None
        self.guard = SpikeGuard(run.spike_deviations, run.max_skipped)
        self.stats = StatsBuffer(run.log_every, self.engine.device)
        self.rates: list[float] = []
        self.costs = Costs()
        self.marks: list[int] = []  # tokens at the end of each of the same steps
        self.step = 0
        self.saver = Saver(
            directory.checkpoints, run.keep, self.state(), self.engine.model,
            lambda state: self.engine.flat.views(state["engine.param"]), self.export, lambda text: self.display.say(text),
        )  # fmt: skip
        self.seconds = 0.0
        self.scores: Result | None = None
        self.best = Best()

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, by whatever batch sizes, padding not counted."""
        return self.loader.tokens

    def say(self, text: str) -> None:
        say(self.console, text)

    def run(self) -> int:
        resumed_at = self.resume() if any(self.directory.checkpoints.glob("step-*")) else None
        if resumed_at is None and self.config.run.audit and not self.audit():
            return 1
        # Without a checkpoint to go on from, the records of an earlier attempt go, all of them.
        self.metrics = Metrics(self.directory.path, -1 if resumed_at is None else resumed_at)
        self.display = Display(self.console, self.config.optimizer.steps, self.step)
        try:
            with Interrupts() as interrupts:
                if resumed_at is None:
                    self.record([{"step": 0}], evaluate=True)
                status = self.steps(interrupts)
        finally:
            self.saver.close()
            self.display.stop()
            self.metrics.close()
        if status is None:
            self.finish()
            return 0
        return status

    def steps(self, interrupts: Interrupts) -> int | None:
        """Trains to the last step. Returns None there, else the exit status that ends the run early."""
        run, optimizer = self.config.run, self.config.optimizer
        deadline = self.started + 60 * run.max_minutes if run.max_minutes else math.inf
        self.block_started, self.block_tokens = time.monotonic(), self.tokens
        while self.step < optimizer.steps and not interrupts.received and time.monotonic() < deadline:
            lr = learning_rate(
                self.step,
                peak=optimizer.lr,
                minimum=optimizer.min_lr,
                warmup=optimizer.warmup,
                steps=optimizer.steps,
            )
            self.stats.put(*self.one_step(lr))
            self.rates.append(lr)
            self.marks.append(self.tokens)
            self.step += 1
            last = self.step == optimizer.steps
            evaluate = last or _due(self.step, run.eval_every)
            save = last or _due(self.step, run.save_every)
            check = _due(self.step, run.audit_every)
            if not (evaluate or save or check or self.stats.full):
                continue
            save |= self.record(self.read_stats(), evaluate)
            if self.profile and self.profile.done:
                self.show_profile(self.profile)
                self.profile = None
            if self.guard.broken:
                self.save()
                self.saved()
                row = self.guard.skipped_in_a_row
                self.say(f"stopped at step {self.step}: {row} steps in a row were not finite{self.blame()}")
                return 1
            if save:
                self.save()
            self.saver.settle(wait=False)
            if check and not self.audit():
                return 1
            self.block_started = time.monotonic()
        if self.step >= optimizer.steps:
            return None if self.saved() else 1
        self.record(self.read_stats(), evaluate=False)
        self.save()
        saved = self.saved()
        self.display.stop()
        why = interrupts.received.name if interrupts.received else f"{run.max_minutes:g} minutes are over"
        self.say(f"{why}: {'saved' if saved else 'NOT saved'} at step {self.step}; resume with:")
        self.say(f"  {self.directory.resume_command()}")
        if not saved:
            return 1
        return 128 + interrupts.received if interrupts.received else 0

    def one_step(self, lr: float) -> StepStats:
        """Takes the next batches and trains on them, noted by the profile if there is one."""
        if self.profile is None:
            with self.costs("data"):
                self.batches = self.data.feed.next()
            return self.engine.step(self.batches, lr=lr)
        with self.profile.step():
            with self.costs("data"):
                self.batches = self.profile.data(self.data.feed.next)
            return self.engine.step(self.batches, lr=lr)

    def show_profile(self, profile: Profile) -> None:
        """Prints where the time of the profiled steps went and writes the trace."""
        profile.write_trace(self.directory.trace)
        self.display.say(f"{profile.table()}\nevery call is in {self.directory.trace}: chrome://tracing, ui.perfetto.dev")

    def read_stats(self) -> list[dict[str, Any]]:
        """Reads the numbers of the steps since the last call and shows them to the guard.

        This is where the loop waits for the device.
        """
        rows = self.stats.take()
        took = time.monotonic() - self.block_started
        self.seconds += took
        self.costs.took(len(rows), took)
        with self.costs("logging"):
            return self.records_of(rows, took)

    def records_of(self, rows: list[tuple[float, float, bool]], took: float) -> list[dict[str, Any]]:
        """A record for each step of a block that took so many seconds, shown to the guard and on the display."""
        rate = (self.tokens - self.block_tokens) / took
        self.block_tokens = self.tokens
        records = []
        for lr, tokens, (step, (loss, grad_norm, skipped)) in zip(
            self.rates, self.marks, enumerate(rows, self.step - len(rows) + 1), strict=True
        ):
            records.append(
                {
                    "step": step,
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "lr": lr,
                    "tokens": tokens,
                    "tokens_per_second": rate,
                    "seconds": self.seconds,
                    "skipped": skipped,
                }
            )
            if skipped:
                many = self.guard.skipped + 1
                self.display.say(f"step {step}: skipped, gradient norm {grad_norm}; skipped so far: {many}")
            for spike in self.guard.observe(step, loss, grad_norm, skipped):
                self.display.say(f"spike: {spike}")
        self.rates.clear()
        self.marks.clear()
        if records:
            self.display.update(self.step, records[-1]["loss"], records[-1]["tokens_per_second"])
        return records

    def record(self, records: list[dict[str, Any]], evaluate: bool) -> bool:
        """Writes records, the last with validation numbers if asked. Returns whether those are the best."""
        improved = False
        self.scores = None
        if evaluate:
            with self.costs("validation"):
                self.scores = self.parts.validation(self.engine)
            records[-1] |= self.scores.record()
            self.display.say(f"step {self.step}: {self.scores.text()}")
            improved = self.step > 0 and self.scores.score < self.best.score
            if improved:
                self.best = Best(self.scores.score, self.step, self.scores.text())
        with self.costs("logging"):
            for record in records:
                self.metrics.write(record)
            self.metrics.flush()
        return improved

    def audit(self) -> bool:
        """Compares every hand-written gradient with float64 autograd, and says what was found."""
        model = self.engine.model
        if self.step == 0:
            model = moved_from_start(
                copy.deepcopy(model), torch.Generator().manual_seed(self.config.run.seed)
            )
        device = self.engine.device
        batches = [{name: tensor.to(device) for name, tensor in one.items()} for one in self.data.audit_batches]
        report = audit(model, batches, dtype=self.engine.dtype, backend=self.config.run.backend)
        self.say(report.table(limit=5))
        if not report.ok:
            self.say("the audit failed: training would follow wrong gradients")
        return report.ok

    def blame(self) -> str:
        """Names the parameters whose gradient is not finite on the last batch."""
        _, found = gradients(self.engine.model, self.batches[-1])
        bad = [name for name, gradient in found.items() if not torch.isfinite(gradient).all()]
        some = f"{', '.join(bad[-4:])} ({len(bad)} of {len(found)} parameters)"
        return f"; the gradient is not finite in {some}" if bad else ""

    # --- state

    def state(self) -> dict[str, torch.Tensor]:
        """The engine's tensors; those it names twice (float32 weights are their own masters) only once."""
        tensors: dict[str, torch.Tensor] = {}
        seen = set()
        for name, tensor in self.engine.state_dict().items():
            place = tensor.data_ptr(), tensor.shape, tensor.dtype
            if not tensor.numel() or place not in seen:
                tensors[f"engine.{name}"] = tensor
                seen.add(place)
        return tensors

    def export(self, directory: Path, model: nn.Module) -> None:
        """A model in its own files, with its tokenizer. OSError if the system refuses."""
        try:
            model.save_pretrained(directory)  # type: ignore[operator]
        except SafetensorError as error:  # how that library reports a full disk
            raise OSError(str(error)) from error
        for name, text in self.data.tokenizer.files().items():
            replace_file(directory / name, text.encode())

    def save(self) -> None:
        """Begins to save this step, unless that is done or under way."""
        if self.saver.knows(self.step):
            return
        with self.costs("checkpoints"):
            self.metrics.sync()
            states, rest = generators.capture()
            score = self.scores.score if self.scores else None
            progress = {
                "score": score if score is not None and math.isfinite(score) else None,
                "best": dataclasses.asdict(self.best) if self.best.step else None,
                "seconds": self.seconds,
                "loader": self.loader.state_dict(),
                "guard": self.guard.state_dict(),
                "generators": rest,
            }
            more = {f"generator.{name}": state for name, state in states.items()}
            config, versions = to_json(self.config), _versions()
            self.saver.begin(self.step, self.state(), more, config=config, progress=progress, versions=versions)

    def saved(self) -> bool:
        """Whether this step is saved, once what is being written has been."""
        with self.costs("checkpoints"):
            self.saver.settle()
        return self.saver.saved_at == self.step

    def resume(self) -> int | None:
        """Goes back to the newest good checkpoint and returns its step."""
        root = self.directory.checkpoints
        found = checkpoint.load_newest(root, self.restore, lambda text: self.say(f"WARNING: {text}"))
        if found is None:
            return None
        for path in checkpoint.set_aside(root, found.step):
            self.say(f"WARNING: {path.name} is set aside")
        self.step = self.saver.saved_at = found.step
        self.say(f"resumed at step {self.step} from {found.path}")
        now = _versions()
        changed = [
            f"{name} {was}, now {now.get(name)}"
            for name, was in found.versions.items()
            if was != now.get(name)
        ]
        if changed:
            self.say(f"NOTE: saved by {'; '.join(changed)}: the last bits of what follows may differ")
        return found.step

    def restore(self, found: Checkpoint) -> None:
        """Takes over the state of a checkpoint; ``CheckpointError`` if it does not fit this run."""
        engine = _under("engine.", found.tensors)
        checkpoint.compare_tensors(found.path, engine, _under("engine.", self.state()))
        progress = found.progress
        try:
            self.loader.load_state_dict(progress["loader"])
            self.guard.load_state_dict(progress["guard"])
            generators.restore(_under("generator.", found.tensors), progress["generators"])
            self.seconds = float(progress["seconds"])
            self.best = Best()
            if (best := progress["best"]) is not None:
                self.best = Best(float(best["score"]), int(best["step"]), str(best["text"]))
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CheckpointError(f"{found.path}: its progress cannot be restored: {error!r}") from error
        own = self.engine.state_dict()
        stored = {own[name].data_ptr(): tensor for name, tensor in engine.items()}
        self.engine.load_state_dict({name: engine.get(name, stored[t.data_ptr()]) for name, t in own.items()})

    def finish(self) -> None:
        """Leaves the model, a plot, a sample and the numbers of a run whose last step is done."""
        scores = self.scores or self.parts.validation(self.engine)
        publish(self.directory.model, lambda directory: self.export(directory, self.engine.model))
        metrics = {n.removeprefix("val_"): value for n, value in scores.record().items() if n != "val_loss"}
        report = {
            "steps": self.step,
            "tokens": self.tokens,
            "val_loss": scores.loss,
            **metrics,
            "val_tokens": self.parts.validation.tokens,
            "unigram_entropy": self.parts.validation.unigram_entropy,
            "nats_under_unigram": self.parts.validation.unigram_entropy - scores.loss,
            "best_step": self.best.step,
            "skipped": self.guard.skipped,
            "training_seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
            "beside_steps": self.costs.shares(),
            "versions": _versions(),
        }
        write_report(self.directory.report, report)
        plot_losses(
            read_metrics(self.directory.metrics), self.directory.plot, self.parts.validation.unigram_entropy
        )
        run = self.config.run
        text = None
        if run.sample_tokens and self.data.sample is not None:
            text = self.data.sample(self.engine.model, run)
        elif run.sample_tokens and isinstance(self.data.tokenizer, Tokenizer):
            text = sample_text(
                self.engine.model,
                self.data.tokenizer,
                run.prompt,
                run.sample_tokens,
                seed=run.seed,
                backend=run.backend,
            )
        if text is not None:
            replace_file(self.directory.sample, text.encode())
            self.say(f"--- sample\n{text}\n---")
        self.say(f"beside the steps {self.costs}")
        self.say(self.engine.memory_report())
        self.say(summary(report, metrics))
        if self.best.step not in (0, self.step):
            self.say(f"best             {self.best.text}: step {self.best.step}, {self.directory.checkpoints / 'best'}")
        self.say(f"all of it is in {self.directory.path} (model, checkpoints, metrics.jsonl, loss.png)")
        self.say(f"in all {time.monotonic() - self.started:.0f} s")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _versions() -> dict[str, str]:
    return {
        "fastlm": fastlm.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
