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
@pytest.mark.parametrize("rows, n", [(2, 256), (3, 1000), (2, 5008), (2, 8200), (3, 33), (2100, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layer_norm_paths(on_cpu, rows, n, dtype):
    normal = samples.Normal
    sample = samples.Sample("path", x=normal((rows, n)), weight=normal((n,)), bias=normal((n,)))
    check.check_budget(registry.get("layer_norm"), sample, dtype, "cuda")


def test_layer_norm_unaligned_and_mixed(on_cpu):
    """A view that starts off a 16-byte boundary, with weight and bias of different dtypes."""
    op = registry.get("layer_norm")
    x = torch.randn(4 * 96 + 1, generator=torch.Generator().manual_seed(0))[1:].view(4, 96).bfloat16()
    args = {"x": x, "weight": torch.linspace(-1, 1, 96), "bias": torch.linspace(1, 2, 96).bfloat16()}
    exact = op.function(**{k: v.double() for k, v in args.items()})
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
