"""What a tape need not keep, chosen for a whole model at once."""

from __future__ import annotations

from torch import nn

from ..nn import MLP

__all__ = ["RECOMPUTE", "Recomputing"]

RECOMPUTE = ("none", "mlp", "block")


class Recomputing(nn.Module):
    """A model, or a part of one, of blocks with MLPs.

    recompute: what a tape does not keep and backward computes again: "none", "mlp" (its activation) or "block" (all but
    a block's inputs); it changes no number. Setting it sets that of all parts.
    """

    _recompute = "none"

    @property
    def recompute(self) -> str:
        return self._recompute

    @recompute.setter
    def recompute(self, what: str) -> None:
        if what not in RECOMPUTE:
            raise ValueError(f"recompute: got {what!r}; allowed: {', '.join(RECOMPUTE)}")
        for part in self.modules():
            if isinstance(part, Recomputing):
                part._recompute = what
            elif isinstance(part, MLP):
                part.recompute = what == "mlp"
