"""Losses as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss"]


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Drop-in for ``torch.nn.CrossEntropyLoss`` with class-index targets, plus z_loss and softcap.

    Shapes as torch's: logits (classes,), (N, classes) or (N, classes, d1, ...). The loss is float32 whatever their dtype.
    """

    def __init__(
        self, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
        reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
        z_loss: float = 0.0, softcap: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap = z_loss, softcap

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = ops.cross_entropy(
            logits.movedim(1, -1) if logits.dim() > 2 else logits, target, weight=self.weight,
            ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, z_loss=self.z_loss,
            softcap=self.softcap, reduction=self.reduction,
        )  # fmt: skip
        return loss


class LinearCrossEntropyLoss(torch.nn.Module):
    """The output projection and its cross-entropy in one, without ever holding all logits.

    weight (vocab, hidden) and bias (vocab) are parameters, initialised as torch.nn.Linear's; to tie the projection to an
    embedding, assign that parameter to `weight`. The options are those of ``fastlm.ops.linear_cross_entropy``.
    """

    def __init__(
        self, hidden_size: int, vocab_size: int, bias: bool = False, *, ignore_index: int = -100,
        label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None, reduction: str = "mean",
        workspace_mb: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        linear = torch.nn.Linear(hidden_size, vocab_size, bias=bias)
        self.weight = linear.weight
        self.bias = linear.bias
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss,
            "softcap": softcap, "reduction": reduction, "workspace_mb": workspace_mb,
        }  # fmt: skip

    def forward(self, hidden: Tensor, target: Tensor, tape: Any = None) -> Tensor:
        """hidden (..., hidden_size), target (...) -> loss, float32."""
        loss: Tensor = ops.linear_cross_entropy(
            hidden, self.weight, target, self.bias, **self.options, tape=tape
        )
        return loss

    def backward(self, d_loss: Tensor, tape: Any) -> Tensor:
        """d_hidden."""
        dx: Tensor = tape.backward("linear_cross_entropy", d_loss, weight=self.weight, bias=self.bias)
        return dx
