"""`swiglu` in Triton: a form of kernels/activation.py."""

from __future__ import annotations

from functools import partial

from . import activation

__all__ = ["backward", "forward"]

forward = partial(activation.gated_forward, "silu")
backward = partial(activation.gated_backward, "silu")
