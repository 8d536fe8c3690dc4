"""The audit: every hand-written gradient of a model, and the optimizer step, against float64 autograd.

The exact gradients are autograd's through the model's own forward with the ops' plain-PyTorch formulas in float64, from
the very weights (rounded to the audited dtype) and dropout masks of the run. Autograd in the audited dtype through the
same formulas says what that dtype costs, and the budget allows twice that plus a rounding of the largest element:

    max|hand - exact| <= 2 * (max|autograd in dtype - exact| + eps(dtype) * max|exact|)

Autograd's error is itself a draw of luck: with few rows, of all tensors together. So it is the largest of three: from the
weights, and twice from weights that are moved by a random part of a rounding. In a tensor of few elements (a classifier's
bias), and where the gradient is 0 by symmetry (the last norm's bias before a softmax over tokens), it counts for at least
what is usual in the model: the median over its tensors of the error relative to the largest element, of the model's largest.

The batch is run as two micro-batches (if it has two rows), so that accumulation is audited too; then one optimizer
step is compared with AdamW written out in float64: the norm with that of the exact gradients, the moments with what
follows from the engine's own gradients, the weights with what follows from its own moments. A NaN anywhere is a miss.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import interpreting, requested, use_backend
from ..check import budget, max_error
from ..ops.optimizer_step import joined, split
from .arena import give_back
from .core import NEXT_SEEDS, AdamWConfig, Engine, first_seeds
from .tape import AutogradTape

__all__ = ["AuditReport", "AuditRow", "audit"]

_FEW = 16  # elements
_DRAWS = 3
_CHUNK = 1 << 20  # elements


class AuditRow(NamedTuple):
    """One tensor: relative error (L2) of ours and of autograd in the same dtype, cosine with the exact one, verdict."""

    name: str
    error: float
    autograd_error: float
    cosine: float
    share: float  # of the budget that the largest error takes; > 1 or NaN is a miss
    worst: tuple[int, ...]

    @property
    def ok(self) -> bool:
        return self.share <= 1 and self.cosine == self.cosine


@dataclass(frozen=True)
class AuditReport:
    """All rows, worst first."""

    rows: tuple[AuditRow, ...]
    title: str

    @property
    def ok(self) -> bool:
        return all(r.ok for r in self.rows)

    @property
    def worst(self) -> AuditRow:
        return self.rows[0]

    def table(self, limit: int | None = None) -> str:
        """The rows as text, worst first; `limit` of them, but every miss."""
        rows = [r for i, r in enumerate(self.rows) if limit is None or i < limit or not r.ok]
        width = max(len(r.name) for r in rows)
        lines = [self.title, f"{'parameter':{width}}  rel. error  autograd's   1 - cosine  budget  verdict"]
        for r in rows:
            verdict = "ok" if r.ok else f"MISS at {r.worst}"
            lines.append(
                f"{r.name:{width}}  {r.error:10.2e}  {r.autograd_error:10.2e}  {1 - r.cosine:11.2e}  {r.share:6.2f}  {verdict}"
            )
        misses = sum(not r.ok for r in self.rows)
        lines.append(f"{len(self.rows)} tensors, {misses} misses" + ("" if misses else ": passed"))
        return "\n".join(lines)


def audit(
    model: nn.Module,
    batch: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    optimizer: AdamWConfig | None = None,
    seed: int = 0,
) -> AuditReport:
    """Compare the engine's loss, gradients and one optimizer step on this batch with float64.

    model: is not changed; the batch must be on its device. batch: is run as two micro-batches (if it has two rows), or as
    those that are given, for what cannot be cut by rows: packed sequences. dtype: of the engine's weights and activations.
    backend: of the engine's ops, as `Engine` takes it. optimizer: default AdamW with a limit below the gradient's norm,
    so that clipping is audited; its moments are float32 here, whatever they are in training.
    """
    device = next(model.parameters()).device
    micro = _halves(batch) if isinstance(batch, Mapping) else [dict(one) for one in batch]
    exact_loss, exact = _autograd(model, dtype, micro, seed, torch.float64)
    give_back()
    norm = _norm(exact)
    if optimizer is None:
        optimizer = AdamWConfig(lr=1e-3, max_norm=0.5 * norm if math.isfinite(norm) and norm > 0 else 1.0)
    optimizer = dataclasses.replace(optimizer, moments=torch.float32)
    draws = []
    for draw in range(_DRAWS):
        loss, grads = _autograd(model, dtype, micro, seed, dtype, draw)
        scalars = {"loss": _distance(loss, exact_loss), "optimizer.grad_norm": _one(_norm(grads), norm)}
        draws.append(scalars | {n: _distance(grads[n], e) for n, e in exact.items()})
        del grads
        give_back()
    usual = _usual_error([draws[0][n] for n in exact])

    engine = Engine(copy.deepcopy(model), optimizer, dtype, device, backend, seed, capture=False)
    give_back()
    with torch.no_grad(), use_backend(backend):
        engine._accumulate(micro)
    ours = {"loss": _distance(engine._stats.loss, exact_loss)}
    ours |= {n: _distance(g, exact[n]) for n, g in engine.flat.views(engine.flat.grad).items()}
    rows = [_row(n, found, [draw[n] for draw in draws], dtype, usual=usual) for n, found in ours.items()]
    with torch.no_grad(), use_backend(backend):
        engine._update()
    # Many small errors of one sign, which no element shows, show in the norm.
    name, found_norm = "optimizer.grad_norm", _one(engine._stats.grad_norm.item(), norm)
    rows.append(_row(name, found_norm, [draw[name] for draw in draws], dtype))
    rows += _update(engine, dict(model.named_parameters()), dtype)
    rows.sort(key=lambda r: -r.share if r.share == r.share else -math.inf)
    del engine, exact
    give_back()
    title = f"audit: {dtype}, backend {backend or requested() or 'automatic'}, {len(micro)} micro-batches"
    return AuditReport(tuple(rows), title)


def _halves(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    rows = next(iter(batch.values())).shape[0]
    cut = rows // 2
    parts = [slice(0, cut), slice(cut, rows)] if cut else [slice(0, rows)]
    return [{k: v[part].contiguous() for k, v in batch.items()} for part in parts]


def _autograd(
    model: nn.Module, rounded: torch.dtype, micro: list[dict[str, Tensor]], seed: int, dtype: torch.dtype, draw: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """(loss, gradients by name) of the mean loss by autograd in `dtype`, from weights as an engine of `rounded` has them.

    draw: from 1 on, of weights that are moved by up to half a rounding.
    """
    device = next(model.parameters()).device
    own: Any = copy.deepcopy(model)
    if rounded == torch.bfloat16:  # as the engine rounds; torch takes the other of two that are as near
        with torch.no_grad():
            for p in own.parameters():
                if p.requires_grad:
                    p.copy_(split(p)[0])
    own = own.to(rounded).to(dtype).train()
    if draw:
        generator = torch.Generator().manual_seed(draw)
        with torch.no_grad():
            for p in own.parameters():
                part = torch.rand(p.shape, generator=generator).to(p.device) - 0.5
                p.copy_(p.double() * (1 + torch.finfo(dtype).eps * part))
    seeds = first_seeds(seed, device)
    counts = [_terms(own.units(b, AutogradTape(device=device))) for b in micro]
    units = [max(1, sum(count.item() for count in term)) for term in zip(*counts, strict=True)]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in micro:
        sums = _terms(own(**batch, reduction="sum", tape=AutogradTape(seeds, device)))
        loss = torch.stack([term / count for term, count in zip(sums, units, strict=True)]).sum()
        loss.backward()
        total += loss.detach()
        seeds += NEXT_SEEDS
    named = [(n, p) for n, p in own.named_parameters() if p.requires_grad]
    return total, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}


def _terms(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _chunks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Tensors of as many elements each, flat and piece by piece, so that what is computed of them takes little memory."""
    flat = [t.detach().reshape(-1) for t in tensors]
    for start in range(0, flat[0].numel(), _CHUNK):
        yield [t[start : start + _CHUNK] for t in flat]


def _norm(grads: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(g.double().square().sum().item() for t in grads.values() for (g,) in _chunks(t)))


@dataclass
class _Distance:
    """How far a tensor is from the exact one, of the pieces that were added so far."""

    shape: tuple[int, ...] | None = None  # None: flat
    numel: int = 0
    error: float = 0.0
    at: int = 0
    difference: float = 0.0  # this and the next three: sums of squares and of products
    value: float = 0.0
    exact: float = 0.0
    product: float = 0.0
    largest: float = 0.0  # of the exact elements that are finite

    def add(self, value: Tensor, exact: Tensor) -> None:
        """The next elements, (n,) each."""
        value, exact = value.double(), exact.double()
        error, _, worst = max_error(value, exact)
        if error > self.error:
            self.error, self.at = error, self.numel + worst[0]
        self.numel += value.numel()
        d = value - exact
        self.difference += (d @ d).item()
        self.value += (value @ value).item()
        self.exact += (exact @ exact).item()
        self.product += (value @ exact).item()
        self.largest = max(self.largest, exact.abs().nan_to_num_(0.0, 0.0).max().item())

    @property
    def worst(self) -> tuple[int, ...]:
        """Where the largest error is."""
        shape = (self.numel,) if self.shape is None else self.shape
        return tuple(int(i) for i in torch.unravel_index(torch.tensor(self.at), shape)) if self.numel else ()

    @property
    def relative(self) -> float:
        """The error's norm over that of the exact tensor."""
        return math.sqrt(self.difference / self.exact) if self.exact else math.sqrt(self.difference)

    @property
    def cosine(self) -> float:
        both = math.sqrt(self.value) * math.sqrt(self.exact)
        return self.product / both if both else float(self.value == self.exact == 0)


def _distance(value: Tensor, exact: Tensor) -> _Distance:
    found = _Distance(tuple(value.shape))
    for pieces in _chunks(value, exact):
        found.add(*pieces)
    return found


def _one(value: float, exact: float) -> _Distance:
    return _distance(torch.tensor(value, dtype=torch.float64), torch.tensor(exact, dtype=torch.float64))


def _usual_error(draw: Sequence[_Distance]) -> float:
    """The median over tensors of autograd's largest error over the largest element, times the model's largest element."""
    errors = [found.error / found.largest for found in draw if found.largest > 0]
    return statistics.median(errors) * max(found.largest for found in draw) if errors else 0.0


def _row(
    name: str, ours: _Distance, draws: Sequence[_Distance], dtype: torch.dtype, exactly: bool = False, usual: float = 0.0,
    roundings: float = 1.0,
) -> AuditRow:  # fmt: skip
    autograd_error = max((draw.error for draw in draws), default=0.0)
    if 0 < ours.numel < _FEW or (ours.numel and ours.largest <= usual):
        autograd_error = max(autograd_error, usual)
    largest = torch.tensor([ours.largest], dtype=torch.float64)
    limit = 0.0 if exactly else budget(autograd_error, largest, dtype, roundings)
    share = ours.error / limit if limit > 0 else (0.0 if ours.error == 0 else math.inf)
    return AuditRow(name, ours.relative, draws[0].relative if draws else 0.0, ours.cosine, share, ours.worst)


def _update(engine: Engine, before: Mapping[str, Tensor], dtype: torch.dtype) -> list[AuditRow]:
    """AdamW's first update, written out in float64: each part from what the engine itself has of those before it.

    The moments from its gradients, which the update leaves as they are; the weights from its moments and the weights
    `before`, by name.
    """
    flat, o = engine.flat, engine.optimizer
    norm = _norm(flat.views(flat.grad))
    clip = min(1.0, o.max_norm / (norm + 1e-6)) if o.max_norm else 1.0
    exp_avg, exp_avg_sq, master, param = _Distance(), _Distance(), _Distance(), _Distance()
    for name in flat.names:
        decay = 1 - o.lr * o.weight_decay * (len(flat.shapes[name]) >= 2)
        halves = flat.trail is not None
        second = flat.trail if flat.trail is not None else flat.param
        own = (flat.view(b, name) for b in (flat.grad, flat.master, second, flat.exp_avg, flat.exp_avg_sq))
        for g, w, p, m, v, old in _chunks(*own, before[name]):
            if halves:
                w, p = joined(w, p), w
            g = g.double() * clip
            exp_avg.add(m, g * (1 - o.betas[0]))
            exp_avg_sq.add(v, g.square() * (1 - o.betas[1]))
            step = o.lr * (m.double() / (1 - o.betas[0])) / ((v.double() / (1 - o.betas[1])).sqrt() + o.eps)
            master.add(w, old.to(flat.wide).double() * decay - step)
            param.add(p, split(w)[0] if halves else w.to(p.dtype))
    # Triton's interpreter truncates to bfloat16 where a GPU rounds.
    exactly = not (interpreting() and (engine.backend or requested()) == "triton")
    return [
        # the factor that clips is rounded itself, and squared
        _row("optimizer.exp_avg", exp_avg, (), flat.wide, roundings=2),
        _row("optimizer.exp_avg_sq", exp_avg_sq, (), flat.wide, roundings=2),
        _row("optimizer.master", master, (), flat.wide),
        _row("optimizer.param", param, (), dtype, exactly),
    ]
