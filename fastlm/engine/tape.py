"""The two ways to run a model's one forward: recorded for the hand-written backward, or by autograd as the oracle.

A layer's forward takes ``tape``; whatever it computes goes through the tape's methods (ops call ``tape.forward``):

    Tape           runs the ops' forward in arena memory and keeps what backward needs; `backward` pops it in reverse
    AutogradTape   runs the ops' plain-PyTorch formula under autograd: no code of ours in its backward

Both draw dropout seeds from the same list, so that the oracle sees the very masks of the recorded run.

`Tape.checkpoint` runs a segment of the forward pass that keeps its inputs only and is run again in backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .. import native
from ..registry import Op, Spec
from . import gemm
from .arena import Arena

__all__ = ["AutogradTape", "Enough", "Tape"]


class _Seeds:
    """Seeds for the dropout sites of one micro-batch, in the order of the forward pass."""

    def __init__(self, seeds: Tensor | None) -> None:
        self._seeds, self._sites = seeds, 0

    def seed(self) -> Tensor:
        """The seed of the next dropout site: an int64 tensor of one element."""
        if self._seeds is None or self._sites >= len(self._seeds):
            raise RuntimeError(
                f"dropout site {self._sites}: the tape has {0 if self._seeds is None else len(self._seeds)} seeds"
            )
        self._sites += 1
        return self._seeds[self._sites - 1 : self._sites]


class Tape(_Seeds):
    """A recorded forward pass.

    arena: where every tensor of the pass lives.
    gradients: each trainable parameter's gradient buffer, float32 (float64 for a float64 model), added to.
    seeds: int64 (sites,), one for each dropout site; None when there are none.
    record: False to run forward only, keeping nothing.
    d_loss: the gradient with which backward will begin, if it is known by now: a loss then leaves its gradients in
        forward where that costs less (`Op.together`). A tuple for a model of several loss terms, see `term`.
    stale: the parameters whose buffers hold what nobody wants any more: the first gradient replaces it, and the parameter
        leaves the set. Those that are in it at the end had none.
    """

    _enough: int | None = None  # of a segment that is run again: how many entries its backward will pop

    def __init__(
        self,
        arena: Arena,
        gradients: Mapping[Parameter, Tensor],
        seeds: Tensor | None = None,
        record: bool = True,
        d_loss: Tensor | tuple[Tensor, ...] | None = None,
        stale: set[Parameter] | None = None,
    ) -> None:
        super().__init__(seeds)
        self.arena, self.gradients, self.record = arena, gradients, record
        self.stale: set[Parameter] = set() if stale is None else stale
        self._d_losses = d_loss if isinstance(d_loss, tuple) else ()
        self.d_loss = None if isinstance(d_loss, tuple) else d_loss
        self._entries: list[tuple[Any, tuple[Any, ...]]] = []
        self._pushed = 0

    # --- what layers and ops call

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor that lives until the pass no longer holds it."""
        return self.arena.alloc(Spec(tuple(shape), dtype))

    def gradient(self, parameter: Tensor | None) -> Tensor | None:
        """The buffer to add a parameter's gradient to; None for what has none."""
        if not isinstance(parameter, Parameter) or (buffer := self.gradients.get(parameter)) is None:
            return None
        if parameter in self.stale:
            native.zero_(self._taken(parameter))
        return buffer

    def _taken(self, parameter: Parameter) -> Tensor:
        """The buffer of a stale parameter, from now on its gradient's."""
        self.stale.remove(parameter)
        buffer = self.gradients[parameter]
        self.arena.take(buffer)
        return buffer

    def term(self, number: int) -> None:
        """What is computed from here on belongs to this term of the model's loss."""
        if self._d_losses:
            self.d_loss = self._d_losses[number]

    def forward(self, op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Run an op's forward and keep what its backward needs."""
        if self.d_loss is not None and op.together_by(args):
            return self._together(op, args)
        if self._pushed + 1 == self._enough and op.backward is not None and all(n in op.position for n in op.saved):
            self.push(op.name, *op.pick_saved(args, ()))  # the last: what it computes, nobody will read
        out = op.run_forward(args, self.arena.alloc)
        if op.backward is not None:
            self.push(op.name, *op.pick_saved(args, out))
        return out[: op.returned]

    def _together(self, op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given = {n: args[op.position[n]] for n in op.grads}
        stale = {n: self._taken(p) for n, p in given.items() if p in self.stale}
        into = stale | self._buffers({n: p for n, p in given.items() if n not in stale})
        inputs = [n for n, t in given.items() if n not in op.accumulates and t is not None]
        needs = [n in into or n in inputs for n in op.grads]
        done = op.run_together(args, needs, self.arena.alloc, into, self.d_loss, stale)
        assert done is not None
        out, grads = done
        found = tuple(g for n, g in zip(op.grads, grads, strict=True) if n in inputs)
        self.push(op.name, None, (self.d_loss, found))
        return out[: op.returned]

    def _buffers(self, parameters: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        found = {name: self.gradient(p) for name, p in parameters.items()}
        return {name: buffer for name, buffer in found.items() if buffer is not None}

    def backward(
        self, name: str, *d_outputs: Tensor | None, into: Mapping[str, Tensor] | None = None,
        **parameters: Tensor | None,
    ) -> Any:  # fmt: skip
        """Pop the last entry, which must be op `name`'s, and run its backward.

        d_outputs: of the op's first outputs; those that are left out have none.
        parameters: the op's parameter arguments by name; their gradients are added to the parameters' buffers.
        into: tensors to write other gradients to; those of `Op.accumulates` are added to, as a parameter's buffer is.

        Returns the gradients that are not parameters': one tensor, or a tuple in the op's order.
        """
        saved, options = self.pop(name)
        if saved is None:  # the gradients came with forward
            d_loss, found = options
            if d_outputs[0] is not d_loss or any(d is not None for d in d_outputs[1:]):
                raise RuntimeError(f"tape: {name!r} goes backward with another gradient than the d_loss of the tape")
            return found[0] if len(found) == 1 else found
        op = _op(name)
        buffers = self._buffers(parameters)
        of = dict(zip(op.saved, saved, strict=True))
        absent = [n for n in op.grads if n in of and (of[n] is None or not of[n].is_floating_point())]
        absent += op.sharing(options)
        inputs = [n for n in op.grads if n not in op.accumulates and n not in absent]
        buffers |= into or {}
        needs = [n in buffers or n in inputs for n in op.grads]
        upstream = (*d_outputs, *[None] * (op.results - len(d_outputs)))
        grads = op.run_backward(
            upstream, saved, options, needs, self.arena.alloc, buffers
        )
        out = tuple(g for n, g in zip(op.grads, grads, strict=True) if n in inputs)
        return out[0] if len(out) == 1 else out

    def constant(self, value: float, dtype: torch.dtype) -> Tensor:
        """A number as a 0-dim tensor, made once."""
        return self.arena.constant(value, dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) @ weight (out, in).T + bias."""
        rows = x.view(-1, x.shape[-1])
        self.push("linear", rows)
        y = gemm.product(rows, weight.t(), self.empty((rows.shape[0], weight.shape[0]), x.dtype), bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    def linear_backward(
        self, dy: Tensor, weight: Tensor, bias: Tensor | None, weight_rows: slice = slice(None),
        bias_rows: slice = slice(None),
    ) -> Tensor:  # fmt: skip
        """dx = dy @ weight; weight's gradient += dy.T @ x and bias's += dy summed over rows, in float32.

        weight_rows, bias_rows: the part of the parameters that the product was with.
        """
        (x,) = self.pop("linear")
        rows = dy.view(-1, dy.shape[-1])
        replaced = weight in self.stale and weight_rows == slice(None)
        total = self._taken(weight) if replaced else self.gradient(weight)  # type: ignore[arg-type]
        d_bias = self.gradient(bias)
        d_bias = None if d_bias is None else d_bias[bias_rows]
        one = self.constant(1.0, rows.dtype)
        if total is not None:
            gemm.add_linear_gradients(total[weight_rows], d_bias, rows, x, one, beta=0 if replaced else 1)
        elif d_bias is not None:
            gemm.add_column_sums(d_bias, rows, one)
        weight = weight[weight_rows]
        dx = gemm.product(rows, weight, self.empty((rows.shape[0], weight.shape[1]), dy.dtype))
        return dx.view(*dy.shape[:-1], weight.shape[1])

    def push(self, key: Any, *values: Any) -> None:
        """Keep values for the backward of `key`."""
        self._pushed += 1
        if self.record:
            self._entries.append((key, values))
            if self._pushed == self._enough:
                raise Enough

    def pop(self, key: Any) -> tuple[Any, ...]:
        """The values kept last, which must be `key`'s: backward mirrors forward."""
        if not self._entries:
            raise RuntimeError(f"tape: {key!r} goes backward, but nothing is left on the tape")
        top, values = self._entries.pop()
        if top != key:
            raise RuntimeError(
                f"tape: {key!r} goes backward where {top!r} is next; backward must mirror forward"
            )
        return values

    # --- recomputation

    def checkpoint(self, segment: Callable[..., Any], *inputs: Any) -> Any:
        """``segment(*inputs, tape=...)``, of which only the inputs and the place in the list of seeds are kept.

        segment: a layer, or a method of one; it may have any inputs and outputs, and segments inside. `checkpoint_backward`
        runs it again, to the last value that its backward reads, so nothing may write to the inputs until then.
        A loss in a segment takes no gradients in forward (`Op.together`).
        """
        start = self._sites
        once = self._segment(start, record=False)
        out = segment(*inputs, tape=once)
        self._sites = once._sites
        self.push("checkpoint", segment, inputs, start, once._pushed)
        return out

    def checkpoint_backward(self, backward: Callable[..., Any], *d_outputs: Any, **options: Any) -> Any:
        """Run the last segment again, recorded, and return ``backward(*d_outputs, tape=..., **options)``.

        backward: the layer's ``backward``, or the mirror of the method that was the segment.
        """
        segment, inputs, start, entries = self.pop("checkpoint")
        if _layer(segment) is not _layer(backward):
            raise RuntimeError(
                f"tape: a segment of {_name(backward)} goes backward where one of {_name(segment)} is next; "
                "backward must mirror forward"
            )
        again = self._segment(start, record=True)
        again._enough = entries
        if entries:
            with contextlib.suppress(Enough):
                segment(*inputs, tape=again)
        del inputs
        d_inputs = backward(*d_outputs, tape=again, **options)
        again.finish()
        return d_inputs

    def _segment(self, start: int, record: bool) -> Tape:
        tape = Tape(self.arena, self.gradients, self._seeds, record, stale=self.stale)
        tape._sites = start
        return tape

    def finish(self) -> None:
        """Raise unless backward has consumed everything that forward kept."""
        if self._entries:
            raise RuntimeError(
                f"tape: backward ended with {len(self._entries)} entries left, the next is {self._entries[-1][0]!r}"
            )


class AutogradTape(_Seeds):
    """Runs the same forward as differentiable plain PyTorch. seeds: as Tape's."""

    def __init__(self, seeds: Tensor | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__(seeds)
        self.device = device

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def constant(self, value: float, dtype: torch.dtype) -> Tensor:
        """A number as a 0-dim tensor."""
        return torch.tensor(value, dtype=dtype, device=self.device)

    def forward(self, op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The op's formula; autograd differentiates it."""
        return op.forward(*args)[: op.returned]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) @ weight (out, in).T + bias."""
        return F.linear(x, weight, bias)

    def term(self, number: int) -> None:
        """Autograd begins at the sum of all terms."""

    def push(self, key: Any, *values: Any) -> None:
        """Autograd keeps its own."""

    def checkpoint(self, segment: Callable[..., Any], *inputs: Any) -> Any:
        """``segment(*inputs, tape=...)``; nothing is recomputed."""
        return segment(*inputs, tape=self)


class Enough(Exception):
    """A segment that is run again has recorded all that its backward reads."""


def _layer(function: Any) -> Any:
    """The layer of a bound method, or the function itself."""
    return getattr(function, "__self__", function)


def _name(function: Any) -> str:
    layer = _layer(function)
    return getattr(layer, "__name__", type(layer).__name__)


def _op(name: str) -> Op:
    from ..registry import get

    return get(name)
