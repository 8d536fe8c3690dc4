"""How an op is differentiated: one pair of rules, reached by two ways.

Ordinary tensors go through a `torch.autograd.Function`, which calls the kernels at once and which the transforms of
``torch.func`` understand. Everything that traces or intercepts (``torch.compile``, ``torch.export``, a dispatch mode, fake,
meta and other tensor subclasses) sees the op's node in ``torch.library`` instead; its rules are the same functions.

``vmap`` runs the kernels once an element, in order. A second derivative is refused, by RuntimeError.

A loss that is one number may come with its gradients (`Op.together`). They are then kept, and backward multiplies them by
the gradient of the loss; a second backward through the same graph computes them anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends

if TYPE_CHECKING:
    from .registry import Op, Spec

__all__ = ["register"]

_PLAIN = (Tensor, torch.nn.Parameter)


def register(op: Op, library: torch.library.Library) -> Callable[..., Any]:
    """Enter the op in torch.library, with its backward; returns the callable that picks the way."""
    library.define(op.name + op.schema)

    def kernel(*args: Any) -> Any:
        args = _complete(op, args)
        with _without_autocast(args):
            out = op.run_forward(args)
        changed = [args[op.position[name]] for name in op.mutates]
        if changed:  # so that autograd notices a graph which saved the old values
            torch.autograd.graph.increment_version([t for t in changed if t is not None])
        return _untuple(out)

    _implement(library, op.name, kernel, lambda *args: op.outputs(*_complete(op, args)))
    node = getattr(torch.ops.fastlm, op.name)
    if op.backward is None:
        return _ways(node, kernel)
    rule = _Rule(op, library)
    torch.library.register_autograd(f"fastlm::{op.name}", rule.backward, setup_context=rule.setup, lib=library)
    return _ways(node, kernel, *_functions(op.name, kernel, rule.setup, rule.backward, rule.early))


class _Rule:
    """What an op's forward keeps, and its backward, itself an op that refuses to be differentiated."""

    def __init__(self, op: Op, library: torch.library.Library) -> None:
        kinds = {name: kind for name, kind, _ in op.arguments}
        params = [f"Tensor? d_{name}" for name in op.returns[: op.results]]
        params += [f"{kinds.get(name, 'Tensor')} {name}" for name in op.saved]
        params += [f"{op.arguments[i][1]} {op.arguments[i][0]}" for i in op.options]
        returns = ", ".join(f"Tensor d_{name}" for name in op.grads)
        name, n, n_saved = f"{op.name}_backward", op.results, len(op.saved)
        library.define(f"{name}({', '.join(params)}, bool[] needs) -> ({returns})")

        def kernel(*args: Any) -> Any:
            *rest, needs = args
            like = next(a for a in rest if isinstance(a, Tensor))
            with _without_autocast(rest):
                grads = op.run_backward(rest[:n], rest[n : n + n_saved], rest[n + n_saved :], needs, own=True)
            return _untuple([like.new_empty(0) if g is None else g for g in grads])

        def shapes(*args: Any) -> list[Spec]:
            specs = zip(op.gradient_specs(args[:-1], args[-1], own=True), args[-1], strict=True)
            return [spec if need else spec._replace(shape=(0,), order=None) for spec, need in specs]

        def refuse(ctx: Any, *grads: Any) -> None:
            raise RuntimeError(
                f"fastlm.ops.{op.name}: a second derivative (create_graph=True) is not implemented; "
                f"fastlm.registry.get({op.name!r}).forward is plain PyTorch and differentiable twice"
            )

        _implement(library, name, kernel, shapes)
        torch.library.register_autograd(f"fastlm::{name}", refuse, lib=library)
        functions = _functions(name, kernel, lambda ctx, inputs, output: None, refuse)
        self.op, self._run = op, _ways(getattr(torch.ops.fastlm, name), kernel, *functions)

    def setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        op = self.op
        inputs, out = _complete(op, inputs), _tuple(output)
        saved, ctx.options = op.pick_saved(inputs, out)
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*out[op.results :])
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.arity, ctx.early = backends.requested(), len(inputs), None
        ctx.dtypes = [a.dtype if isinstance(a, Tensor) else None for a in inputs]

    def early(self, ctx: Any, args: tuple[Any, ...]) -> Any:
        """The result with the gradients for a loss that is one number; None if they are not had in one pass."""
        if self.op.together is None:
            return None
        args = _complete(self.op, args)
        options = [args[i] for i in self.op.options]
        needs = [any(ctx.needs_input_grad[i] for i in group) for group in self.op.takers(options)]
        with _without_autocast(args):
            done = self.op.run_together(args, needs)
        if done is None:
            return None
        self.setup(ctx, args, done[0])
        ctx.early = done[1]
        return _untuple(done[0])

    def backward(self, ctx: Any, *d_outputs: Any) -> tuple[Any, ...]:
        op = self.op
        upstream = d_outputs[: op.results]
        takers = [[i for i in group if ctx.needs_input_grad[i]] for group in op.takers(ctx.options)]
        needs = [bool(group) for group in takers]
        result: list[Any] = [None] * ctx.arity
        if any(needs) and any(d is not None for d in upstream):
            with backends.use_backend(ctx.backend):
                grads = self._kept(ctx, needs, upstream)
                if grads is None:
                    grads = _tuple(self._run(*upstream, *ctx.saved_tensors, *ctx.options, needs))
            for group, grad in zip(takers, grads, strict=True):
                for i in group:
                    result[i] = grad if grad.dtype == ctx.dtypes[i] else grad.to(ctx.dtypes[i])
        return tuple(result)

    def _kept(self, ctx: Any, needs: Sequence[bool], upstream: Sequence[Any]) -> tuple[Any, ...] | None:
        """The gradients of `early` times the upstream gradient; None if that is not all that they depend on."""
        if ctx.early is None or any(d is not None for d in upstream[1:]) or torch.is_grad_enabled():
            return None
        grads, ctx.early = ctx.early, ()
        if not grads:  # given away by an earlier backward
            of = dict(zip(self.op.saved, ctx.saved_tensors, strict=True))
            options = iter(ctx.options)
            args = [of[n] if kind.startswith("Tensor") else next(options) for n, kind, _ in self.op.arguments]
            done = self.op.run_together(args, needs)
            assert done is not None
            grads = done[1]
        d = upstream[0]
        if d.device.type != "cpu" or d.item() != 1.0:
            for g in grads:
                if g is not None:
                    g.mul_(d) if g.dtype == d.dtype else g.copy_(g.to(d.dtype) * d)
        return grads


def _functions(
    name: str, kernel: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any],
    early: Callable[..., Any] = lambda ctx, args: None,
) -> tuple[Any, Any]:  # fmt: skip
    """The kernel as an autograd Function, and as one that torch.func can transform, which costs 20 us more a call."""

    def forward(ctx: Any, *args: Any) -> Any:
        if (out := early(ctx, args)) is not None:
            return out
        out = kernel(*args)
        setup(ctx, args, out)
        return out

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError(f"fastlm.ops.{name}: got a dimension of size 0 to vmap over; allowed: 1 or more")

        def element(i: int) -> list[Any]:
            mapped = zip(args, in_dims, strict=True)
            return [a.select(d, i) if isinstance(a, Tensor) and d is not None else a for a, d in mapped]

        rows = [_tuple(transformable.apply(*element(i))) for i in range(info.batch_size)]
        out = [torch.stack(values) for values in zip(*rows, strict=True)]
        return _untuple(out), _untuple([0] * len(out))

    def make(**rules: Callable[..., Any]) -> Any:
        members = {key: staticmethod(rule) for key, rule in rules.items()}
        return type(f"fastlm::{name}", (torch.autograd.Function,), members)  # a profiler shows the name

    transformable = make(forward=kernel, setup_context=setup, backward=backward, vmap=vmap)
    return make(forward=forward, backward=backward), transformable


def _ways(
    node: Callable[..., Any], kernel: Callable[..., Any], function: Any = None, transformable: Any = None
) -> Callable[..., Any]:
    """A call of the kernel by the shortest way that everybody who should see it sees."""

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return node(*args)
        for a in args:
            if isinstance(a, Tensor) and (type(a) not in _PLAIN or not (a.is_cpu or a.is_cuda)):
                return node(*args)
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return (transformable.apply if transformable else node)(*args)
        if function is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        return kernel(*args)

    return call


def _implement(
    library: torch.library.Library, name: str, kernel: Callable[..., Any], shapes: Callable[..., Iterable[Spec]]
) -> None:
    def fake(*args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, Tensor))
        return _untuple([spec.empty(device) for spec in shapes(*args)])

    for key in ("CPU", "CUDA"):
        library.impl(name, kernel, key)
    torch.library.register_fake(f"fastlm::{name}", fake, lib=library)


def _without_autocast(args: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """An op says itself in which precision it computes; autocast must not reach the PyTorch inside."""
    device = next(a.device.type for a in args if isinstance(a, Tensor))
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _tuple(out: Any) -> tuple[Any, ...]:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def _untuple(out: Sequence[Any]) -> Any:
    return out[0] if len(out) == 1 else tuple(out)


def _complete(op: Op, args: Sequence[Any]) -> tuple[Any, ...]:
    """The dispatcher drops trailing arguments that equal their default; put them back."""
    return (*args, *(default for _, _, default in op.arguments[len(args) :]))
