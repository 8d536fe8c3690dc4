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


def embedding_backward(dy, ids, weight, **more):
    """The gradients of the kernel by name: added to `into`, or in weight's dtype with `own`."""
    tables = ("positions", "position_weight", "segments", "segment_weight")
    saved = (ids, weight, *(more.get(name) for name in tables))
    needs = (True, saved[3] is not None, saved[5] is not None)
    op, options = registry.get("embedding"), (more.get("padding_idx"),)
    with backends.use_backend("cuda"):
        return op.run_backward((dy,), saved, options, needs, into=more.get("into"), own=more.get("own", False))


def integers(*shape, dtype=torch.float32):
    """Small whole numbers: their sums are exact, whatever the order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# (tokens, rows, columns, how often the first word stands among the others): more than one tile of the sort with a
# digit or two and with a chunk or two each, pieces of 32 and 64 places, runs through no, few and nearly all pieces.
@pytest.mark.parametrize(
    ("tokens", "rows", "h", "share"),
    [(3000, 50304, 4, 0.0), (1500, 600, 8, 0.5), (2100, 3, 36, 0.9), (8300, 512, 1, 0.3), (132_000, 2, 1, 0.2)],
)
def test_embedding_sums_runs(on_cpu, tokens, rows, h, share):
    """Exactly, beside rows that are out of range, and added to what is there; the padding row keeps it."""
    draw = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-2, rows + 2, (tokens,), generator=draw)
    ids[torch.rand(tokens, generator=draw) < share] = 0
    ids[torch.rand(tokens, generator=draw) < 0.1] = rows - 1
    dy, before = integers(tokens, h), integers(rows, h)
    for padding in (None, rows - 1)[: 1 if tokens > 10_000 else 2]:
        counts = (ids >= 0) & (ids < rows) & (ids != (-1 if padding is None else padding))
        exact = before.index_add(0, ids[counts], dy[counts])
        into = {"weight": before.clone()}
        embedding_backward(dy, ids, torch.zeros(rows, h), padding_idx=padding, into=into)
        assert torch.equal(into["weight"], exact)


def test_embedding_sums_equal_rows_in_the_order_of_tokens(on_cpu):
    """Four of each word in random places of several tiles, so that no run crosses into another piece."""
    rows, h = 700, 12
    ids = torch.arange(rows).repeat(4)[torch.randperm(4 * rows, generator=torch.Generator().manual_seed(0))]
    dy = torch.randn(4 * rows, h, generator=torch.Generator().manual_seed(2))
    a, b, c, d = dy[ids.argsort(stable=True)].view(rows, 4, h).unbind(1)
    grad = embedding_backward(dy, ids.int(), torch.zeros(rows, h))[0]
    assert torch.equal(grad, ((a + b) + c) + d) and not torch.equal(grad, ((d + c) + b) + a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_embedding_gradients_of_all_tables(on_cpu, monkeypatch, dtype):
    """Long runs in each, given and counted rows, in the weight's dtype rounded once; blocks in either order."""
    words, places, kinds, h = 40, 50, 3, 16
    draw = torch.Generator().manual_seed(3)
    ids, positions, segments = (torch.randint(0, n, (30, 50), generator=draw) for n in (words, places, kinds))
    ids[torch.rand(30, 50, generator=draw) < 0.5] = 7
    dy = torch.randn(30, 50, h, generator=draw).to(dtype)
    tables = [torch.zeros(n, h, dtype=dtype) for n in (words, places, kinds)]
    counted = torch.arange(50).expand(30, 50), torch.zeros_like(ids)
    for given in (True, False):
        rows = (ids, positions, segments) if given else (ids, *counted)
        more = {"positions": positions, "segments": segments} if given else {}
        more |= {"position_weight": tables[1], "segment_weight": tables[2]}
        wide = embedding_backward(dy, ids, tables[0], **more)
        own = embedding_backward(dy, ids, tables[0], own=True, **more)
        monkeypatch.setenv("CUDA_EMULATOR_REVERSED", "1")
        again = embedding_backward(dy, ids, tables[0], **more)
        monkeypatch.delenv("CUDA_EMULATOR_REVERSED")
        for table, index, a, b, c in zip(tables, rows, wide, own, again, strict=True):
            exact = torch.zeros(table.shape, dtype=torch.float64)
            exact.index_add_(0, index.flatten(), dy.view(-1, h).double())
            assert check.max_error(a, exact)[0] <= 2**-20 * exact.abs().max().item()
            assert torch.equal(a, c), "the order of blocks changes the bits"
            assert b.dtype == dtype and torch.equal(b, a.to(dtype))


def test_embedding_has_nan_for_rows_that_are_not_there(on_cpu):
    op, weight, places = registry.get("embedding"), torch.randn(5, 12), torch.randn(3, 12)
    ids = torch.tensor([[0, -1, 4], [5, 2, 2**40]])
    positions = torch.tensor([[0, 0, 3], [0, 2, 0]])
    with backends.use_backend("cuda"):
        (y,) = op.run_forward((ids, weight, positions, places, None, None, None))
    good = torch.tensor([[True, False, False], [False, True, False]])
    assert torch.equal(y[good], (weight[ids[good]] + places[positions[good]])) and y[~good].isnan().all()


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
