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
step is compared with AdamW written out in float64. A NaN anywhere is a miss.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import interpreting, requested, use_backend
from ..check import budget, max_error
from .arena import give_back
from .core import NEXT_SEEDS, AdamWConfig, Engine
from .tape import AutogradTape

__all__ = ["AuditReport", "AuditRow", "audit"]

_FEW = 16  # elements
_DRAWS = 3


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
    wide = dataclasses.replace(optimizer or AdamWConfig(), moments=torch.float32)
    engine = Engine(copy.deepcopy(model), wide, dtype, device, backend, seed, cuda_graph=False)
    exact_loss, exact = _autograd(engine, micro, torch.float64)
    draws = [_autograd(engine, micro, dtype, draw) for draw in range(_DRAWS)]
    same_losses, same = [loss for loss, _ in draws], [grads for _, grads in draws]
    if optimizer is None:
        norm = _norm(exact)
        engine.optimizer = AdamWConfig(
            lr=1e-3, max_norm=0.5 * norm if math.isfinite(norm) and norm > 0 else 1.0, moments=torch.float32
        )
        engine._lr.fill_(engine.optimizer.lr)

    with torch.no_grad(), use_backend(backend):
        engine._accumulate(micro)
    ours = {n: g.clone() for n, g in engine.flat.views(engine.flat.grad).items()}
    usual = _usual_error(same[0], exact)
    rows = [_row("loss", engine._stats.loss, same_losses, exact_loss, dtype, usual=usual)]
    rows += [_row(n, ours[n], [draw[n] for draw in same], exact[n], dtype, usual=usual) for n in exact]
    rows += _audit_update(engine, exact, same, dtype)
    rows.sort(key=lambda r: -r.share if r.share == r.share else -math.inf)
    del engine, exact, same, ours
    give_back()
    title = f"audit: {dtype}, backend {backend or requested() or 'automatic'}, {len(micro)} micro-batches"
    return AuditReport(tuple(rows), title)


def _halves(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    rows = next(iter(batch.values())).shape[0]
    cut = rows // 2
    parts = [slice(0, cut), slice(cut, rows)] if cut else [slice(0, rows)]
    return [{k: v[part].contiguous() for k, v in batch.items()} for part in parts]


def _autograd(
    engine: Engine, micro: list[dict[str, Tensor]], dtype: torch.dtype, draw: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradients by name) of the mean loss by autograd, from the engine's weights and seeds.

    draw: from 1 on, of weights that are moved by up to half a rounding.
    """
    model: Any = copy.deepcopy(engine.model).to(dtype).train()
    if draw:
        generator = torch.Generator().manual_seed(draw)
        with torch.no_grad():
            for p in model.parameters():
                part = torch.rand(p.shape, generator=generator).to(p.device) - 0.5
                p.copy_(p.double() * (1 + torch.finfo(dtype).eps * part))
    seeds = engine._seeds.clone()
    counts = [_terms(model.units(b, AutogradTape(device=engine.device))) for b in micro]
    units = [max(1, sum(count.item() for count in term)) for term in zip(*counts, strict=True)]
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for batch in micro:
        sums = _terms(model(**batch, reduction="sum", tape=AutogradTape(seeds, engine.device)))
        loss = torch.stack([term / count for term, count in zip(sums, units, strict=True)]).sum()
        loss.backward()
        total += loss.detach()
        seeds += NEXT_SEEDS
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return total, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}


def _terms(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _norm(grads: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))


def _usual_error(same: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """The median over tensors of autograd's largest error over the largest element, times the model's largest element."""
    largest = {n: t.abs().max().item() for n, t in exact.items() if t.numel()}
    errors = [max_error(same[n].double(), exact[n])[0] / m for n, m in largest.items() if m > 0]
    return statistics.median(errors) * max(largest.values()) if errors else 0.0


def _row(
    name: str, ours: Tensor, draws: Sequence[Tensor], exact: Tensor, dtype: torch.dtype, exactly: bool = False,
    usual: float = 0.0,
) -> AuditRow:  # fmt: skip
    exact, ours, same = exact.double(), ours.detach().double(), draws[0].detach().double()
    error, _, worst = max_error(ours, exact)
    autograd_error = max(max_error(draw.detach().double(), exact)[0] for draw in draws)
    if 0 < exact.numel() < _FEW or (exact.numel() and exact.abs().max().item() <= usual):
        autograd_error = max(autograd_error, usual)
    limit = 0.0 if exactly else budget(autograd_error, exact, dtype)
    share = error / limit if limit > 0 else (0.0 if error == 0 else math.inf)
    scale = exact.norm().item()
    relative = [
        ((t - exact).norm() / scale).item() if scale else (t - exact).norm().item() for t in (ours, same)
    ]
    both = ours.norm().item() * scale
    cosine = (
        (ours.flatten() @ exact.flatten()).item() / both
        if both
        else float(not ours.any() and not exact.any())
    )
    return AuditRow(name, relative[0], relative[1], cosine, share if error == error else math.nan, worst)


def _audit_update(
    engine: Engine, exact: dict[str, Tensor], same: Sequence[dict[str, Tensor]], dtype: torch.dtype
) -> list[AuditRow]:
    """One update against AdamW written out: its moments from the exact gradients, its weights from its own moments."""
    flat, o = engine.flat, engine.optimizer
    before = flat.master.double().clone()
    decay = torch.cat(
        [_padded(flat, n, torch.full(flat.shapes[n], float(len(flat.shapes[n]) >= 2))) for n in flat.names]
    )
    with torch.no_grad(), use_backend(engine.backend):
        engine._update()

    def moments(grads: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        norm = _norm(grads)
        clip = min(1.0, o.max_norm / (norm + 1e-6)) if o.max_norm else 1.0
        g = torch.cat([_padded(flat, n, grads[n].double()) for n in flat.names]) * clip
        return torch.tensor(norm, dtype=torch.float64), g * (1 - o.betas[0]), g.square() * (1 - o.betas[1])

    names = ("optimizer.grad_norm", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    values = (engine._stats.grad_norm.cpu(), flat.exp_avg, flat.exp_avg_sq)
    rows = [_row(*r, dtype) for r in zip(names, values, zip(*map(moments, same), strict=True), moments(exact), strict=True)]

    m, v = flat.exp_avg.double() / (1 - o.betas[0]), flat.exp_avg_sq.double() / (1 - o.betas[1])
    decayed = before * (1 - o.lr * o.weight_decay * decay.to(before))
    after = decayed - o.lr * m / (v.sqrt() + o.eps)
    rows.append(_row("optimizer.master", flat.master, [after], after, flat.wide))
    rounded = flat.master.to(flat.param.dtype)
    # Triton's interpreter truncates to bfloat16 where a GPU rounds.
    exactly = not (interpreting() and (engine.backend or requested()) == "triton")
    rows.append(_row("optimizer.param", flat.param, [rounded], rounded, dtype, exactly))
    return rows


def _padded(flat: Any, name: str, value: Tensor) -> Tensor:
    """A parameter's values as they lie in the flat buffer, with zeros up to the next parameter."""
    out = torch.zeros(flat.lengths[name], dtype=value.dtype, device=value.device)
    out[: value.numel()] = value.flatten()
    return out
