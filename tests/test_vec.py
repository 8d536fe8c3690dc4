"""csrc/cpu/vec.h: accuracy of its functions, rounding, tails, reductions, threads and scratch memory.

Every instruction set that the chip runs is compiled from tests/vec_probe.cpp and checked against float64.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm import native

ROOT = Path(__file__).parent.parent
COMPILER = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
RECORD = native.build_record()


def runnable() -> list[str]:
    if native.why_not("cpu"):
        return []
    best = native.load("cpu").best_isa()
    return [i for i in native.ISAS[: native.ISAS.index(best) + 1] if f"_cpu_{i}" in RECORD.get("built", {})]


pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(
        not runnable(), reason=native.why_not("cpu") or "fastlm/_build.json names no CPU module"
    ),
]


@pytest.fixture(scope="module", params=runnable())
def vec(request, tmp_path_factory):
    """vec.h as compiled for one instruction set, with the flags that the extension was compiled with."""
    target = tmp_path_factory.mktemp("vec") / f"vec_{request.param}.so"
    flags = f"{RECORD['flags']} {RECORD['built'][f'_cpu_{request.param}']}".split()
    openmp = ["-fopenmp"] if RECORD["openmp"] else []
    source = ROOT / "tests" / "vec_probe.cpp"
    command = [COMPILER, *flags, *openmp, "-fvisibility=default", "-shared", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(target))
    library.probe_sum.restype = library.probe_max.restype = ctypes.c_float
    library.probe_accumulate.restype = library.probe_part.restype = ctypes.c_float
    library.probe_blocks.restype = library.probe_throw.restype = ctypes.c_int64
    return library


def pointer(a: np.ndarray) -> ctypes.c_void_p:
    assert a.flags.c_contiguous
    return ctypes.c_void_p(a.ctypes.data)


def mapped(function, x: np.ndarray) -> np.ndarray:
    y = np.full_like(x, np.nan)
    function(pointer(x), pointer(y), ctypes.c_int64(x.size))
    return y


def ulps(value: np.ndarray, exact: np.ndarray) -> float:
    """The largest error in units of the last place of float32; NaN if any value is."""
    with np.errstate(over="ignore", under="ignore"):
        unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return float(np.max(np.abs(value.astype(np.float64) - exact) / unit))


def both_signs(low: float, high: float) -> np.ndarray:
    """A dense grid of magnitudes, half of it logarithmic, with both signs and 0: no multiple of a vector."""
    magnitudes = np.concatenate([np.geomspace(low, high, 150_001), np.linspace(low, high, 150_000)])
    return np.concatenate([-magnitudes, magnitudes, [0.0]]).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "grid", "exact", "limit"),
    [
        ("exp", np.linspace(-103.9, 88.72, 600_001, dtype=np.float32), np.exp, 1.0),
        ("exp", both_signs(1e-8, 1.0), np.exp, 1.0),
        ("tanh", both_signs(1e-30, 12.0), np.tanh, 1.5),
        ("erf", both_signs(1e-30, 5.0), lambda x: torch.special.erf(torch.from_numpy(x)).numpy(), 1.25),
    ],
    ids=["exp", "exp near 0", "tanh", "erf"],
)
def test_accuracy(vec, name, grid, exact, limit):
    error = ulps(mapped(getattr(vec, f"probe_{name}"), grid), exact(grid.astype(np.float64)))
    assert error <= limit


def test_special_values(vec):
    x = np.array([-np.inf, np.inf, np.nan, 0.0, -0.0, 1e30, -1e30, 88.8, -110.0], dtype=np.float32)
    exp, tanh, erf = (mapped(getattr(vec, f"probe_{n}"), x) for n in ("exp", "tanh", "erf"))
    np.testing.assert_array_equal(exp, np.array([0, np.inf, np.nan, 1, 1, np.inf, 0, np.inf, 0], np.float32))
    expected = np.array([-1, 1, np.nan, 0, -0.0, 1, -1, 1, -1], np.float32)
    for value in (tanh, erf):
        np.testing.assert_array_equal(value, expected)
        np.testing.assert_array_equal(np.signbit(value[3:5]), [False, True])
    roots = mapped(vec.probe_sqrt, np.abs(x))
    np.testing.assert_array_equal(roots, np.sqrt(np.abs(x)))


def test_bf16_rounds_as_torch_does(vec):
    """Every bfloat16 survives the way there and back; any float32 rounds to nearest even; NaN stays NaN."""
    every = np.arange(65536, dtype=np.uint16)
    wide = np.empty(65536, np.float32)
    vec.probe_widen(pointer(every), pointer(wide), ctypes.c_int64(every.size))
    np.testing.assert_array_equal(wide.view(np.uint32), every.astype(np.uint32) << 16)

    random = np.random.default_rng(0).integers(0, 2**32, 1_000_003, dtype=np.uint32).view(np.float32)
    halfway = (every.astype(np.uint32) << 16 | 0x8000).view(np.float32)
    x = np.concatenate([wide, halfway, random])
    expected = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(x)
    for narrow in (vec.probe_narrow, vec.probe_scalar_narrow):
        y = np.zeros(x.size, np.uint16)
        narrow(pointer(x), pointer(y), ctypes.c_int64(x.size))
        np.testing.assert_array_equal(y[~nan], expected[~nan])
        assert np.isnan((y[nan].astype(np.uint32) << 16).view(np.float32)).all()


def test_tails_stay_inside(vec):
    """Lengths around the vector's width write what they should and not one element more."""
    for n in range(3 * vec.width() + 2):
        x = np.linspace(-1, 1, n + 2, dtype=np.float32)
        y = np.full(n + 2, 7.0, np.float32)
        vec.probe_exp(pointer(x), pointer(y), ctypes.c_int64(n))
        np.testing.assert_allclose(y[:n], np.exp(x[:n]), rtol=1e-6)
        assert (y[n:] == 7.0).all()
        total = vec.probe_accumulate(pointer(x), ctypes.c_int64(n))
        assert abs(total - x[:n].astype(np.float64).sum()) <= 1e-5
    for n in range(vec.width() + 1):
        total = vec.probe_part(pointer(np.ones(n + 1, np.float32)), n, ctypes.c_float(0.5))
        assert total == n + 0.5 * (vec.width() - n)


def test_reductions(vec):
    width, rng = vec.width(), np.random.default_rng(1)
    for _ in range(20):
        x = rng.standard_normal(width).astype(np.float32)
        assert abs(vec.probe_sum(pointer(x)) - x.astype(np.float64).sum()) <= 1e-5
        assert vec.probe_max(pointer(x)) == x.max()
    a, b = rng.standard_normal((2, width)).astype(np.float32)
    out = np.empty(width, np.float32)
    for lane in range(width):
        x = a.copy()
        x[lane] = np.nan
        assert np.isnan(vec.probe_max(pointer(x))) and np.isnan(vec.probe_sum(pointer(x)))
        for first, second in ((x, b), (b, x)):
            for function, exact in ((vec.probe_max2, np.maximum), (vec.probe_min2, np.minimum)):
                function(pointer(first), pointer(second), pointer(out))
                np.testing.assert_array_equal(out, exact(first, second))


def test_integer_and_bf16_products(vec):
    width, rng = vec.width(), np.random.default_rng(2)
    a = rng.integers(0, 2**32, width, dtype=np.uint32)
    out = np.empty(width, np.uint32)
    for b in (0xD2511F53, 0xCD9E8D57, 0xFFFFFFFF, 1):
        vec.probe_mulhi(pointer(a), ctypes.c_uint32(b), pointer(out))
        np.testing.assert_array_equal(
            out, (a.astype(np.uint64) * np.uint64(b) >> np.uint64(32)).astype(np.uint32)
        )
    pairs = torch.randn(2, width, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    acc, y = rng.standard_normal(width).astype(np.float32), np.empty(width, np.float32)
    left, right = (np.ascontiguousarray(p.view(torch.int16).numpy()) for p in pairs)
    vec.probe_dot2(pointer(acc), pointer(left), pointer(right), pointer(y))
    exact = acc + (pairs[0].double() * pairs[1].double()).sum(-1).numpy()
    assert np.abs(y - exact).max() <= 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_parallel_for(vec, threads):
    """Each item exactly once, in blocks that depend on n and the grain alone; the first block's exception."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n, grain in ((0, 1), (1, 1), (7, 3), (1000, 1), (1000, 7), (257, 1)):
            block, count = np.full(n, -1, np.int64), np.zeros(n, np.int64)
            blocks = vec.probe_blocks(
                ctypes.c_int64(n), ctypes.c_int64(grain), pointer(block), pointer(count)
            )
            assert blocks == min(-(-n // grain), 256)
            assert (count == 1).all()
            begins = np.arange(blocks) * n // max(blocks, 1)
            np.testing.assert_array_equal(block, np.searchsorted(begins, np.arange(n), side="right") - 1)
            first = int((block < blocks // 2).sum())  # what the first of two threads does
            assert blocks % 2 or abs(2 * first - n) <= 1, "one thread has more to do"
        assert vec.probe_throw(ctypes.c_int64(100), ctypes.c_int64(17)) == 17
        assert vec.probe_throw(ctypes.c_int64(100), ctypes.c_int64(100)) == -1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 1000, 70_000, 3_000_000])
def test_scratch(vec, size):
    assert vec.probe_scratch(ctypes.c_int64(size)) == 0


def test_variant_can_be_chosen():
    """FASTLM_CPU_ISA chooses the variant, and a wrong name gets a clear answer."""
    code = "from fastlm import native; print(native.why_not('cpu') or native.load('cpu').__name__)"

    def chosen(isa: str) -> str:
        env = {**os.environ, "FASTLM_CPU_ISA": isa}
        python = [sys.executable, "-c", code]
        return subprocess.run(
            python, env=env, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert chosen("portable") == "fastlm._cpu_portable"
    assert chosen("mmx").startswith("FASTLM_CPU_ISA must be one of portable, avx2")
