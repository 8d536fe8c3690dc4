"""The checks of the op contract, as functions that raise AssertionError and say where and by how much.

They are what the generated tests run, and what a kernel author runs on a kernel of their own. The budget rule:

    error(kernel, fp64) <= 2 * (error(PyTorch in the same dtype, fp64) + eps(dtype) * max|exact|)

(for a gradient whose terms cancel, the largest sum of its terms' absolute values instead of max|exact|: attention to
one visible key has a gradient of exactly 0, the difference of two rounded numbers), with errors as maxima of absolute
differences, the exact values by PyTorch in float64 from the very same (rounded) inputs, and a random upstream gradient.
A NaN or an infinity that the exact result does not have fails.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from . import backends
from .registry import Op
from .samples import Sample

__all__ = [
    "Comparison",
    "budget",
    "check_accumulation",
    "check_budget",
    "check_gradcheck",
    "check_layouts",
    "check_repeatable",
    "check_requires_grad",
    "compare",
    "compare_all",
    "differentiable",
    "measure",
    "poisoned_memory",
    "reversed_programs",
    "tensors",
    "widened",
    "worst_of",
]

Args = dict[str, Any]


class Comparison(NamedTuple):
    """One tensor's maximum and root-mean-square error against float64, beside PyTorch's own in the same dtype."""

    name: str
    error: float
    rms: float
    peer_error: float
    limit: float
    worst: tuple[int, ...]

    @property
    def ok(self) -> bool:
        return self.error <= self.limit

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAILS"
        return (
            f"{self.name}: max error {self.error:.3g} at {self.worst}, RMS {self.rms:.3g}, "
            f"PyTorch's {self.peer_error:.3g}, limit {self.limit:.3g}: {verdict}"
        )


def budget(
    peer_error: float, exact: Tensor, dtype: torch.dtype, roundings: float = 1.0, terms: float = 0.0
) -> float:
    """The largest error allowed. roundings: of the largest element (or of `terms`), beside what PyTorch loses."""
    finite = exact[exact.isfinite()].double()
    largest = finite.abs().max().item() if finite.numel() else 0.0
    largest = max(largest, terms)
    return 2.0 * (peer_error + roundings * torch.finfo(dtype).eps * largest)


def worst_of(draws: Sequence[Comparison]) -> Comparison:
    """One tensor over several draws of the same sample: the worst error against the budget of the worst of PyTorch's.

    A tensor of a few elements has lucky draws, in which PyTorch is exact or the exact result small.
    """
    ours = max(draws, key=lambda row: row.error)
    peer_error = max(row.peer_error for row in draws)
    rounding = max(row.limit / 2.0 - row.peer_error for row in draws)
    return ours._replace(peer_error=peer_error, limit=2.0 * (peer_error + rounding))


def max_error(value: Tensor, exact: Tensor) -> tuple[float, float, tuple[int, ...]]:
    """(maximum, root mean square, coordinates of the maximum); NaN or a wrong infinity counts as infinite."""
    assert value.shape == exact.shape, f"shape {tuple(value.shape)} for {tuple(exact.shape)}"
    if exact.numel() == 0:
        return 0.0, 0.0, ()
    value, exact = value.detach().double().cpu(), exact.detach().double().cpu()
    error = (value - exact).abs_().masked_fill_(value == exact, 0.0).nan_to_num_(nan=torch.inf)
    flat = int(error.argmax())
    worst = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
    return error.flatten()[flat].item(), error.square().mean().sqrt().item(), worst


def compare(
    name: str, value: Tensor, peer: Tensor, exact: Tensor, dtype: torch.dtype, roundings: float = 1.0,
    terms: float = 0.0,
) -> Comparison:  # fmt: skip
    """Hold one tensor against the exact one, with the budget that PyTorch's own error gives."""
    error, rms, worst = max_error(value, exact)
    peer_error = max_error(peer, exact)[0]
    limit = budget(peer_error, exact, dtype, roundings, terms)
    return Comparison(name, error, rms, peer_error, limit, worst)


def differentiable(op: Op, args: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that have a gradient and are there."""
    names = dict.fromkeys((*op.grads, *(name for name, _ in op.shared)))
    return [n for n in names if isinstance(args.get(n), Tensor) and args[n].is_floating_point()]


def upstream(outputs: tuple[Any, ...], seed: int = 1) -> list[Tensor]:
    """A random gradient for each output, never ones."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for o in outputs
    ]


def tensors(out: Any) -> tuple[Tensor, ...]:
    """The tensors of a result one after the other, those of a tuple in it too."""
    return (out,) if isinstance(out, Tensor) else tuple(t for part in out for t in tensors(part))


def evaluate(
    function: Callable[..., Any], op: Op, args: Args, wanted: list[str] | None = None
) -> dict[str, Tensor]:
    """Outputs and gradients of ``function(**args)`` by name, with the random upstream gradient."""
    wanted = differentiable(op, args) if wanted is None else wanted
    args = {
        k: v.detach().clone() if isinstance(v, Tensor) and k in op.mutates else v for k, v in args.items()
    }
    for name in wanted:
        args[name] = args[name].detach().requires_grad_()
    out = tensors(function(**args))
    result = {f"output {i}" if len(out) > 1 else "output": o for i, o in enumerate(out)}
    changed = op.changed(args) if op.changed is not None else {name: args.get(name) for name in op.mutates}
    result |= {f"new {name}": tensor for name, tensor in changed.items() if tensor is not None}
    if wanted:
        carry = [o for o in out if o.requires_grad]
        grads = torch.autograd.grad(
            carry, [args[n] for n in wanted], upstream(tuple(carry)), allow_unused=True
        )
        for name, grad in zip(wanted, grads, strict=True):
            assert grad is not None, f"{op.name}: no gradient for {name}"
            assert grad.dtype == args[name].dtype, f"{op.name}: gradient of {name} in {grad.dtype}"
            result[f"d_{name}"] = grad
    return result


def widened(args: Args) -> Args:
    """The arguments with every floating-point tensor in float64."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}


def measure(
    op: Op, sample: Sample, dtype: torch.dtype, backend: str | None, device: str = "cpu", seed: int = 0,
    function: Callable[..., Any] | None = None, roundings: float = 1.0,
) -> list[Comparison]:  # fmt: skip
    """Outputs and gradients of a backend (or of `function`) against float64, from memory poisoned with NaN.

    function: has the signature of the op's public one; None is that one.
    roundings: of the largest element; more than 1 only for what the contract itself rounds, with the reason beside it.
    """
    args = sample.build(dtype, device, seed)
    exact = evaluate(op.peer, op, widened(args))
    peer = evaluate(op.peer, op, args)
    before = {k: v.clone() for k, v in args.items() if isinstance(v, Tensor)}
    with backends.use_backend(backend), poisoned_memory():
        ours = evaluate(function or op.function, op, args)
    for name, tensor in before.items():
        same = torch.equal(args[name].nan_to_num(7.0), tensor.nan_to_num(7.0))
        assert same, f"{op.name} changed its argument {name}"
    assert ours.keys() == exact.keys(), f"{op.name}: got {list(ours)}, expected {list(exact)}"
    if function is not None:
        with backends.use_backend("reference"):
            right = evaluate(op.function, op, args, [])
        for name, tensor in right.items():
            assert ours[name].dtype == tensor.dtype, f"{name} in {ours[name].dtype}, expected {tensor.dtype}"
    return compare_all(op, args, ours, peer, exact, dtype, roundings)


def compare_all(
    op: Op, args: Args, ours: Mapping[str, Tensor], peer: Mapping[str, Tensor], exact: Mapping[str, Tensor],
    dtype: torch.dtype, roundings: float = 1.0,
) -> list[Comparison]:  # fmt: skip
    """Every tensor of `ours`, as `evaluate` names them, held against the exact one of the same arguments."""
    terms: Mapping[str, float] = {}
    if op.terms is not None:
        outputs = tuple(value for name, value in exact.items() if name.startswith("output"))
        terms = op.terms(upstream(outputs), **widened(args))
    return [
        compare(n, ours[n], peer[n], exact[n], dtype, roundings, terms.get(n.removeprefix("d_"), 0.0))
        for n in ours
    ]


def check_budget(
    op: Op, sample: Sample, dtype: torch.dtype, backend: str | None, device: str = "cpu", seed: int = 0,
    function: Callable[..., Any] | None = None, roundings: float = 1.0,
) -> list[Comparison]:  # fmt: skip
    """`measure`, held to the budget."""
    rows = measure(op, sample, dtype, backend, device, seed, function, roundings)
    failed = [str(r) for r in rows if not r.ok]
    assert not failed, f"{op.name} [{backend}, {dtype}, {sample.edge}]\n  " + "\n  ".join(failed)
    return rows


def check_gradcheck(op: Op, sample: Sample) -> None:
    """The reference backward against numerical differentiation in float64."""
    args = widened(sample.build(torch.float64))
    names = [n for n in differentiable(op, args) if args[n].numel()]
    if not names:
        return

    def run(*given: Tensor) -> Any:
        out = op.function(**(args | dict(zip(names, given, strict=True))))
        # An infinity that the op promises (the log-sum-exp of nothing) has no finite difference.
        return tuple(o.masked_fill(o.isinf(), 0.0) for o in tensors(out) if o.requires_grad)

    inputs = [args[n].clone().requires_grad_() for n in names]
    with backends.use_backend("reference"):
        assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=True)


def check_requires_grad(
    op: Op, sample: Sample, dtype: torch.dtype, backend: str | None, device: str = "cpu",
    function: Callable[..., Any] | None = None,
) -> None:  # fmt: skip
    """Every combination of requires_grad gives exactly the gradients asked for, equal to those of the full call."""
    args, function = sample.build(dtype, device), function or op.function
    names = differentiable(op, args)
    with backends.use_backend(backend):
        full = evaluate(function, op, args, names)
        for count in range(len(names)):
            for wanted in itertools.combinations(names, count):
                part = evaluate(function, op, args, list(wanted))
                for key, value in part.items():
                    assert torch.equal(value, full[key]), (
                        f"{op.name}: {key} differs when only {wanted} need gradients"
                    )


def check_repeatable(
    op: Op, sample: Sample, dtype: torch.dtype, backend: str | None, device: str = "cpu",
    function: Callable[..., Any] | None = None,
) -> None:  # fmt: skip
    """Two runs are bitwise equal, and so is a repeated backward of one forward.

    In Triton's interpreter the second run starts the programs of each launch in reverse: a sum whose order depends on
    which program comes first, as with floating-point atomics, is seen without a GPU.
    """
    args, function = sample.build(dtype, device), function or op.function
    with backends.use_backend(backend):
        first = evaluate(function, op, args)
        with reversed_programs():
            second = evaluate(function, op, args)
        for key in first:
            assert torch.equal(first[key], second[key]) or first[key].isnan().any(), (
                f"{op.name}: {key} is not repeatable"
            )
        names = differentiable(op, args)
        if not names:
            return
        leaves = {n: args[n].detach().requires_grad_() for n in names}
        out = function(**(args | leaves))
        out = tuple(o for o in tensors(out) if o.requires_grad)
        for scale in (1.0, -2.0):
            ups = [u * scale for u in upstream(out)]
            grads = torch.autograd.grad(out, list(leaves.values()), ups, retain_graph=True)
            for name, grad in zip(names, grads, strict=True):
                expected = first[f"d_{name}"] * scale
                assert torch.equal(grad, expected), (
                    f"{op.name}: the backward of {name} repeated with {scale} is wrong"
                )


def check_layouts(
    op: Op, sample: Sample, dtype: torch.dtype, backend: str | None, device: str = "cpu",
    function: Callable[..., Any] | None = None,
) -> None:  # fmt: skip
    """Non-contiguous and stride-0 inputs and upstream gradients give what their contiguous copies give.

    Bitwise for kernels; PyTorch, which computes the reference, sums in another order for other strides.
    """
    slack = 32 * torch.finfo(dtype).eps if backend == "reference" else 0.0

    def assert_same(value: Tensor, expected: Tensor, what: str) -> None:
        finite = expected[expected.isfinite()].double()
        scale = finite.abs().max().item() if finite.numel() else 0.0
        error = max_error(value, expected)[0]
        assert error <= slack * scale, f"{op.name}: {what} (error {error:.3g})"

    args, function = sample.build(dtype, device), function or op.function
    with backends.use_backend(backend):
        base = evaluate(function, op, args)
        names = [n for n, v in args.items() if isinstance(v, Tensor) and v.dim() and n not in op.mutates]
        for name in names:
            strided = torch.stack([args[name], args[name]], -1)[..., 0]  # every other element in memory
            assert strided.numel() <= 1 or not strided.is_contiguous()
            for key, value in evaluate(function, op, args | {name: strided}).items():
                assert_same(value, base[key], f"{key} differs with a non-contiguous {name}")
            if args[name].shape[0] > 1:
                expanded = args[name][:1].expand_as(args[name])
                lhs = evaluate(function, op, args | {name: expanded})
                rhs = evaluate(function, op, args | {name: expanded.contiguous()})
                for key, value in lhs.items():
                    assert_same(value, rhs[key], f"{key} differs with an expanded {name}")
        wanted = differentiable(op, args)
        if wanted:  # .sum().backward() sends an expanded gradient of ones
            leaves = {n: args[n].detach().requires_grad_() for n in wanted}
            out = function(**(args | leaves))
            out = tuple(o for o in tensors(out) if o.requires_grad)
            lhs_grads = torch.autograd.grad([o.sum() for o in out], list(leaves.values()), retain_graph=True)
            rhs_grads = torch.autograd.grad(out, list(leaves.values()), [torch.ones_like(o) for o in out])
            for name, a, b in zip(wanted, lhs_grads, rhs_grads, strict=True):
                largest = a.abs().max() if a.numel() else 0.0  # sums that cancel have no scale of their own
                assert_same(a + largest, b + largest, f"d_{name} differs with an expanded upstream gradient")


def check_accumulation(
    op: Op, sample: Sample, dtype: torch.dtype, backend: str | None, device: str = "cpu"
) -> None:
    """Parameter gradients are added to the float32 buffers given."""
    args = sample.build(dtype, device)

    class Recorder:
        def forward(self, op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self.args, self.out = args, op.run_forward(args)
            return self.out[: op.returned]

    with backends.use_backend(backend):
        tape = Recorder()
        op.function(**args, tape=tape)
        saved, options = op.pick_saved(tape.args, tape.out)
        needs = op.wanted(tape.args, options)
        ups = upstream(tape.out[: op.results])
        fresh = op.run_backward(ups, saved, options, needs)
        of = dict(zip(op.grads, fresh, strict=True))
        buffers = {n: torch.full_like(g, 3.0) for n in op.accumulates if (g := of[n]) is not None}
        added = dict(zip(op.grads, op.run_backward(ups, saved, options, needs, into=buffers), strict=True))
        for name, buffer in buffers.items():
            assert buffer.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), (
                f"d_{name} in {buffer.dtype}"
            )
            assert added[name] is buffer, f"{op.name}: d_{name} was not written to the buffer given"
            fresh_one = of[name]
            assert fresh_one is not None
            tolerance = 1e-5 * (3.0 + fresh_one.abs().max().item()) if fresh_one.numel() else 0.0
            error = max_error(buffer, fresh_one + 3.0)[0]
            assert error <= tolerance, f"{op.name}: d_{name} is not added to the buffer given (error {error})"


@contextlib.contextmanager
def reversed_programs() -> Iterator[None]:
    """Start the programs of each launch last to first, if Triton is being interpreted; else nothing."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or not backends.interpreting():
        yield
        return
    builder = interpreter.interpreter_builder
    forward = builder.set_grid_idx

    def backward(*place: int) -> None:
        forward(*(size - 1 - at for size, at in zip(builder.grid_dim, place, strict=True)))

    with mock.patch.object(builder, "set_grid_idx", backward):
        yield


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN (all ones for integers), so that a missed write shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            with torch.no_grad():
                return (
                    t.fill_(float("nan"))
                    if t.is_floating_point()
                    else t.fill_(-1 if t.dtype.is_signed else 1)
                )

        return made

    with contextlib.ExitStack() as stack:
        for name in ("empty", "empty_like", "empty_strided"):
            stack.enter_context(mock.patch.object(torch, name, poison(getattr(torch, name))))
        yield
