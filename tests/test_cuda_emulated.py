"""The op contract of every kernel in csrc/cuda, run thread by thread on the CPU.

On a GPU the same checks run on the real thing (tests/test_ops.py); this is for machines and CI without one.
"""

from __future__ import annotations

import shutil
from functools import partial

import cuda_emulator
import pytest
import torch

from fastlm import backends, check, native, registry, samples

COMPILER = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
OPS = [op for name, op in registry.ops().items() if (cuda_emulator.CSRC / "cuda" / f"{name}.cu").exists()]

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler to build the emulated kernels"),
    pytest.mark.skipif(bool(native.why_not("cpu")), reason=native.why_not("cpu") or "-"),
    pytest.mark.backend("cuda-emulated"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    native.load("cpu")  # the table of dtypes
    return cuda_emulator.build(tmp_path_factory.mktemp("emulated"), COMPILER)


@pytest.fixture
def on_cpu(emulated, monkeypatch):
    """Serves the backend "cuda" by the emulator, for CPU tensors; the reference stays what it is."""

    def implementation(op, direction, args):
        if backends.requested() != "cuda":
            return None
        return partial(cuda_emulator.call, emulated, f"{op.name}_{direction}")

    monkeypatch.setattr(backends, "implementation", implementation)


@pytest.mark.parametrize(
    ("op", "sample"), [pytest.param(o, s, id=f"{o.name}-{s.edge}") for o in OPS for s in o.samples]
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_budget(on_cpu, op, sample, dtype):
    check.check_budget(op, sample, dtype, "cuda")


@pytest.mark.parametrize("op", OPS, ids=[o.name for o in OPS])
def test_contract(on_cpu, op):
    for run in (check.check_repeatable, check.check_requires_grad, check.check_layouts):
        run(op, op.samples[0], torch.float32, "cuda")
    if op.backward is not None:
        check.check_accumulation(op, op.samples[0], torch.float32, "cuda")


# One shape for each way through the kernels: a warp a row, a block a row (8 and 16 elements a thread),
# rows too long for registers, rows that are no multiple of 16 bytes, more rows than there are groups.
PATHS = [(2, 256), (3, 1000), (2, 5008), (2, 16400), (3, 33), (3, 8201), (2100, 8)]


@pytest.mark.parametrize("rows, n", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layer_norm_paths(on_cpu, rows, n, dtype):
    normal = samples.Normal
    sample = samples.Sample("path", x=normal((rows, n)), weight=normal((n,)), bias=normal((n,)))
    check.check_budget(registry.get("layer_norm"), sample, dtype, "cuda")


@pytest.mark.parametrize("rows, n", PATHS)
@pytest.mark.parametrize("casting", ["gemma", "llama"])
def test_rms_norm_paths(on_cpu, rows, n, casting):
    """In bfloat16, with a float32 weight and an offset."""
    weight = samples.Normal((n,), dtype=torch.float32)
    sample = samples.Sample("path", x=samples.Normal((rows, n)), weight=weight, offset=1.0, casting=casting)
    check.check_budget(registry.get("rms_norm"), sample, torch.bfloat16, "cuda")


@pytest.mark.parametrize("casting", ["gemma", "llama"])
@pytest.mark.parametrize("n", [96, 33], ids=["packs", "one by one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_rms_norm_rounds_where_the_reference_does(on_cpu, casting, n, dtype):
    """Nearer to the reference of the same order than half the distance between the two orders: y and dweight."""
    op, generator = registry.get("rms_norm"), torch.Generator().manual_seed(0)
    x = torch.randn(9, n, generator=generator).to(dtype)
    weight = torch.randn(n, generator=generator)
    dy = torch.randn(9, n, generator=generator).to(dtype)

    def results(order, backend):
        leaf = weight.clone().requires_grad_()
        with backends.use_backend(backend):
            y = op.function(x, leaf, offset=1.0, casting=order)
            (dweight,) = torch.autograd.grad(y, leaf, dy)
        return y.detach().double(), dweight.double()

    other = {"gemma": "llama", "llama": "gemma"}[casting]
    ours, same, different = results(casting, "cuda"), results(casting, "reference"), results(other, "reference")
    for name, a, b, c in zip(("y", "dweight"), ours, same, different, strict=True):
        assert (a - b).norm() <= 0.2 * (b - c).norm(), name


@pytest.mark.parametrize("wanted", ["dx", "dweight", "neither"])
@pytest.mark.parametrize("n", [32, 33], ids=["packs", "one by one"])
def test_rms_norm_computes_what_is_wanted(emulated, wanted, n):
    """The other gradient, and rstd, may be None; the one wanted is bitwise what both give."""
    op, generator = registry.get("rms_norm"), torch.Generator().manual_seed(0)
    x, dy = (torch.randn(11, n, generator=generator) for _ in range(2))
    weight, rstd, y = torch.randn(n, generator=generator), torch.empty(11), torch.empty_like(x)
    forward = partial(cuda_emulator.call, emulated, "rms_norm_forward", x, weight, 1e-6, 0.5, "gemma")
    forward(y, rstd)
    alone = torch.empty_like(x)
    forward(alone, None)
    assert torch.equal(alone, y)
    exact, exact_rstd = op.forward(x.double(), weight.double(), 1e-6, 0.5, "gemma")
    assert check.max_error(y, exact)[0] <= 1e-5 and check.max_error(rstd, exact_rstd)[0] <= 1e-6

    def backward(dx, dweight):
        options = (dy, x, weight, rstd, 1e-6, 0.5, "gemma", dx, dweight)
        cuda_emulator.call(emulated, "rms_norm_backward", *options)
        return dx, dweight

    both = backward(torch.empty_like(x), torch.ones(n))
    some = backward(
        torch.empty_like(x) if wanted == "dx" else None, torch.ones(n) if wanted == "dweight" else None
    )
    for a, b in zip(some, both, strict=True):
        assert a is None or torch.equal(a, b)
    exact = op.backward(dy.double(), x.double(), weight.double(), exact_rstd, 1e-6, 0.5, "gemma", (True, True))
    for a, b in zip(both, (exact[0], exact[1] + 1), strict=True):
        assert check.max_error(a, b)[0] <= 1e-5 * b.abs().max().item()


@pytest.mark.parametrize("arguments, text", [
    (("mistral", 33, 33), "casting must be gemma or llama, got mistral"),
    (("gemma", 32, 33), "weight must have 33 elements, got 32"),
    (("llama", 33, 32), "y must have 66 elements, got 64"),
])  # fmt: skip
def test_rms_norm_refuses(emulated, arguments, text):
    casting, weight, columns = arguments
    with pytest.raises(ValueError, match=text):
        cuda_emulator.call(
            emulated, "rms_norm_forward", torch.ones(2, 33), torch.ones(weight), 1e-6, 0.0, casting,
            torch.empty(2, columns), None,
        )  # fmt: skip


@pytest.mark.parametrize("name, more", [
    ("layer_norm", {"bias": torch.linspace(1, 2, 96).bfloat16()}), ("rms_norm", {"offset": 1.0}),
])  # fmt: skip
def test_norm_unaligned_and_mixed(on_cpu, name, more):
    """A view that starts off a 16-byte boundary, with parameters of other dtypes."""
    op = registry.get(name)
    x = torch.randn(4 * 96 + 1, generator=torch.Generator().manual_seed(0))[1:].view(4, 96).bfloat16()
    args = {"x": x, "weight": torch.linspace(-1, 1, 96), **more}
    exact = op.function(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in args.items()})
    with backends.use_backend("cuda"):
        y = op.function(**args)
    assert check.max_error(y, exact)[0] <= 2**-8 * exact.abs().max().item()


def test_emulator_finds_a_deadlock(tmp_path):
    """A barrier that only part of a warp reaches is an error, not a hang and not a pass."""
    source, program = tmp_path / "broken.cpp", tmp_path / "broken"
    source.write_text(
        """
        #include "cuda_runtime.h"
        #include <cstdio>
        static void broken(int* out) {
          if (threadIdx.x % 32 < 16) __syncthreads();
          else *out = __shfl_xor_sync(~0u, 1, 1);
        }
        int main() {
          int out = 0;
          try {
            emulator::launch(&broken, 1, 64, 0, nullptr, &out);
          } catch (const std::exception& e) {
            std::puts(e.what());
            return 3;
          }
        }
        """
    )
    include = f"-I{cuda_emulator.HERE}"
    built = cuda_emulator.run([COMPILER, "-std=c++17", include, str(source), "-o", str(program)])
    assert built.returncode == 0, built.stderr
    done = cuda_emulator.run([str(program)])
    assert done.returncode == 3 and "deadlock" in done.stdout
