"""The memory of a run, before it: ``fastlm train --plan``, and what ``--recompute auto`` decides by.

The run's own code is run without memory (``fastlm.engine.dry_run``): the model and the engine are made, one step,
one evaluation and the audit are taken on tensors that have shapes only. Measured here are what the process itself
takes (Python, PyTorch, and what their libraries load at the first step of a toy) and what the machine has.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from fastlm.engine import Engine, audit
from fastlm.engine.dry_run import Ledger, StepMemory, dry_engine, dry_run, state_memory, step_memory
from fastlm.registry import Spec

from .config import TrainConfig, from_json, to_json
from .device import choose_device, choose_dtype
from .families import FAMILIES
from .family import Facts
from .log import plot_losses, say
from .optimizer import adamw_of
from .validate import recompute_kinds

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Forecast", "Limit", "MemoryNeeded", "choose_recompute", "forecast", "memory_limit", "report"]

_CERTAIN = 1.2  # times all the memory there is: no forecast is so wrong that this would fit
_MIB = 2.0**-20
_TOY_LENGTH = 32


class MemoryNeeded(RuntimeError):
    """The run cannot fit into the memory of this machine."""


@dataclass(frozen=True)
class Limit:
    """Bytes: all that there are for the run, and those that nobody else holds now. what: whose memory it is."""

    what: str
    total: int
    available: int


@dataclass(frozen=True)
class Forecast:
    """Bytes on the device of a run.

    held: what it holds from the first step to the last, by what it is for. phases: the most that it holds during each of
    its phases, in order, the process itself among them.
    """

    held: dict[str, int]
    phases: dict[str, int]

    @property
    def training(self) -> int:
        return sum(self.held.values())

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def without_audit(self) -> int:
        return max(size for name, size in self.phases.items() if name != "audit")


class _Dry:
    """The engine of a run without its memory, for one shape of the model."""

    def __init__(self, config: TrainConfig, facts: Facts) -> None:
        run = config.run
        self.config, self.facts, self.device = config, facts, choose_device(run.device)[0]
        self.dtype = choose_dtype(run.dtype, self.device)[0]
        self.family = FAMILIES[config.model.model]
        self.ledger: Ledger
        self.engine: Engine

    @contextmanager
    def inside(self) -> Iterator[_Dry]:
        with dry_run(self.device) as self.ledger:
            with self.ledger.peak_of() as build:
                model = self.family.model(self.config, self.facts)
                self.engine = dry_engine(self.ledger, model, self.dtype, self.config.run.backend, adamw_of(self.config))
            self.build = build[0]
            yield self

    def set_recompute(self, kind: str) -> None:
        if kind != "none":
            self.engine.model.recompute = kind  # type: ignore[assignment]

    def step(self, batch: Mapping[str, Spec]) -> StepMemory:
        accumulate = min(2, self.config.optimizer.grad_accum)  # all after the first take the same
        return step_memory(self.ledger, self.engine, batch, batch, accumulate)

    def audit(self) -> int:
        """What the audit takes beside the engine."""
        with self.ledger.peak_of() as peak:
            specs = self.family.audit_batches(self.config, self.facts)
            batches = [{name: spec.empty(self.engine.device) for name, spec in one.items()} for one in specs]
            audit(copy.deepcopy(self.engine.model), batches, self.dtype, self.config.run.backend)
        return peak[0] + self.ledger.workspace

    def export(self) -> int:
        """What writing the model takes on the host, which is where it is beside everything else on a CPU."""
        unwritten = mock.patch("safetensors.torch.save_file", lambda tensors, path, **_: Path(path).touch())
        with tempfile.TemporaryDirectory() as folder, unwritten, self.ledger.peak_of() as peak:
            self.engine.model.save_pretrained(folder)  # type: ignore[operator]
        return peak[0] if self.device.type == "cpu" else 0

    def held(self, rows: int) -> dict[str, int]:
        batch = self.family.batch(self.config, self.facts, rows)
        step, state = self.step(batch), state_memory(self.engine)
        optimizer, run = self.config.optimizer, self.config.run
        one = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in batch.values())
        kept_on_device = optimizer.grad_accum + (0 if self.device.type == "cuda" else run.eval_batches)
        return {
            **state, "activations": step.activations, "workspace": step.workspace, "batches": one * kept_on_device,
            "copy to save": self.copied(),
        }  # fmt: skip

    def copied(self) -> int:
        """The saver's copy of the state, which is on the host."""
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self.engine.state_dict().values()}
        return sum(storages.values()) if self.device.type == "cpu" else 0


def forecast(config: TrainConfig, facts: Facts, process: int, recompute: str) -> Forecast:
    """Of a run from its first step. process: bytes that the process holds before it."""
    with _Dry(config, facts).inside() as dry:
        dry.set_recompute(recompute)
        own = {"process": process, "data": facts.held} if dry.device.type == "cpu" else {}
        held = {**dry.held(config.optimizer.batch_size), **own}
        beside = sum(own.values()) + held["batches"]
        phases = {"building": beside + dry.build}
        if config.run.audit:
            state = state_memory(dry.engine)
            if not config.run.audit_every:  # before the first step, with which these come into memory
                del state["gradients"], state["optimizer state"]
            phases["audit"] = beside + held["copy to save"] + sum(state.values()) + dry.audit()
        phases["training"] = sum(held.values())
        phases["saving"] = phases["training"] + dry.export()
    return Forecast(held, phases)


# --- what there is


def memory_limit(device: torch.device) -> Limit:
    """Of the GPU, or of the machine or the container (cgroup) that this process runs in."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Limit(torch.cuda.get_device_name(device), total, free + torch.cuda.memory_reserved(device))
    own = resident()
    total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = min(total, 1024 * int(line.split()[1]) + own)
    what = "this machine"
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, now = _number(limit), _number(used)
        if most is not None and most < total:
            what, total = "this container (cgroup)", most
            # its page cache counts as used and can go, so "used" alone would say too little
            available = min(available, max(most - (now or 0) + own, most // 2))
    return Limit(what, total, min(available, total))


def resident() -> int:
    """Bytes of this process in memory now."""
    for line in _lines("/proc/self/status"):
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    return 0


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _number(path: str) -> int | None:
    text = _lines(path)[:1]
    return int(text[0]) if text and text[0].strip().isdigit() else None


# --- what would fit


def largest(need: Callable[[int], int], limit: int, most: int) -> int:
    """About the largest n from 1 to `most` with need(n) <= limit, never more; 0 if there is none.

    need grows, and nearly evenly; it is asked until the answer is known to one part in 32.
    """
    low, at_low = 1, need(1)
    if at_low > limit:
        return 0
    high, at_high = min(2, most), need(min(2, most))
    while at_high <= limit and high < most:
        slope = max(1, (at_high - at_low) / (high - low))
        low, at_low = high, at_high
        high = min(most, max(low + 1, low + math.ceil(1.02 * (limit - at_low) / slope)))
        at_high = need(high)
    if at_high <= limit:
        return high
    while high - low > max(1, low // 32):
        guess = low + int((limit - at_low) / max(1, at_high - at_low) * (high - low))
        n = min(max(guess, low + 1), high - 1)
        at = need(n)
        if at <= limit:
            low, at_low = n, at
        else:
            high, at_high = n, at
    return low


def choose_recompute(config: TrainConfig, facts: Facts, console: Console) -> str:
    """What ``--recompute`` stands for: ``auto`` is the least that fits. Warns if the run would not fit.

    Raises:
        MemoryNeeded: it certainly cannot.
    """
    asked = config.run.recompute
    limit = memory_limit(choose_device(config.run.device)[0])
    if _plainly_fits(config, facts, limit.available):
        return "none" if asked == "auto" else asked
    tried = _forecasts_elsewhere(config, facts, limit)
    kind, found = list(tried.items())[-1]
    if len(tried) > 1:
        kept = tried["none"].without_audit
        say(console, f"recompute {kind}: without it the run would take {_mib(kept)} of {_mib(limit.available)}")
    if found.peak > limit.available:
        of = f"{_mib(limit.available)} of the {_mib(limit.total)} that {limit.what} has are free"
        advice = _advice(config, kind, found, limit)
        if found.without_audit > _CERTAIN * limit.total:
            raise MemoryNeeded(f"the run needs {_mib(found.without_audit)}; {of}; {advice}")
        phase = max(found.phases, key=lambda name: found.phases[name])
        say(console, f"WARNING: {phase} takes {_mib(found.peak)}; {of}; {advice}")
    return kind


def forecasts(config: TrainConfig, facts: Facts, limit: int) -> dict[str, Forecast]:
    """By kind of recomputation: of that asked for, or of each until one fits into `limit` bytes."""
    process = _process(config, facts)
    found: dict[str, Forecast] = {}
    for kind in recompute_kinds(config) if config.run.recompute == "auto" else (config.run.recompute,):
        found[kind] = forecast(config, facts, process, kind)
        if found[kind].without_audit <= limit:
            break
    return found


def _forecasts_elsewhere(config: TrainConfig, facts: Facts, limit: Limit) -> dict[str, Forecast]:
    """`forecasts` by a process of its own: what it loads for them would stay in this one as long as the run lasts."""
    asked = to_json(config), dataclasses.asdict(facts), limit.available
    command = [sys.executable, "-m", "fastlm.train.plan"]
    done = subprocess.run(command, input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True)
    return {kind: Forecast(**found) for kind, found in json.loads(done.stdout).items()}


def _advice(config: TrainConfig, kind: str, found: Forecast, limit: Limit) -> str:
    """The options that would help."""
    if found.without_audit <= limit.available:
        return "--no-audit would fit"
    options = [] if kind == recompute_kinds(config)[-1] else ["--recompute block"]
    rows = config.optimizer.batch_size
    options += [f"a smaller --batch-size with a larger --grad-accum (now {rows})"] if rows > 1 else ["a shorter --seq-len"]
    return f"try {' or '.join(options)}; fastlm train --plan says what fits"


def _plainly_fits(config: TrainConfig, facts: Facts, available: int) -> bool:
    """Whether it is no use to look closer: half of the memory would be free after far more than any run took."""
    with torch.device("meta"), _Uninitialised():
        model = FAMILIES[config.model.model].model(config, facts)
    tokens = config.optimizer.batch_size * config.data.seq_len
    matrices = [p.shape for p in model.parameters() if p.dim() == 2]
    state = 128 * sum(p.numel() for p in model.parameters())
    return 2 * (state + 64 * tokens * sum(a + b for a, b in matrices)) < available


class _Uninitialised(TorchFunctionMode):
    """Parameters keep whatever they have: on the meta device torch would load a compiler to draw nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


# --- the report


def report(config: TrainConfig, console: Console) -> int:
    """Prints what the run that the options describe would hold, and what would fit. Nothing is trained or written."""
    facts = FAMILIES[config.model.model].read(config, console).facts
    device, device_why = choose_device(config.run.device)
    dtype, _ = choose_dtype(config.run.dtype, device)
    limit = memory_limit(device)
    rows, seq_len, accumulation = config.optimizer.batch_size, config.data.seq_len, config.optimizer.grad_accum
    kind, found = list(forecasts(config, facts, limit.available).items())[-1]
    shape = f"micro-batches of {rows} x {seq_len}, {accumulation} an update, recompute {kind}"
    say(console, f"plan for {device} ({device_why}), {str(dtype).removeprefix('torch.')}, {shape}; MiB:")
    width = max(map(len, (*found.held, *found.phases)))
    for name, size in found.held.items():
        say(console, f"  {name:{width}} {size * _MIB:10.1f}")
    say(console, f"  {'in sum':{width}} {found.training * _MIB:10.1f}  (activations beside those in the gradient buffers)")
    say(console, "at most, by phase:")
    for name, size in found.phases.items():
        say(console, f"  {name:{width}} {size * _MIB:10.1f}")
    verdict = "fits" if found.peak <= limit.available else "DOES NOT FIT"
    say(console, f"{limit.what} has {limit.total * _MIB:.0f} MiB, {limit.available * _MIB:.0f} free: {verdict}")
    if found.peak > limit.available:
        say(console, _advice(config, kind, found, limit))
    _say_what_fits(config, facts, sum(found.held.get(n, 0) for n in ("process", "data")), limit, console)
    return 0


def _say_what_fits(config: TrainConfig, facts: Facts, own: int, limit: Limit, console: Console) -> None:
    """Training alone, by each kind of recomputation; without the audit, which comes before and can be left out."""
    positions = FAMILIES[config.model.model].longest(config)
    lengths = 1 << 14 if positions is None else positions // 64
    have = f"{limit.available * _MIB:.0f} MiB"
    say(console, f"training would fit {have}, at --seq-len {config.data.seq_len} or that --batch-size:")
    say(console, "  --recompute   needs MiB   largest --batch-size   longest --seq-len")
    for kind in recompute_kinds(config):

        def need(changed: TrainConfig, kind: str = kind) -> int:
            with _Dry(changed, facts).inside() as dry:
                dry.set_recompute(kind)
                return own + sum(dry.held(changed.optimizer.batch_size).values())

        def of_rows(n: int, need: Callable[[TrainConfig], int] = need) -> int:
            return need(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, batch_size=n)))

        def of_length(n: int, need: Callable[[TrainConfig], int] = need) -> int:
            return need(dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=64 * n)))

        most, longest = largest(of_rows, limit.available, 1 << 16), 64 * largest(of_length, limit.available, lengths)
        say(console, f"  {kind:11} {need(config) * _MIB:11.0f} {most or 'none':>22} {longest or 'under 64':>19}")


def _process(config: TrainConfig, facts: Facts) -> int:
    """Bytes of this process once everything that a run uses is loaded: a toy is trained, audited and plotted."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (a run loads it)

    device, _ = choose_device(config.run.device)
    dtype, _ = choose_dtype(config.run.dtype, device)
    toy = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, n_layer=1, n_embd=8 * config.model.n_head, init=None),
        data=dataclasses.replace(config.data, seq_len=_TOY_LENGTH),
        optimizer=dataclasses.replace(config.optimizer, batch_size=2),
    )
    facts = dataclasses.replace(facts, vocab_size=257, width=None, start_id=0, end_id=1)
    family = FAMILIES[config.model.model]
    with torch.random.fork_rng(devices=[]):
        model = family.model(toy, facts).to(device)
    task = family.task(toy, facts)
    made = task.random(2, _TOY_LENGTH, torch.Generator().manual_seed(0))
    batch = {name: tensor.to(device) for name, tensor in made.items()}
    if config.run.audit:
        audit(model, batch, dtype, config.run.backend)
    engine = Engine(model, dtype=dtype, device=device, backend=config.run.backend)
    for _ in range(2):
        engine.step([batch])
        engine.evaluate(batch)
    with tempfile.TemporaryDirectory() as folder:
        plot_losses([{"step": 1, "loss": 1.0, "grad_norm": 1.0, "lr": 1.0}], Path(folder) / "loss.png")
    return resident()


def _mib(size: float) -> str:
    return f"{size * _MIB:.0f} MiB"


def _main() -> None:
    config, facts, limit = json.load(sys.stdin)
    found = forecasts(from_json(config), Facts(**facts | {"labels": tuple(facts["labels"])}), limit)
    print(json.dumps({kind: dataclasses.asdict(one) for kind, one in found.items()}))


if __name__ == "__main__":
    _main()
