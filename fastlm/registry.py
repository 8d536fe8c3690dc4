"""What an op is: its record, the samples it is tested on, and how all ops are found.

An op lives in ``fastlm/ops/<name>.py`` and is one `Op` record made of plain functions:

    forward(*args)               -> (*outputs, *statistics)       plain PyTorch, differentiable
    backward(*d_outputs, *saved, *options, needs) -> gradients    plain PyTorch, by hand, no autograd
    outputs(*args)               -> Specs of what forward returns  (shapes only)
    gradients(<as backward>)     -> Specs of what backward returns (shapes only)

`args` follow the schema; `saved` are the inputs and results that backward reads, `options` the schema's
arguments that are not tensors, `needs` one bool for each name in `grads`; a gradient that is not needed is None.

A native implementation (Triton, C++, CUDA) has the same name and the same arguments, followed by what it writes:

    forward(*args, *outputs)     backward(*d_outputs, *saved, *options, *gradients)

where a gradient that nobody wants is None, and the gradients named in `accumulates` (those of parameters) are
float32 buffers that the kernel ADDS to: zeros for a plain autograd call, the engine's gradient buffers in a step.
Those in `own_dtype` come as zeros of the parameter's dtype in a plain autograd call: their kernel rounds each sum once.
An op whose loss is one number may be computed with its gradients in one pass (`together`), given the gradient of the first
result, or None for 1; a backend that can has a third function,

    together(d_output, *args, *outputs, *gradients, replace)

which with `replace` overwrites the gradients in `accumulates`, whatever they held, in place of adding to them.

A kernel file may say `cannot_serve(direction, *args) -> str`: the reason why it cannot take a call, "" if it can.
Inputs are never written to, except those named in `mutates` (optimizer ops, which have no backward).

The record is registered with torch.library and as an autograd function (fastlm/autograd.py), so that every op is
differentiable, is one node for ``torch.compile(fullgraph=True)``, passes ``opcheck`` and obeys ``torch.func``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, backends, native
from .samples import Bad, Pick, Sample

__all__ = ["Cost", "Op", "Spec", "get", "ops", "register"]


class Spec(NamedTuple):
    """Shape, dtype and memory order of a tensor to be made. `order` lists dimensions from outermost to innermost."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...] | None = None

    def empty(self, device: torch.device) -> Tensor:
        """A new uninitialised tensor."""
        if self.order is None:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        inverse = [self.order.index(d) for d in range(len(self.order))]
        return torch.empty([self.shape[d] for d in self.order], dtype=self.dtype, device=device).permute(
            inverse
        )


Alloc = Callable[[Spec, torch.device], Tensor]


@dataclass(frozen=True)
class Op:
    """One operation. See the module's docstring for the contract of each field."""

    name: str
    schema: str  # "(Tensor x, float eps) -> (Tensor y, Tensor mean)", as torch.library takes it
    forward: Callable[..., tuple[Any, ...]]
    outputs: Callable[..., tuple[Spec, ...]]
    cost: Callable[..., Cost]
    peer: Callable[..., Any]  # what a PyTorch user writes today, with the public function's arguments
    samples: Sequence[Sample]
    errors: Sequence[Bad]
    random: Callable[[Pick], Sample]  # arguments drawn from all that the op accepts, for property tests
    case: Callable[..., Sample]  # arguments at a real size, from named dimensions with defaults
    shapes: Mapping[str, Sequence[Mapping[str, Any]]]  # sets of dimensions for `case`; one is "default"
    backward: Callable[..., tuple[Any, ...]] | None = None
    gradients: Callable[..., tuple[Spec, ...]] | None = None
    grads: tuple[str, ...] = ()  # inputs that have a gradient, in the order in which backward returns them
    shared: tuple[tuple[str, str], ...] = ()  # (input, the one of `grads` whose gradient is its gradient too)
    shared_when: Callable[..., bool] | None = (
        None  # (*options) -> whether `shared` holds; where it does not, those inputs, then in `grads`, have their own
    )
    accumulates: tuple[str, ...] = ()  # those of `grads` that are parameters: float32, added to
    own_dtype: tuple[str, ...] = ()  # those of `accumulates` that autograd gets in the parameter's dtype, rounded once
    together: Callable[..., bool] | None = None  # (*options) -> whether the first result is one number
    terms: Callable[..., Mapping[str, float]] | None = (
        None  # (upstream, **args) -> of gradients that are sums which may cancel, the largest sum of absolute terms
    )
    saved: tuple[str, ...] = ()  # inputs and results that backward reads
    results: int = 1  # how many of the outputs are the caller's and have a gradient
    constants: int = 0  # how many after them are the caller's and have none; the rest are statistics for backward
    mutates: tuple[str, ...] = ()
    changed: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None  # args -> what those are worth, if together
    contiguous: bool = (
        True  # native kernels get contiguous tensors; else any strides with a contiguous last dim
    )

    # --- the schema, read once

    @cached_property
    def arguments(self) -> tuple[tuple[str, str, Any], ...]:
        """(name, type, default) of each argument, e.g. ("weight", "Tensor?", None)."""
        schema = torch._C.parse_schema(f"fastlm::{self.name}{self.schema}")
        return tuple((a.name, _type_text(a), a.default_value) for a in schema.arguments)

    @cached_property
    def returns(self) -> tuple[str, ...]:
        """Names of what forward returns."""
        return tuple(r.name for r in torch._C.parse_schema(f"fastlm::{self.name}{self.schema}").returns)

    @property
    def returned(self) -> int:
        """How many of the outputs are the caller's."""
        return self.results + self.constants

    @cached_property
    def position(self) -> dict[str, int]:
        """Where each argument stands in the schema."""
        return {name: i for i, (name, _, _) in enumerate(self.arguments)}

    @cached_property
    def options(self) -> tuple[int, ...]:
        """Positions of the arguments that are not tensors."""
        return tuple(i for i, (_, kind, _) in enumerate(self.arguments) if not kind.startswith("Tensor"))

    def sharing(self, options: Sequence[Any]) -> dict[str, str]:
        """{input: the one of `grads` whose gradient is its gradient too} for a call with these options."""
        if self.shared_when is not None and not self.shared_when(*options):
            return {}
        return dict(self.shared)

    def takers(self, options: Sequence[Any]) -> list[list[int]]:
        """For each of `grads`, the positions of the arguments that have that gradient in a call with these options."""
        sharing = self.sharing(options)
        groups = {name: [self.position[name]] if name not in sharing else [] for name in self.grads}
        for name, owner in sharing.items():
            groups[owner].append(self.position[name])
        return list(groups.values())

    def wanted(self, args: Sequence[Any], options: Sequence[Any]) -> tuple[bool, ...]:
        """For each of `grads`, whether a call with these arguments has a tensor that it is the gradient of."""
        there = [isinstance(a, Tensor) and a.is_floating_point() for a in args]
        return tuple(any(there[i] for i in group) for group in self.takers(options))

    # --- running

    def __call__(self, *args: Any, tape: Any = None) -> tuple[Any, ...]:
        """The caller's outputs: differentiable without a tape; with one (the engine's), recorded on it."""
        if tape is not None:
            return tuple(tape.forward(self, args))
        out = _CALLS[self.name](*args)
        return tuple(out[: self.returned]) if isinstance(out, (tuple, list)) else (out,)

    def run_forward(self, args: Sequence[Any], alloc: Alloc | None = None) -> tuple[Any, ...]:
        """Everything that forward returns, by the chosen backend, without autograd."""
        run = backends.implementation(self, "forward", args)
        if run is None:
            return tuple(self.forward(*args))
        device = _device(args)
        out = tuple((alloc or _fresh)(s, device) for s in self.outputs(*args))
        run(*(_readable(self, n, a) for (n, _, _), a in zip(self.arguments, args, strict=True)), *out)
        return out

    def pick_saved(self, args: Sequence[Any], out: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(saved tensors, options): what backward needs of a forward call."""
        saved = tuple(
            args[self.position[n]] if n in self.position else out[self.returns.index(n)] for n in self.saved
        )
        return saved, tuple(args[i] for i in self.options)

    def run_backward(
        self,
        d_outputs: Sequence[Any],
        saved: Sequence[Any],
        options: Sequence[Any],
        needs: Sequence[bool],
        alloc: Alloc | None = None,
        into: Mapping[str, Tensor] | None = None,
        own: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """The gradients in the order of `grads`; None where not needed.

        into: tensors to put gradients in by name: those in `accumulates` are added to, the others overwritten.
        own: those in `own_dtype` that have no tensor in `into` come in the parameter's dtype.
        """
        assert self.backward is not None and self.gradients is not None
        into = into or {}
        args = (*d_outputs, *saved, *options)
        run = backends.implementation(self, "backward", args)
        if run is None:
            grads = dict(zip(self.grads, self.backward(*args, tuple(needs)), strict=True))
            for name, target in into.items():
                value = grads[name]
                if value is not None:
                    grads[name] = target.add_(value) if name in self.accumulates else target.copy_(value)
            if own and self.own_dtype:
                specs = zip(self.grads, self.gradient_specs(args, needs, own), strict=True)
                for name, spec in specs:
                    if name not in into and (value := grads[name]) is not None:
                        grads[name] = value.to(spec.dtype)
            return tuple(grads.values())
        out = self._gradients(args, needs, alloc, into, own)
        run(*(_readable(self, "", a) for a in args), *out)
        return out

    def together_by(self, args: Sequence[Any]) -> str:
        """The backend that would serve `run_together`; "" if the one that serves the call has no such pass."""
        if self.together is None or not self.together(*(args[i] for i in self.options)):
            return ""
        backend = backends.choose(self, args).backend
        return "" if backend == "reference" or backends.missing(self.name, "together", backend) else backend

    def run_together(
        self, args: Sequence[Any], needs: Sequence[bool], alloc: Alloc | None = None,
        into: Mapping[str, Tensor] | None = None, d_output: Tensor | None = None, stale: Collection[str] = (),
    ) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]] | None:  # fmt: skip
        """(what forward returns, what backward returns for the gradient `d_output`, or 1, of the first result), in one pass.

        None if the backend that serves the call has no such pass. into: as for `run_backward`. stale: those of `into` that
        are overwritten though they are in `accumulates`.
        """
        if not any(needs) or not (backend := self.together_by(args)):
            return None
        device, options = _device(args), [args[i] for i in self.options]
        out = tuple((alloc or _fresh)(s, device) for s in self.outputs(*args))
        for_backward = (*out[: self.results], *self.pick_saved(args, out)[0], *options)
        replace = not any(n in self.accumulates and n not in stale for n in into or ())
        grads = self._gradients(for_backward, needs, alloc, into, zeros=not replace)
        if not replace:
            for name in stale:
                native.zero_((into or {})[name])
        readable = (_readable(self, n, a) for (n, _, _), a in zip(self.arguments, args, strict=True))
        backends.function(self, backend, "together")(d_output, *readable, *out, *grads, replace)
        return out, grads

    def _gradients(
        self, args: Sequence[Any], needs: Sequence[bool], alloc: Alloc | None, into: Mapping[str, Tensor] | None,
        own: bool = False, zeros: bool = True,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Tensors for a native backward of these arguments to write, or add, the gradients to. zeros: fill fresh ones."""
        device = _device(args)
        out: list[Tensor | None] = []
        for name, spec, need in zip(self.grads, self.gradient_specs(args, needs, own), needs, strict=True):
            if not need:
                out.append(None)
            elif into and name in into:
                out.append(into[name])
            else:
                fresh = (alloc or _fresh)(spec, device)
                out.append(native.zero_(fresh) if zeros and name in self.accumulates else fresh)
        return tuple(out)

    def gradient_specs(self, args: Sequence[Any], needs: Sequence[bool], own: bool) -> tuple[Spec, ...]:
        """Specs of what `run_backward` makes, from the arguments of `backward`."""
        assert self.gradients is not None
        specs = self.gradients(*args, tuple(needs))
        if not own or not self.own_dtype:
            return specs
        of = dict(zip(self.saved, args[self.results :], strict=False))
        dtypes = {n: of[n].dtype for n in self.own_dtype if isinstance(of[n], Tensor)}
        return tuple(s._replace(dtype=dtypes.get(n, s.dtype)) for n, s in zip(self.grads, specs, strict=True))

    @property
    def function(self) -> Callable[..., Any]:
        """The public function of the op's file."""
        return getattr(importlib.import_module(f"fastlm.ops.{self.name}"), self.name)


class Cost(NamedTuple):
    """Floating-point operations and the fewest bytes that must move, of forward and of backward."""

    forward_flops: float
    forward_bytes: float
    backward_flops: float = 0.0
    backward_bytes: float = 0.0


# --- registration

_OPS: dict[str, Op] = {}
_CALLS: dict[str, Callable[..., Any]] = {}
_LIBRARY = torch.library.Library("fastlm", "FRAGMENT")


def register(op: Op) -> Op:
    """Enter an op in the registry and in torch.library. Returns it."""
    if op.name in _OPS:
        raise ValueError(f"op {op.name!r} is registered twice")
    _OPS[op.name] = op
    _CALLS[op.name] = autograd.register(op, _LIBRARY)
    return op


def ops() -> dict[str, Op]:
    """Every op by name; imports the files of fastlm/ops."""
    package = importlib.import_module("fastlm.ops")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"fastlm.ops.{module.name}")
    return dict(sorted(_OPS.items()))


def get(name: str) -> Op:
    """The op of that name; ValueError lists the names there are."""
    if name in _OPS:  # a step asks often, and `ops` reads a folder
        return _OPS[name]
    known = ops()
    if name not in known:
        raise ValueError(f"no op named {name!r}; there are {', '.join(known)}")
    return known[name]


# --- helpers


def _type_text(argument: Any) -> str:
    kind = str(argument.type)
    text = {"Optional[Tensor]": "Tensor?", "Optional[float]": "float?", "Optional[int]": "int?"}.get(
        kind, kind
    )
    return text if argument.alias_info is None else "Tensor!"


def _device(args: Iterable[Any]) -> torch.device:
    return next(a.device for a in args if isinstance(a, Tensor))


def _fresh(spec: Spec, device: torch.device) -> Tensor:
    return native.large_pages(spec.empty(device))


def _readable(op: Op, name: str, arg: Any) -> Any:
    """The tensor in a layout that native kernels read; a copy only if it is not in one already."""
    if not isinstance(arg, Tensor) or name in op.mutates:
        return arg
    if op.contiguous:
        return arg.contiguous()
    return arg if arg.dim() == 0 or arg.stride(-1) == 1 or arg.shape[-1] == 1 else arg.contiguous()
