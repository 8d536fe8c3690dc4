"""Checks of arguments that every form of cross-entropy takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_floating
from .cross_entropy_math import Options

__all__: list[str] = []

REDUCTIONS = ("mean", "sum", "none")


def check_targets(name: str, x: Tensor, target: object, classes: int) -> None:
    """target must be int64 of x's leading dimensions, or probabilities for each of the classes too."""
    indices = isinstance(target, Tensor) and target.dtype == torch.int64
    if not isinstance(target, Tensor) or not (indices or target.is_floating_point()):
        given = f"dtype {target.dtype}" if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(
            f"target: got {given}; allowed: an int64 tensor of class indices, or a floating-point one of probabilities"
        )
    lead = tuple(x.shape[:-1])
    allowed = lead if indices else (*lead, classes)
    if target.shape != allowed:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}; allowed: {allowed}, "
            + (f"that of {name} without its last dimension" if indices else "a probability for each class")
        )
    if not indices:
        check_dtype("target", target, x.dtype)
        check_constant("target", target)


def check_dtype(name: str, v: Tensor, dtype: torch.dtype) -> None:
    """v must be of the given dtype or float32, for float64 of no other."""
    check_floating(name, v)
    if v.dtype not in (dtype, torch.float32) or (dtype == torch.float64 and v.dtype != dtype):
        raise TypeError(
            f"{name}: got dtype {v.dtype}; allowed: {dtype}"
            + (" or torch.float32" if dtype != torch.float64 else "")
        )


def check_constant(name: str, v: Tensor) -> None:
    """v must not ask for the gradient that there is none of."""
    if v.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: got requires_grad=True; allowed: {name}.detach(), as it has no gradient here")


def check_class_vector(name: str, v: Tensor | None, classes: int, dtype: torch.dtype) -> None:
    """v must be None or (V,), of the given dtype or float32."""
    if v is None:
        return
    check_floating(name, v)
    if v.shape != (classes,):
        raise ValueError(f"{name}: got shape {tuple(v.shape)}; allowed: ({classes},), one for each class")
    check_dtype(name, v, dtype)


def check_token_weight(token_weight: Tensor | None, x: Tensor) -> None:
    """token_weight must be None or of x's leading dimensions, of its dtype or float32."""
    if token_weight is None:
        return
    check_floating("token_weight", token_weight)
    if token_weight.shape != x.shape[:-1]:
        raise ValueError(
            f"token_weight: got shape {tuple(token_weight.shape)}; allowed: {tuple(x.shape[:-1])}, one for each token"
        )
    check_dtype("token_weight", token_weight, x.dtype)
    check_constant("token_weight", token_weight)


def check_options(
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, logit_scale: float,
    reduction: str, extras: bool,
) -> Options:  # fmt: skip
    """The options that are numbers and names, as the schemas take them."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}; allowed: 0 to 1")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss: got {z_loss}; allowed: finite and >= 0")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: got {softcap}; allowed: finite and > 0, or None")
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale: got {logit_scale}; allowed: finite and > 0")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; allowed: {', '.join(REDUCTIONS)}")
    return Options(
        int(ignore_index), float(label_smoothing), float(z_loss), None if softcap is None else float(softcap),
        float(logit_scale), reduction, bool(extras),
    )  # fmt: skip
