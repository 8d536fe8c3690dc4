"""`lstm` in Triton: a form of kernels/recurrent.py."""

from __future__ import annotations

from functools import partial

from .recurrent import compile_cases_of, launch_backward, launch_forward

__all__ = ["backward", "compile_cases", "forward"]

forward = partial(launch_forward, "lstm")
backward = partial(launch_backward, "lstm")
compile_cases = partial(compile_cases_of, "lstm", 4)
