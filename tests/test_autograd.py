"""The autograd contract beyond values: torch.func, autocast, tracing, hooks, host syncs; generated for every op."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from conftest import BACKENDS_HERE
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import backends, check, native, nn, ops, registry, use_backend

OPS = registry.ops()
DIFFERENTIABLE = {name: op for name, op in OPS.items() if op.backward is not None}
QUICK = [b for b in BACKENDS_HERE if b.values[0] != "triton"]  # what is checked here is outside of the kernels

every_op = pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
every_gradient = pytest.mark.parametrize("op", DIFFERENTIABLE.values(), ids=list(DIFFERENTIABLE))


def close(value, expected, what):
    """The same up to the rounding of an upstream gradient that is multiplied first or last."""
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6, msg=lambda text: f"{what}: {text}")


def outputs_of(op, args):
    return tuple(o for o in check.tensors(op.function(**args)) if o.is_floating_point())


def scalar_of(op, args, names):
    """leaves -> a scalar whose gradient is that of a random upstream gradient."""
    upstream = check.upstream(outputs_of(op, args))

    def scalar(*leaves):
        out = outputs_of(op, args | dict(zip(names, leaves, strict=True)))
        return sum((o.double() * u.double()).sum() for o, u in zip(out, upstream, strict=True))

    return scalar


def serving(op, backend, args):
    if why := backends.why_not(op, backend, [a for a in args.values() if isinstance(a, torch.Tensor)]):
        pytest.skip(why)
    return backends.use_backend(backend)


@pytest.mark.parametrize("backend", QUICK)
@every_gradient
def test_torch_func_grad(op, backend):
    args = op.samples[0].build(torch.float32)
    names = check.differentiable(op, args)
    with serving(op, backend, args):
        scalar = scalar_of(op, args, names)
        places = tuple(range(len(names)))
        grads, value = torch.func.grad_and_value(scalar, argnums=places)(*(args[n] for n in names))
        leaves = [args[n].clone().requires_grad_() for n in names]
        expected = scalar(*leaves)
        assert torch.equal(value, expected)
        for name, grad, right in zip(names, grads, torch.autograd.grad(expected, leaves), strict=True):
            close(grad, right, f"torch.func.grad of {name}")
        linear = not set(op.saved) & {*names, *op.returns}  # its gradient is a constant, whose derivative is 0
        refused = pytest.raises(RuntimeError, match=rf"fastlm.ops.{op.name}.*second derivative")
        with contextlib.nullcontext() if linear else refused:
            inner = torch.func.grad(lambda x: scalar(x, *(args[n] for n in names[1:])))
            assert not torch.func.grad(lambda x: inner(x).square().sum())(args[names[0]]).any()


@pytest.mark.parametrize("backend", QUICK)
@every_gradient
def test_vmap_and_per_sample_gradients(op, backend):
    args = op.samples[0].build(torch.float32)
    names = check.differentiable(op, args)
    batch = [torch.stack([args[n], args[n].flip(0), 0.5 * args[n]], dim=args[n].dim()) for n in names]
    dims = tuple(t.dim() - 1 for t in batch)
    with serving(op, backend, args):
        scalar = scalar_of(op, args, names)
        run = torch.func.grad_and_value(scalar, argnums=tuple(range(len(names))))
        grads, values = torch.func.vmap(run, in_dims=dims)(*batch)
        for i in range(3):
            one_grads, one_value = run(*(t.select(d, i).contiguous() for t, d in zip(batch, dims, strict=True)))
            close(values[i], one_value, f"value {i}")
            for name, many, one in zip(names, grads, one_grads, strict=True):
                torch.testing.assert_close(many[i], one, rtol=1e-5, atol=1e-6, msg=f"{name}, element {i}")
        with pytest.raises(ValueError, match=rf"fastlm.ops.{op.name}: got a dimension of size 0 to vmap over"):
            torch.func.vmap(run, in_dims=dims)(*(t.narrow(d, 0, 0) for t, d in zip(batch, dims, strict=True)))


@pytest.mark.skipif(bool(backends.missing("linear_cross_entropy", "together", "cpu")), reason="no C++ kernels")
@pytest.mark.backend("cpu")
class TestGradientsThatCameWithTheLoss:
    """`Op.together`: what is kept for the first backward is right for every one, and for anything else computed anew."""

    @staticmethod
    def arguments(dtype):
        torch.manual_seed(0)
        shapes = {"hidden": (300, 16), "weight": (1000, 16), "bias": (1000,)}
        args = {n: torch.randn(s).to(dtype).requires_grad_() for n, s in shapes.items()}
        return args, torch.randint(0, 1000, (300,)).index_fill(0, torch.arange(0, 300, 7), -100)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("workspace_mb", [None, 0.1, 0.9], ids=["one chunk", "no room", "three chunks"])
    def test_every_backward_is_right(self, dtype, workspace_mb):
        args, target = self.arguments(dtype)
        leaves, options = list(args.values()), {"label_smoothing": 0.1, "z_loss": 1e-3}
        exact = {n: t.detach().double().requires_grad_() for n, t in args.items()}
        right = torch.autograd.grad(
            ops.linear_cross_entropy(**exact, target=target, **options), list(exact.values())
        )
        loss = ops.linear_cross_entropy(**args, target=target, **options, workspace_mb=workspace_mb)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        for scale in (1.0, -2.5):
            for grad, once, g in zip(
                torch.autograd.grad(loss, leaves, torch.tensor(scale), retain_graph=True), first, right, strict=True
            ):  # fmt: skip
                torch.testing.assert_close(grad, scale * once, rtol=torch.finfo(dtype).eps, atol=0.0)
                error = (grad.double() - scale * g).abs().max()
                assert error <= 8 * torch.finfo(dtype).eps * abs(scale) * g.abs().max()

    def test_another_gradient_beside_that_of_the_loss(self):
        args, target = self.arguments(torch.float32)
        leaves = list(args.values())
        loss, extras = ops.linear_cross_entropy(**args, target=target, z_loss=1e-2, extras=True)
        both = torch.autograd.grad(loss + 3.0 * extras.lse.sum(), leaves, retain_graph=True)
        alone = torch.autograd.grad(loss, leaves, retain_graph=True)
        rest = torch.autograd.grad(3.0 * extras.lse.sum(), leaves)
        for name, a, b, c in zip(args, both, alone, rest, strict=True):
            torch.testing.assert_close(a, b + c, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")

    def test_a_frozen_input_costs_nothing(self):
        """Only the gradients asked for are made, and a forward without gradients makes none."""
        args, target = self.arguments(torch.float32)
        made = []

        def recorded(op, backend, direction, real=backends.function):
            def run(*given):
                gradients = given[-4:-1] if direction == "together" else given[-3:]
                made.append((direction, *(g is not None for g in gradients)))
                return real(op, backend, direction)(*given)

            return run

        with mock.patch.object(backends, "function", recorded):
            args["hidden"].requires_grad_(False)
            args["bias"].requires_grad_(False)
            ops.linear_cross_entropy(**args, target=target).backward()
            assert made == [("together", False, True, False)] and args["hidden"].grad is None
            with torch.no_grad():
                ops.linear_cross_entropy(**args, target=target)
            assert made[1][0] == "forward"


    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("softcap", [None, 5.0])
    @pytest.mark.parametrize("workspace_mb", [None, 0.1, 0.9], ids=["one chunk", "no room", "three chunks"])
    @pytest.mark.parametrize("counted", [300, 1, 0])
    def test_stale_gradients_are_overwritten(self, dtype, softcap, workspace_mb, counted):
        """With the bits that adding to zeros gives; if one of two is not stale, it is added to."""
        op = registry.get("linear_cross_entropy")
        args, target = self.arguments(dtype)
        target[counted:] = -100
        options = (-100, 0.1, 1e-3, softcap, 1.0, "sum", False, int((workspace_mb or 0) * 2**20))
        call = (args["hidden"], args["weight"], target, args["bias"], None, None, *options)

        def gradients(fill, stale):
            into = {n: torch.full((1000, 16)[: args[n].dim()], v) for n, v in fill.items()}
            with torch.no_grad():
                _, grads = op.run_together(call, [True] * 3, into=into, stale=stale)
            return grads

        zeros = gradients({"weight": 0.0, "bias": 0.0}, ())
        stale = gradients({"weight": torch.nan, "bias": torch.nan}, ("weight", "bias"))
        mixed = gradients({"weight": torch.nan, "bias": 8.0}, ("weight",))
        fresh = gradients({}, ())
        for name, *found in zip(("hidden", "weight", "bias"), zeros, stale, mixed, fresh, strict=True):
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[3]), name
            if name != "bias":
                assert torch.equal(found[0], found[2]), name
        torch.testing.assert_close(mixed[2], zeros[2] + 8.0, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("share", [1.0, 0.97, 0.6, 0.05])
    @pytest.mark.parametrize("ignored", [0, 7])
    def test_a_gradient_that_is_overwritten_holds_what_is_kept_for_it(self, dtype, share, ignored):
        """For as many tokens as fill it, or fewer, whose last blocks overlap, or none do; the same bits, and less workspace."""
        op, classes, width = registry.get("linear_cross_entropy"), 2003, 160
        tokens = int(share * width * 4 / dtype.itemsize) + ignored
        gen = torch.Generator().manual_seed(0)
        target = torch.randint(classes, (tokens,), generator=gen)
        target[:ignored] = -100
        hidden = torch.randn(tokens, width, generator=gen).to(dtype)
        weight, bias = torch.randn(classes, width, generator=gen).to(dtype), torch.randn(classes, generator=gen)
        call = (hidden, weight, target, bias, None, None, -100, 0.1, 1e-3, None, 1.0, "mean", False, 0)
        asked = []

        def give(size):
            asked.append(size)
            return torch.full((size,), 0xFF, dtype=torch.uint8)  # NaN

        def gradients(fill, stale):
            into = {"weight": torch.full((classes, width), fill), "bias": torch.full((classes,), fill)}
            with torch.no_grad(), use_backend("cpu"), native.workspace_from(give):
                (loss, *_), grads = op.run_together(call, [True] * 3, into=into, stale=stale)
            return loss, *grads

        for added, written in zip(gradients(0.0, ()), gradients(torch.nan, ("weight", "bias")), strict=True):
            assert torch.equal(added, written)
        apart, within = asked[-2:]
        if not ignored:
            assert within < apart - 0.5 * tokens * classes * dtype.itemsize


@every_gradient
def test_forward_mode_is_refused(op):
    """A tangent that went in and did not come out would be a gradient lost in silence."""
    args = op.samples[0].build(torch.float32)
    name = check.differentiable(op, args)[0]
    with torch.autograd.forward_ad.dual_level():
        args[name] = torch.autograd.forward_ad.make_dual(args[name], torch.randn_like(args[name]))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            op.function(**args)


OPERANDS = {  # of a matrix product, which autocast converts, as it does for PyTorch's; of a recurrent layer all tensors
    "attention": ("q", "k", "v"), "varlen_attention": ("q", "k", "v"), "linear_cross_entropy": ("hidden", "weight"),
    "lstm": ("x", "weight", "bias", "h0", "c0"), "gru": ("x", "weight", "bias", "h0"), "rnn": ("x", "weight", "bias", "h0"),
}  # fmt: skip


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_op
def test_autocast(op, backend, dtype):
    """It converts the operands of matrix products and nothing else: ops compute in the precision that they document."""
    args = op.samples[0].build(dtype)

    def converted(**given):
        operands = {n: given[n].bfloat16() for n in OPERANDS.get(op.name, ()) if given.get(n) is not None}
        return op.function(**given | operands)

    with serving(op, backend, args):
        expected = check.evaluate(converted, op, args)
        with torch.autocast("cpu", torch.bfloat16):
            got = check.evaluate(op.function, op, args)
    for key, value in expected.items():
        assert torch.equal(got[key], value) and got[key].dtype == value.dtype, key


def test_autocast_of_a_mixed_model():
    """Hidden states in bfloat16 from a Linear under autocast, and a float32 head."""
    linear, head = torch.nn.Linear(16, 24), nn.LinearCrossEntropyLoss(24, 50)
    x, target = torch.randn(6, 16), torch.randint(0, 50, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = linear(x)
        loss = head(hidden, target)
    loss.backward()
    assert hidden.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert head.weight.grad.dtype == linear.weight.grad.dtype == torch.float32 and linear.weight.grad.any()


class Seen(TorchDispatchMode):
    """The names of the operators that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@every_op
def test_a_dispatch_mode_sees_the_op(op):
    """What counts, traces or fakes operators sees one node forward and one backward, and the values are the same."""
    args = op.samples[0].build(torch.float32)
    expected = check.evaluate(op.function, op, args)
    with Seen() as seen:
        got = check.evaluate(op.function, op, args)
    for key, value in expected.items():
        close(got[key], value, key)
    assert f"fastlm.{op.name}.default" in seen.names
    assert op.backward is None or f"fastlm.{op.name}_backward.default" in seen.names


@pytest.mark.parametrize(
    ("op", "sample"),
    [pytest.param(op, s, id=f"{name}-{s.edge}") for name, op in OPS.items() for s in op.samples],
)
def test_nothing_waits_for_the_device(op, sample):
    """On the device "meta" there are no values: `.item()`, `nonzero`, `if tensor` raise, forward and backward."""

    class Meta:
        def forward(self, op, args):
            out = op.forward(*args)
            specs = op.outputs(*args)
            for tensor, spec in zip(out, specs, strict=True):
                assert (tuple(tensor.shape), tensor.dtype) == spec[:2]
            if op.backward is not None:
                saved, options = op.pick_saved(args, out)
                given = (*(torch.empty_like(o) for o in out[: op.results]), *saved, *options)
                needs = op.wanted(args, options)
                grads = op.backward(*given, needs)
                for grad, spec, need in zip(grads, op.gradients(*given, needs), needs, strict=True):
                    assert not need or (tuple(grad.shape), grad.dtype) == spec[:2]
            return out[: op.returned]

    args = sample.build(torch.float32, "meta")
    op.function(**args, tape=Meta())
    names = check.differentiable(op, args)
    out = outputs_of(op, args | {n: args[n].requires_grad_() for n in names})  # the public function alone
    if names:
        carry = [o for o in out if o.requires_grad]
        grads = torch.autograd.grad(carry, [args[n] for n in names], [torch.empty_like(o) for o in carry])
        assert [g.shape for g in grads] == [args[n].shape for n in names]


@every_gradient
def test_saved_tensor_hooks_and_checkpointing(op):
    """Offloading what is saved, and computing it again, change nothing."""
    args = op.samples[0].build(torch.float32)
    names = check.differentiable(op, args)
    expected = check.evaluate(op.function, op, args)
    moved = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)

    def again(**given):
        return torch.utils.checkpoint.checkpoint(op.function, use_reentrant=False, **given)

    for context, function in ((moved, op.function), (contextlib.nullcontext(), again)):
        with context:
            got = check.evaluate(function, op, args, names)
        for key, value in expected.items():
            assert torch.equal(got[key], value), key


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("backend", [pytest.param(b, marks=pytest.mark.backend(b)) for b in ("triton", "cuda")])
@every_op
def test_cuda_graph_capture(op, backend):
    """Forward and backward are captured, and a replay on other values gives what an eager call gives."""
    args, other = (op.samples[0].build(torch.float32, "cuda", seed=seed) for seed in (0, 1))
    with serving(op, backend, args):
        names = check.differentiable(op, args)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                check.evaluate(op.function, op, args, names)
        torch.cuda.synchronize()
        static = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in args.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = check.evaluate(op.function, op, static, names)
        for name, value in other.items():
            if isinstance(value, torch.Tensor):
                static[name].detach().copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        for key, value in check.evaluate(op.function, op, other, names).items():
            assert torch.equal(captured[key], value), key
