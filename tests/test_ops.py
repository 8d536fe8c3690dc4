"""Every op's contract, generated from the registry: op x backend x dtype."""

from __future__ import annotations

import pytest
import torch
from conftest import op_cases

from fastlm import backends, check, registry
from fastlm.testbed.check import run
from fastlm.testbed.options import CheckOptions

OPS = registry.ops()


@pytest.mark.parametrize(("op", "backend", "dtype"), op_cases())
def test_contract(op, backend, dtype, capsys):
    """`fastlm kernels check`: samples and random arguments. On a GPU Triton runs there, else in its interpreter."""
    random = 12 if backend == "triton" and backends.interpreting() else 40
    status = run(CheckOptions((op.name,), backend, dtype, random=random))
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("op", "sample"),
    [
        pytest.param(op, sample, marks=pytest.mark.backend("reference"), id=f"{op.name}-{sample.edge}")
        for op in OPS.values()
        if op.backward is not None
        for sample in op.samples
    ],
)
def test_gradcheck(op, sample):
    check.check_gradcheck(op, sample)


@pytest.mark.parametrize(
    ("op", "bad"), [pytest.param(o, b, id=f"{o.name}-{b.edge}") for o in OPS.values() for b in o.errors]
)
def test_errors(op, bad):
    args = bad.build(torch.float32)
    before = {k: v.clone() for k, v in args.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(bad.error, match=bad.text):
        op.function(**args)
    for name, value in before.items():
        assert torch.equal(args[name], value), f"a refused call changed {name}"


def _op_arguments(op, dtype=torch.float32, requires_grad=True):
    """The torch.library call behind the op's first sample."""
    seen = []

    class Recorder:
        def forward(self, op, args):
            seen.append(args)
            return op.run_forward(args)[: op.results]

    op.function(**op.samples[0].build(dtype), tape=Recorder())
    names = [n for n, _, _ in op.arguments]
    return tuple(
        a.detach().clone().requires_grad_(requires_grad and n in op.grads)
        if isinstance(a, torch.Tensor)
        else a
        for n, a in zip(names, seen[0], strict=True)
    )


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(op, backend):
    args = _op_arguments(op)
    if backends.why_not(op, backend, args):
        pytest.skip(backends.why_not(op, backend, args))
    with backends.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.fastlm, op.name).default, args)


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_fullgraph_compile(op):
    args = op.samples[0].build(torch.float32)
    eager = check.evaluate(op.function, op, args)
    torch._dynamo.reset()
    compiled = check.evaluate(torch.compile(op.function, fullgraph=True, backend="aot_eager"), op, args)
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "op", [o for o in OPS.values() if o.backward], ids=[n for n, o in OPS.items() if o.backward]
)
def test_double_backward_is_refused(op):
    args = op.samples[0].build(torch.float32)
    name = check.differentiable(op, args)[0]
    args[name].requires_grad_()
    out = op.function(**args)
    out = out[0] if isinstance(out, tuple) else out
    grad = torch.autograd.grad(out, args[name], torch.randn_like(out).requires_grad_(), create_graph=True)[0]
    with pytest.raises(RuntimeError, match=rf"fastlm.ops.{op.name}.*second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_cost_and_edges(op):
    """The cost is positive and every sample names a distinct edge case of the docstring."""
    import sys

    cost = op.cost(**op.samples[0].build(torch.float32))
    assert cost.forward_flops > 0 and cost.forward_bytes > 0
    assert op.backward is None or (cost.backward_flops > 0 and cost.backward_bytes > 0)
    edges = [s.edge for s in op.samples]
    assert len(set(edges)) == len(edges)
    text = sys.modules[f"fastlm.ops.{op.name}"].__doc__
    numbers = {e.split()[0].rstrip(":") for e in edges}
    assert all(number.isdigit() and number in text for number in numbers), numbers
