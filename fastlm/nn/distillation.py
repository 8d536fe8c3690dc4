"""Distillation losses as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops

__all__ = ["DistillationLoss"]


class DistillationLoss(torch.nn.Module):
    """A divergence between teacher and student from the logits of both; options of ``fastlm.ops.distillation_loss``.

    Unlike ``torch.nn.KLDivLoss``, which takes log-probabilities and probabilities, it takes logits, and its mean is over
    tokens.
    """

    def __init__(
        self, divergence: str = "forward_kl", *, beta: float = 0.5, temperature: float = 1.0, rescale: bool = True,
        reduction: str = "mean",
    ) -> None:  # fmt: skip
        super().__init__()
        self.options: dict[str, Any] = {
            "divergence": divergence, "beta": beta, "temperature": temperature, "rescale": rescale,
            "reduction": reduction,
        }  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())

    def forward(
        self, student: Tensor, teacher: Tensor, token_weight: Tensor | None = None, tape: Any = None
    ) -> Tensor:
        """student, teacher (..., V), token_weight (...) -> loss, float32."""
        loss: Tensor = ops.distillation_loss(student, teacher, token_weight=token_weight, **self.options, tape=tape)
        return loss

    def backward(self, d_loss: Tensor, tape: Any) -> Any:
        """(d_student, d_teacher)."""
        return tape.backward("distillation_loss", d_loss)
