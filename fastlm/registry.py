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
A kernel file may say `cannot_serve(direction, *args) -> str`: the reason why it cannot take a call, "" if it can.
Inputs are never written to, except those named in `mutates` (optimizer ops, which have no backward).

The record is registered with torch.library: schema, CPU and CUDA kernels, a fake implementation and autograd, so
that every op is differentiable, is one node for ``torch.compile(fullgraph=True)`` and passes ``opcheck``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
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
    accumulates: tuple[str, ...] = ()  # those of `grads` that are parameters: float32, added to
    terms: Callable[..., Mapping[str, float]] | None = (
        None  # (upstream, **args) -> of gradients that are sums which may cancel, the largest sum of absolute terms
    )
    saved: tuple[str, ...] = ()  # inputs and results that backward reads
    results: int = 1  # how many of the outputs are the caller's; the rest are statistics for backward
    mutates: tuple[str, ...] = ()
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

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: i for i, (name, _, _) in enumerate(self.arguments)}

    @cached_property
    def _options(self) -> tuple[int, ...]:
        return tuple(i for i, (_, kind, _) in enumerate(self.arguments) if not kind.startswith("Tensor"))

    @cached_property
    def _takers(self) -> tuple[tuple[int, ...], ...]:
        """For each of `grads`, the positions of the arguments that have that gradient."""
        groups = [(name, *(other for other, owner in self.shared if owner == name)) for name in self.grads]
        return tuple(tuple(self._position[name] for name in group) for group in groups)

    # --- running

    def __call__(self, *args: Any, tape: Any = None) -> tuple[Any, ...]:
        """The caller's outputs: differentiable without a tape; with one (the engine's), recorded on it."""
        if tape is not None:
            return tuple(tape.forward(self, args))
        out = getattr(torch.ops.fastlm, self.name)(*args)
        return _tuple(out)[: self.results]

    def run_forward(self, args: Sequence[Any], alloc: Alloc | None = None) -> tuple[Any, ...]:
        """Everything that forward returns, by the chosen backend, without autograd."""
        run = backends.implementation(self, "forward", args)
        if run is None:
            return _tuple(self.forward(*args))
        device = _device(args)
        out = tuple((alloc or Spec.empty)(s, device) for s in self.outputs(*args))
        run(*(_readable(self, n, a) for (n, _, _), a in zip(self.arguments, args, strict=True)), *out)
        return out

    def pick_saved(self, args: Sequence[Any], out: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(saved tensors, options): what backward needs of a forward call."""
        saved = tuple(
            args[self._position[n]] if n in self._position else out[self.returns.index(n)] for n in self.saved
        )
        return saved, tuple(args[i] for i in self._options)

    def run_backward(
        self,
        d_outputs: Sequence[Any],
        saved: Sequence[Any],
        options: Sequence[Any],
        needs: Sequence[bool],
        alloc: Alloc | None = None,
        into: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """The gradients in the order of `grads`; None where not needed.

        into: tensors to put gradients in by name: those in `accumulates` are added to, the others overwritten.
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
            return tuple(grads.values())
        device = _device(args)
        out: list[Tensor | None] = []
        for name, spec, need in zip(self.grads, self.gradients(*args, tuple(needs)), needs, strict=True):
            if not need:
                out.append(None)
            elif name in into:
                out.append(into[name])
            else:
                fresh = (alloc or Spec.empty)(spec, device)
                out.append(fresh.zero_() if name in self.accumulates else fresh)
        run(*(_readable(self, "", a) for a in args), *out)
        return tuple(out)

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
_LIBRARY = torch.library.Library("fastlm", "FRAGMENT")


def register(op: Op) -> Op:
    """Enter an op in the registry and in torch.library. Returns it."""
    if op.name in _OPS:
        raise ValueError(f"op {op.name!r} is registered twice")
    _OPS[op.name] = op
    _LIBRARY.define(op.name + op.schema)

    def kernel(*args: Any) -> Any:
        args = _complete(op, args)
        out = op.run_forward(args)
        changed = [args[op._position[name]] for name in op.mutates]
        if changed:  # so that autograd notices a graph which saved the old values
            torch.autograd.graph.increment_version([t for t in changed if t is not None])
        return _untuple(out)

    _implement(op.name, kernel, lambda *args: op.outputs(*_complete(op, args)))
    if op.backward is not None:
        _register_backward(op)
    return op


def _register_backward(op: Op) -> None:
    kinds = {name: kind for name, kind, _ in op.arguments}
    params = [f"Tensor? d_{name}" for name in op.returns[: op.results]]
    params += [f"{kinds.get(name, 'Tensor')} {name}" for name in op.saved]
    params += [f"{op.arguments[i][1]} {op.arguments[i][0]}" for i in op._options]
    returns = ", ".join(f"Tensor d_{name}" for name in op.grads)
    name, n, n_saved = f"{op.name}_backward", op.results, len(op.saved)
    _LIBRARY.define(f"{name}({', '.join(params)}, bool[] needs) -> ({returns})")

    def backward(*args: Any) -> Any:
        *rest, needs = args
        like = next(a for a in rest if isinstance(a, Tensor))
        grads = op.run_backward(rest[:n], rest[n : n + n_saved], rest[n + n_saved :], needs)
        return _untuple([like.new_empty(0) if g is None else g for g in grads])

    def shapes(*args: Any) -> list[Spec]:
        assert op.gradients is not None
        specs = zip(op.gradients(*args), args[-1], strict=True)
        return [spec if need else Spec((0,), torch.float32) for spec, need in specs]

    _implement(name, backward, shapes)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        inputs, out = _complete(op, inputs), _tuple(output)
        saved, ctx.options = op.pick_saved(inputs, out)
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*out[op.results :])
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.arity = backends.requested(), len(inputs)
        ctx.dtypes = [a.dtype if isinstance(a, Tensor) else None for a in inputs]

    def autograd(ctx: Any, *d_outputs: Any) -> tuple[Any, ...]:
        takers = [[i for i in group if ctx.needs_input_grad[i]] for group in op._takers]
        needs = [bool(group) for group in takers]
        result: list[Any] = [None] * ctx.arity
        if any(d is not None for d in d_outputs[:n]):
            with backends.use_backend(ctx.backend):
                grads = getattr(torch.ops.fastlm, name)(
                    *d_outputs[:n], *ctx.saved_tensors, *ctx.options, needs
                )
            for group, grad in zip(takers, _tuple(grads), strict=True):
                for i in group:
                    result[i] = grad.to(ctx.dtypes[i])
        return tuple(result)

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"fastlm.ops.{op.name}: a second derivative (create_graph=True) is not implemented; "
            f"fastlm.registry.get({op.name!r}).forward is plain PyTorch and differentiable twice"
        )

    torch.library.register_autograd(f"fastlm::{op.name}", autograd, setup_context=setup, lib=_LIBRARY)
    torch.library.register_autograd(f"fastlm::{name}", refuse, lib=_LIBRARY)


def _implement(name: str, kernel: Callable[..., Any], shapes: Callable[..., Iterable[Spec]]) -> None:
    def fake(*args: Any) -> Any:
        device = _device(args)
        return _untuple([spec.empty(device) for spec in shapes(*args)])

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"fastlm::{name}", fake, lib=_LIBRARY)


def ops() -> dict[str, Op]:
    """Every op by name; imports the files of fastlm/ops."""
    package = importlib.import_module("fastlm.ops")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"fastlm.ops.{module.name}")
    return dict(sorted(_OPS.items()))


def get(name: str) -> Op:
    """The op of that name; ValueError lists the names there are."""
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


def _tuple(out: Any) -> tuple[Any, ...]:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def _untuple(out: Sequence[Any]) -> Any:
    return out[0] if len(out) == 1 else tuple(out)


def _complete(op: Op, args: Sequence[Any]) -> tuple[Any, ...]:
    """The dispatcher drops trailing arguments that equal their default; put them back."""
    return (*args, *(default for _, _, default in op.arguments[len(args) :]))


def _device(args: Iterable[Any]) -> torch.device:
    return next(a.device for a in args if isinstance(a, Tensor))


def _readable(op: Op, name: str, arg: Any) -> Any:
    """The tensor in a layout that native kernels read; a copy only if it is not in one already."""
    if not isinstance(arg, Tensor) or name in op.mutates:
        return arg
    if op.contiguous:
        return arg.contiguous()
    return arg if arg.dim() == 0 or arg.stride(-1) == 1 or arg.shape[-1] == 1 else arg.contiguous()
