"""The training step without autograd: memory, forward, backward, accumulation, optimizer, and the audit that proves it.

A model the engine can train is an ``nn.Module`` with

    forward(**batch, reduction="sum", tape)   the loss as a sum over its units, 0-dim
    backward(d_loss, tape)                    the mirror, which adds parameter gradients
    units(batch, tape)                        how many units that sum has, 0-dim on the device
"""

from __future__ import annotations

from .audit import AuditReport, AuditRow, audit
from .core import AdamWConfig, Engine, StepStats, gradients

__all__ = ["AdamWConfig", "AuditReport", "AuditRow", "Engine", "StepStats", "audit", "gradients"]
