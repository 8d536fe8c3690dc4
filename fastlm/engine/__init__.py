"""The training step without autograd: memory, forward, backward, accumulation, optimizer, and the audit that proves it.

A model the engine can train is an ``nn.Module`` with

    forward(**batch, reduction="sum", tape)   the loss as a sum over its units, 0-dim
    backward(d_loss, tape)                    the mirror, which adds parameter gradients
    units(batch, tape)                        how many units that sum has, 0-dim on the device

and, where it carries tensors from batch to batch, carried() -> {name: tensor}, which then are part of the engine's state.

A loss of several terms, each a mean over units of its own (masked tokens and pairs, in BERT's pre-training), has
``loss_terms``, their number: forward then returns a tuple of sums, units a tuple of counts, backward gets a tuple of
gradients, and the loss is the sum of the terms' means over all micro-batches. Forward says ``tape.term(i)`` before it
computes the loss of term i. A model with metrics beyond its loss takes ``outputs``, a dict, and puts there what they read.

Recomputation. A layer that runs as a segment keeps only its inputs; backward runs it again, with the same dropout masks,
before its own backward. Both calls stand where the layer's would, so the mirror stays one:

    forward    y = layer(x, tape=tape)               y = tape.checkpoint(layer, x)
    backward   dx = layer.backward(dy, tape)         dx = tape.checkpoint_backward(layer.backward, dy)

The segment may also be a method of a layer, with its mirror in backward; it may have any inputs and outputs, and segments
inside. Nothing may write to its inputs before backward has run. The numbers are the same to the last bit, and the second
run ends at the last value that backward reads, so end a segment with a product where you can. A model says which kinds
it has by an attribute ``recompute`` ("none", or what is not kept), as GPT does; `AutogradTape.checkpoint` just runs the
layer, so the audit holds for it as for any other.

Memory before the run: ``engine.dry_run`` runs all this on tensors that have shapes only (device "meta") and counts. A model
needs nothing for it but what a CUDA graph asks too: no step that depends on the values in a tensor.
"""

from __future__ import annotations

from .audit import AuditReport, AuditRow, audit
from .core import AdamWConfig, Engine, StepStats, gradients

__all__ = ["AdamWConfig", "AuditReport", "AuditRow", "Engine", "StepStats", "audit", "gradients"]
