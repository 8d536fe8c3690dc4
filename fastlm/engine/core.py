"""The engine: one training step as plain calls on flat buffers, with no autograd and no host synchronisation.

A step is: count the units of all micro-batches; for each micro-batch run forward, then backward with 1 / count as the
loss's gradient: a parameter's first gradient replaces what the last step left in its float32 buffer, the others are added
to it; then one AdamW pass that takes the gradient's norm, clips, updates masters and weights, and changes nothing if the
norm is not finite. Until a gradient comes, activations of the first micro-batch lie in its buffer. On a GPU the whole step
is captured in one CUDA graph once its memory is planned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import native, ops
from ..backends import requested, use_backend
from .arena import Arena
from .capture import CallList, capture
from .flat import FlatParameters
from .tape import Tape

__all__ = ["NEXT_SEEDS", "AdamWConfig", "Engine", "StepStats", "gradients"]

Batch = Mapping[str, Tensor]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SITES = 4096  # dropout sites of one micro-batch that have a seed
_MOST_CAPTURED = 32  # shapes of a step or an evaluation; what is more runs as it comes
NEXT_SEEDS = 1 << 20  # what the seeds advance by for each micro-batch; > _SITES, so that none repeats


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW: peak learning rate, betas, eps, decoupled weight decay (on matrices), gradient-norm limit (0: none).

    moments: the dtype of both, bfloat16, rounded stochastically, for less memory; else float32 (with float64 weights float64).
    """

    lr: float = 6e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_norm: float = 1.0
    moments: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "max_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"AdamWConfig.{name}: got {getattr(self, name)}; allowed: >= 0")
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"AdamWConfig.betas: got {self.betas}; allowed: two numbers, 0 <= beta < 1")
        if self.moments not in (torch.float32, torch.bfloat16):
            raise ValueError(f"AdamWConfig.moments: got {self.moments}; allowed: torch.float32, torch.bfloat16")


class StepStats(NamedTuple):
    """Results of a step, 0-dim tensors (float32; float64 for float64) on the device that the next step overwrites."""

    loss: Tensor  # mean over the units (for a language model: nats a token) of all micro-batches
    grad_norm: Tensor  # of the mean loss, before clipping
    skipped: Tensor  # 1 if the gradient was not finite and nothing changed, else 0


class Engine:
    """Trains a model by its hand-written backward.

    Args:
        model: see ``fastlm.engine``. Its parameters are moved to `device` and become views of one flat buffer.
        optimizer: AdamW's options.
        dtype: of weights and activations: float32, bfloat16, float16 or float64. Masters and gradients are float32
            (float64 for float64); of the moments see AdamWConfig.
        device: "cpu", "cuda", ...
        backend: the backend of every op, None for whatever `use_backend` or FASTLM_BACKEND says, or the automatic choice.
        seed: of the dropout masks and of the moments' rounding.
        capture: take the third step of a shape, and all further ones, from a CUDA graph, or on a CPU, where evaluations are
            too, from a list of its calls: the same bits without the Python in between. What Python decides, such as a
            layer's dropout rate, is then as it was; hooks do not run.
    """

    def __init__(
        self, model: nn.Module, optimizer: AdamWConfig | None = None, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", backend: str | None = None, seed: int = 0, capture: bool = True,
    ) -> None:  # fmt: skip
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: got {dtype}; allowed: {', '.join(map(str, _DTYPES))}")
        self.model, self.optimizer, self.dtype, self.device = (
            model,
            optimizer or AdamWConfig(),
            dtype,
            torch.device(device),
        )
        self.backend, self.capture = backend, capture
        # What records a micro-batch and runs the update; a profile puts its own here.
        self.tape_class: Callable[..., Tape] = Tape
        self.update_class: Callable[[Engine], UpdateTape] = UpdateTape
        self.flat = FlatParameters(model, dtype, self.device, self.optimizer.moments)
        self.arena = Arena(self.device)

        def scalar(value: float = 0.0, kind: torch.dtype = self.flat.wide) -> Tensor:
            return torch.tensor(value, dtype=kind, device=self.device)

        self.updates = scalar()  # AdamW updates applied
        self.skipped_total = scalar()
        self._lr = scalar(self.optimizer.lr)
        self._stats = StepStats(scalar(), scalar(), scalar())
        terms: int = getattr(model, "loss_terms", 1)
        self._count = torch.zeros(terms, dtype=torch.int64, device=self.device)
        self._sum, self._scale, *evaluated = torch.zeros(4, terms, dtype=self.flat.wide, device=self.device)
        self._d_loss = self._scale.unbind() if terms > 1 else self._scale[0]
        self._eval = (evaluated[0], evaluated[1]) if terms > 1 else (evaluated[0][0], evaluated[1][0])
        narrow = self.flat.exp_avg.dtype == torch.bfloat16
        self._rounding = torch.tensor([seed], dtype=torch.int64, device=self.device) if narrow else None
        self._seeds = first_seeds(seed, self.device)
        # Each with its static batches, and the arena's buffer that it writes to, which a larger shape replaces:
        # a GPU's graphs go on using theirs, on a CPU all is captured anew.
        self._captured: dict[Any, tuple[CallList | torch.cuda.CUDAGraph, list[dict[str, Tensor]], Tensor | None]] = {}
        self._runs_of: dict[Any, int] = {}
        if self.device.type == "cpu":
            self.arena.dropped = self._captured.clear

    # --- the step

    @torch.no_grad()
    def step(self, micro_batches: Sequence[Batch], lr: float | None = None) -> StepStats:
        """Train on the micro-batches as on one batch of them all. lr: this step's, None for the optimizer's.

        The statistics stay on the device: read them when you need them, not every step.
        """
        if not micro_batches:
            raise ValueError("micro_batches: got none; allowed: one or more")
        self._lr.fill_(self.optimizer.lr if lr is None else lr)
        with use_backend(self.backend):
            carried = tuple(t.data_ptr() for t in self._carried().values())
            key = tuple(self._key(b) for b in micro_batches), self.optimizer, carried
            plain = self.tape_class is Tape and self.update_class is UpdateTape
            if plain and self.device.type in ("cpu", "cuda"):
                self._captured_run(key, micro_batches, self._step)
            else:
                self._step(micro_batches)
        return self._stats

    def _step(self, micro_batches: Sequence[Batch]) -> None:
        self._accumulate(micro_batches)
        self._update()

    def _update(self) -> None:
        """One AdamW update from the gradient buffers."""
        flat, o = self.flat, self.optimizer
        grad_norm, skipped = ops.adamw(
            flat.master, flat.grad, flat.exp_avg, flat.exp_avg_sq, self.updates,
            param=None if flat.param is flat.master else flat.param, trail=flat.trail, decay_mask=flat.decay_mask,
            seed=self._rounding, lr=self._lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, max_norm=o.max_norm,
            tape=self.update_class(self),
        )  # fmt: skip
        self._stats.grad_norm.copy_(grad_norm)
        self._stats.skipped.copy_(skipped)
        self.skipped_total.add_(skipped)

    def _accumulate(self, micro_batches: Sequence[Batch]) -> None:
        """Leave the gradient of the mean loss over all micro-batches in the buffers, and that loss in the stats."""
        model = self.model
        model.train()
        self._count.zero_()
        self._sum.zero_()
        for batch in micro_batches:
            with self.arena.frame(("units", self._key(batch))):
                _add(self._count, model.units(batch, Tape(self.arena, {})))  # type: ignore[operator]
        self._scale.copy_(self._count).clamp_(min=1).reciprocal_()
        stale = set(self.flat.gradients)
        for i, batch in enumerate(micro_batches):
            loan = self.flat.loan if i == 0 else None
            with self.arena.frame(("train", self._key(batch), i == 0), loan):
                tape = self.tape_class(
                    self.arena, self.flat.gradients, self._seeds, d_loss=self._d_loss, stale=stale
                )
                _add(self._sum, model(**batch, reduction="sum", tape=tape))
                model.backward(self._d_loss, tape)  # type: ignore[operator]
                tape.finish()
            self._seeds.add_(self.arena.constant(NEXT_SEEDS, torch.int64))
        for parameter in stale:  # nothing came for them
            native.zero_(self.flat.gradients[parameter])
        torch.sum(self._sum.mul_(self._scale), 0, out=self._stats.loss)

    def _key(self, batch: Batch) -> Any:
        shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in batch.items())
        return shapes, requested(), self.model.training

    def _captured_run(self, key: Any, batches: Sequence[Batch], run: Callable[[Sequence[Batch]], None]) -> None:
        """Twice as it comes (the arena's plan, then kernels and library handles on planned memory), then captured."""
        count = self._runs_of.get(key, 0)
        self._runs_of[key] = count + 1
        full = key not in self._captured and len(self._captured) == _MOST_CAPTURED
        if not self.capture or count < 2 or full:
            run(batches)
            return
        if key not in self._captured:
            static = [{name: t.clone() for name, t in batch.items()} for batch in batches]
            if self.device.type == "cpu":
                calls = capture(lambda: run(static))  # which runs it
                self._captured[key] = calls, static, self.arena.buffer
                return
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run(static)
            self._captured[key] = graph, static, self.arena.buffer
        captured, static, _ = self._captured[key]
        if isinstance(captured, CallList) and captured.refused:
            run(batches)
            return
        for target, batch in zip(static, batches, strict=True):
            for name, t in batch.items():
                target[name].copy_(t, non_blocking=True)
        captured.replay()

    @torch.no_grad()
    def evaluate(self, batch: Batch, outputs: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(loss summed over the units, units) of a batch without dropout; 0-dim float32, overwritten by the next call.

        Of a model with several loss terms both are (terms,). outputs: what the model gives out beside the loss is put
        there, by name, and overwritten by the next call too. The gradient buffers may be overwritten.
        """
        training = self.model.training
        self.model.eval()
        try:
            with use_backend(self.backend):
                if outputs is None and self.device.type == "cpu":
                    self._captured_run(("eval", self._key(batch)), [batch], self._evaluate)
                else:
                    self._evaluate([batch], outputs)
        finally:
            self.model.train(training)
        return self._eval

    def _evaluate(self, batches: Sequence[Batch], outputs: dict[str, Tensor] | None = None) -> None:
        (batch,) = batches
        with self.arena.frame(("eval", self._key(batch)), self.flat.loan):
            tape = Tape(self.arena, {}, record=False)
            more = {} if outputs is None else {"outputs": outputs}
            _add(self._eval[0].zero_(), self.model(**batch, **more, reduction="sum", tape=tape))
            _add(self._eval[1].zero_(), self.model.units(batch, tape))  # type: ignore[operator]

    # --- state

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as views: weights and moments flat, counters, dropout seeds."""
        flat = self.flat
        trail = {} if flat.trail is None else {"trail": flat.trail}
        return {
            "param": flat.param, "master": flat.master, **trail, "exp_avg": flat.exp_avg, "exp_avg_sq": flat.exp_avg_sq,
            "updates": self.updates, "skipped_total": self.skipped_total, "seeds": self._seeds, **self._carried(),
        }  # fmt: skip

    def _carried(self) -> dict[str, Tensor]:
        """What the model carries from batch to batch, as a recurrent one its state."""
        carried = getattr(self.model, "carried", None)
        return {} if carried is None else {f"model.{name}": t for name, t in carried().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state back. ValueError names what is missing, unknown or of another shape or dtype; then nothing changed."""
        own = self.state_dict()
        problems = [f"missing: {n}" for n in own if n not in state] + [
            f"unknown: {n}" for n in state if n not in own
        ]
        problems += [
            f"{n}: got {tuple(state[n].shape)} {state[n].dtype}, allowed: {tuple(t.shape)} {t.dtype}"
            for n, t in own.items()
            if n in state and (state[n].shape != t.shape or state[n].dtype != t.dtype)
        ]
        if problems:
            raise ValueError("engine state does not fit\n  " + "\n  ".join(problems))
        for name, t in own.items():
            t.copy_(state[name])

    def memory_report(self) -> str:
        """What the engine holds, in MiB."""
        mib = 2.0**-20
        n = sum(s.numel() for s in self.flat.shapes.values())
        return (
            f"{n / 1e6:.1f}M parameters; weights, masters, gradients and optimizer state {self.flat.nbytes() * mib:.0f} MiB; "
            f"activations beside those in gradient buffers {self.arena.planned_bytes * mib:.0f} MiB"
        )


def first_seeds(seed: int, device: torch.device) -> Tensor:
    """The seeds of the dropout sites of an engine's first micro-batch."""
    return torch.arange(_SITES, dtype=torch.int64, device=device).add_(seed << 40)


def _add(total: Tensor, terms: Tensor | tuple[Tensor, ...]) -> None:
    """total (terms,), or 0-dim for one, += terms."""
    if isinstance(terms, tuple):
        for own, term in zip(total.unbind(), terms, strict=True):
            own.add_(term)
    else:
        total.add_(terms)


class UpdateTape:
    """Lets the optimizer op write its two scalars straight into the engine's statistics."""

    def __init__(self, engine: Engine) -> None:
        self._slots = [engine._stats.grad_norm, engine._stats.skipped]

    def forward(self, op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        slots = iter(self._slots)
        out: tuple[Any, ...] = op.run_forward(args, lambda spec, device: next(slots))
        return out


def gradients(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (mean over its units) and every parameter's hand-written gradient, by name.

    The model is not changed. Gradients are float32 (float64 for a float64 model), computed in the model's own dtype
    and on its device by the backend in force.
    """
    import copy

    parameter = next(model.parameters())
    engine = Engine(copy.deepcopy(model), dtype=parameter.dtype, device=parameter.device, capture=False)
    with torch.no_grad():
        engine._accumulate([batch])
    return engine._stats.loss, engine.flat.views(engine.flat.grad)
