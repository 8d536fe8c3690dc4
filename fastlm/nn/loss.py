"""Losses as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss"]


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Drop-in for ``torch.nn.CrossEntropyLoss``, with the options of ``fastlm.ops.cross_entropy``.

    Shapes as torch's: logits (C,), (N, C) or (N, C, d1, ...); targets without C as int64 class indices, or of the
    logits' shape as probabilities, which have no gradient. The loss is float32 whatever their dtype. With extras the
    module returns (loss, CrossEntropyExtras), with everything of a token in the shape of the indices.
    """

    def __init__(
        self, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
        reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0, *,
        z_loss: float = 0.0, softcap: float | None = None, logit_scale: float = 1.0, extras: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.logit_scale, self.extras = z_loss, softcap, logit_scale, extras

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Any:
        """token_weight: a weight for each token, in the shape of the indices."""
        return ops.cross_entropy(
            _classes_last(input), _classes_last(target) if target.is_floating_point() else target,
            weight=self.weight, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing,
            z_loss=self.z_loss, softcap=self.softcap, reduction=self.reduction, logit_scale=self.logit_scale,
            token_weight=token_weight, extras=self.extras,
        )  # fmt: skip


def _classes_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1) if x.dim() > 2 else x


class LinearCrossEntropyLoss(torch.nn.Module):
    """The output projection and its cross-entropy in one, without ever holding all logits.

    weight (vocab, hidden) and bias (vocab) are parameters, initialised as torch.nn.Linear's; to tie the projection to an
    embedding, assign that parameter to `weight`. class_weight is a buffer. The options are those of
    ``fastlm.ops.linear_cross_entropy``.
    """

    def __init__(
        self, hidden_size: int, vocab_size: int, bias: bool = False, *, class_weight: Tensor | None = None,
        ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
        reduction: str = "mean", logit_scale: float = 1.0, extras: bool = False, workspace_mb: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        linear = torch.nn.Linear(hidden_size, vocab_size, bias=bias)
        self.weight = linear.weight
        self.bias = linear.bias
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", class_weight)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss,
            "softcap": softcap, "reduction": reduction, "logit_scale": logit_scale, "extras": extras,
            "workspace_mb": workspace_mb,
        }  # fmt: skip

    def forward(
        self, hidden: Tensor, target: Tensor, token_weight: Tensor | None = None, tape: Any = None
    ) -> Any:
        """hidden (..., hidden_size), target (...), or probabilities (..., vocab_size), token_weight (...) -> loss, float32;
        with extras (loss, CrossEntropyExtras)."""
        return ops.linear_cross_entropy(
            hidden, self.weight, target, self.bias, class_weight=self.class_weight, token_weight=token_weight,
            **self.options, tape=tape,
        )  # fmt: skip

    def backward(
        self, d_loss: Tensor | None, tape: Any, d_z_loss: Tensor | None = None, d_lse: Tensor | None = None
    ) -> Tensor:
        """d_hidden, from the gradients of the loss and of the extras that have one."""
        dx: Tensor = tape.backward(
            "linear_cross_entropy", d_loss, d_z_loss, d_lse, weight=self.weight, bias=self.bias
        )
        return dx
