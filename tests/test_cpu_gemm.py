"""Matrix products in C++ (csrc/cpu/gemm.h) against float64, for every instruction set that was built."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from fastlm import native

if native.why_not("cpu"):
    pytest.skip(native.why_not("cpu"), allow_module_level=True)


def modules():
    """(isa, extension module) of every variant that this chip can run and that was built."""
    best = native.load("cpu").best_isa()
    for isa in native.ISAS[: native.ISAS.index(best) + 1]:
        try:
            yield pytest.param(importlib.import_module(f"fastlm._cpu_{isa}"), id=isa)
        except ModuleNotFoundError:
            continue  # left out by FASTLM_CPU_ISAS


MODULES = list(modules())
DTYPES = [torch.float32, torch.bfloat16]
# Sizes around the kernel's tile (6 rows, 8 to 64 columns) and its blocks (512 or 1024 of k, 480 rows).
SIZES = [
    (1, 1, 1), (1, 64, 7), (5, 3, 2), (6, 64, 64), (7, 65, 63), (13, 16, 33), (12, 48, 192), (3, 31, 513),
    (64, 17, 1025), (31, 127, 2051), (487, 9, 50), (121, 300, 20),
]  # fmt: skip
LAYOUTS = ["rows", "columns", "strided", "expanded"]


def operand(rows: int, columns: int, layout: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A random matrix inside memory full of NaN, so that reading beyond its edge shows."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "expanded":
        return values[:1].clone().expand(rows, columns)
    shape = {
        "rows": (rows + 2, columns + 3),
        "columns": (columns + 2, rows + 3),
        "strided": (rows * 2 + 1, columns * 3 + 2),
    }
    memory = torch.full(shape[layout], float("nan"), dtype=dtype)
    view = {
        "rows": lambda: memory[1 : rows + 1, 1 : columns + 1],
        "columns": lambda: memory.t()[1 : rows + 1, 1 : columns + 1],
        "strided": lambda: memory[1 : 2 * rows : 2, 2 : 3 * columns + 1 : 3],
    }[layout]()
    return view.copy_(values)


def check(
    module, a: torch.Tensor, b: torch.Tensor, accumulate: bool = False, bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    m, n, k = a.shape[0], b.shape[1], a.shape[1]
    memory = torch.full((m + 2, n + 3), float("nan"), dtype=dtype)
    c = memory[1 : m + 1, 1 : n + 1]
    added = np.zeros((m, n)) if bias is None else np.tile(bias.double().numpy(), (m, 1))
    if accumulate:
        c.copy_(torch.randn(m, n, generator=torch.Generator().manual_seed(9)))
        added += c.double().numpy()
    native.call(module.matmul, a, b, c, accumulate, bias)
    exact_a, exact_b = a.double().numpy(), b.double().numpy()
    exact = added + exact_a @ exact_b
    error = np.abs(c.double().numpy() - exact)
    # Each of the k additions and the last ones round once, relative to a partial sum of absolute values.
    bound = (k + 3) * 2.0**-23 * (np.abs(added) + np.abs(exact_a) @ np.abs(exact_b))
    if dtype == torch.bfloat16:
        bound += 2.0**-8 * np.abs(exact) * 1.01  # and the result, to the nearest of 8 digits
    assert (error <= bound).all(), (
        f"error {np.nanmax(error)} at {np.argwhere(~(error <= bound))[:4].tolist()}"
    )
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside[1 : m + 1, 1 : n + 1] = False
    assert memory[outside].isnan().all(), "memory beyond c was written"


@pytest.mark.parametrize("module", MODULES)
class TestMatmul:
    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_sizes(self, module, size, dtype):
        m, n, k = size
        for seed, (of_a, of_b) in enumerate([("rows", "rows"), ("rows", "columns"), ("columns", "rows")]):
            check(module, operand(m, k, of_a, dtype, seed), operand(k, n, of_b, dtype, seed + 50))

    @pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
    def test_layouts_and_mixed_dtypes(self, module, dtypes):
        for seed, (of_a, of_b) in enumerate([(a, b) for a in LAYOUTS for b in LAYOUTS]):
            a, b = operand(19, 45, of_a, dtypes[0], seed), operand(45, 70, of_b, dtypes[1], seed + 50)
            check(module, a, b, accumulate=seed % 2 == 1)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_accumulates_over_blocks_of_k(self, module, dtype):
        check(
            module, operand(9, 2100, "rows", dtype, 1), operand(2100, 66, "columns", dtype, 2), accumulate=True
        )

    @pytest.mark.parametrize("k", [0, 3, 64, 1024, 1025, 2500])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_bias_and_bfloat16_results(self, module, dtype, k):
        """Of one block of k, and of several, whose sums go through memory of their own."""
        a, b = operand(250, k, "rows", dtype, 1), operand(k, 300, "columns", dtype, 2)
        for kind in DTYPES:
            bias = torch.randn(300, generator=torch.Generator().manual_seed(3)).to(kind)
            check(module, a, b, bias=bias)
            check(module, a, b, bias=bias, dtype=torch.bfloat16)
        check(module, a, b, dtype=torch.bfloat16)
        check(module, a, b, accumulate=True, bias=bias)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_empty(self, module, dtype):
        check(module, torch.empty(4, 0, dtype=dtype), torch.empty(0, 5, dtype=dtype))
        check(module, torch.empty(4, 0, dtype=dtype), torch.empty(0, 5, dtype=dtype), accumulate=True)
        check(module, torch.empty(0, 3, dtype=dtype), torch.ones(3, 5, dtype=dtype))
        check(module, torch.ones(2, 3, dtype=dtype), torch.empty(3, 0, dtype=dtype))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_nan_and_inf_stay_in_their_row_and_column(self, module, dtype):
        a, b = operand(8, 21, "rows", dtype, 1), operand(21, 40, "columns", dtype, 2)
        a[2, 20], b[3, 7] = float("nan"), float("inf")
        c = torch.empty(8, 40)
        native.call(module.matmul, a, b, c, False, None)
        finite = c.isfinite()
        assert c[2].isnan().all() and not finite[:, 7].any()
        finite[2], finite[:, 7] = True, True
        assert finite.all()

    @pytest.mark.parametrize("result", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("columns", [256, 300])  # panels that some numbers of threads share evenly, and others
    def test_same_bits_in_any_partition_and_number_of_threads(self, module, dtype, result, columns):
        a, b = operand(250, 2100, "rows", dtype, 1), operand(2100, columns, "rows", dtype, 2)
        found = []
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 3, 4, 5, 64):
                torch.set_num_threads(count)  # also sets the OpenMP runtime that torch and the extension share
                found.append(torch.full((250, columns), float("nan"), dtype=result))
                native.call(module.matmul, a, b, found[-1], False, None)
        finally:
            torch.set_num_threads(threads)
        part = torch.empty(11, 37, dtype=result)
        native.call(module.matmul, a[100:111], b[:, 64:101], part, False, None)
        assert all(torch.equal(again, found[0]) for again in found[1:])
        assert torch.equal(part, found[0][100:111, 64:101])

    def test_errors(self, module):
        a, b, c = torch.ones(2, 3), torch.ones(3, 4), torch.ones(2, 4)
        for args, text in [
            ((a, b[:2], c), "b must have 3 rows, got 2"),
            ((a, b, c[:1]), "c must be 2 x 4, got 1 x 4"),
            ((a, b, torch.ones(4, 2).t()), "c must have a contiguous last dimension, got stride 2"),
            ((a.double(), b, c), "a must be float32 or bfloat16, got float64"),
            ((a[0], b, c), "must have 2 dimensions, got 1, 2 and 2"),
            ((a, b, c.double()), "expected a float32 tensor, got float64"),
        ]:
            with pytest.raises(ValueError, match=text):
                native.call(module.matmul, *args, False, None)
        with pytest.raises(ValueError, match="bias must have 4 elements, got 3"):
            native.call(module.matmul, a, b, c, False, torch.ones(3))
        with pytest.raises(ValueError, match="c must be float32 to be added to, got bfloat16"):
            native.call(module.matmul, a, b, c.bfloat16(), True, None)


@pytest.mark.parametrize("module", MODULES)
class TestLinearGradients:
    @pytest.mark.parametrize("size", [*SIZES, (3, 130, 260), (129, 500, 7)], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("accumulate", [False, True])
    def test_against_float64(self, module, size, dtype, accumulate):
        k, m, n = size
        dy, x = operand(k, m, "rows", dtype, 1), operand(k, n, "rows", dtype, 2)
        memory = torch.full((m + 2, n + 3), float("nan"))
        dweight, d_bias = memory[1 : m + 1, 1 : n + 1], torch.randn(m, generator=torch.Generator().manual_seed(4))
        before = torch.randn(m, n, generator=torch.Generator().manual_seed(3)).double() if accumulate else torch.zeros(m, n)
        if accumulate:
            dweight.copy_(before)
        start = d_bias.double()
        native.call(module.linear_gradients, dy, x, dweight, accumulate, d_bias)
        exact = before + dy.double().t() @ x.double()
        bound = (k + 3) * 2.0**-23 * (before.abs() + dy.double().abs().t() @ x.double().abs())
        assert ((dweight.double() - exact).abs() <= bound).all()
        bound = (k + 3) * 2.0**-23 * (start.abs() + dy.double().abs().sum(0))
        assert ((d_bias.double() - (start + dy.double().sum(0))).abs() <= bound).all()
        outside = torch.ones_like(memory, dtype=torch.bool)
        outside[1 : m + 1, 1 : n + 1] = False
        assert memory[outside].isnan().all(), "memory beyond dweight was written"

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_is_the_product_whoever_shares_it(self, module, dtype):
        """The weight's gradient has the product's bits, and both the same for any number of threads, as without a bias."""
        dy, x = operand(1500, 250, "rows", dtype, 1), operand(1500, 300, "rows", dtype, 2)
        product = torch.empty(250, 300)
        native.call(module.matmul, dy.t(), x, product, False, None)
        found = []
        threads = torch.get_num_threads()
        try:
            for count in (threads, 1, 3):
                torch.set_num_threads(count)
                found.append((torch.empty(250, 300), torch.zeros(250)))
                native.call(module.linear_gradients, dy, x, found[-1][0], False, found[-1][1])
        finally:
            torch.set_num_threads(threads)
        alone = torch.full((250, 300), float("nan"))
        native.call(module.linear_gradients, dy, x, alone, False, None)
        assert all(torch.equal(d_weight, product) for d_weight, _ in [*found, (alone, None)])
        assert all(torch.equal(d_bias, found[0][1]) for _, d_bias in found)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_long_sums_do_not_lose_what_is_small(self, module, dtype):
        """Of many tokens, the error stays that of blocks of them, not of one sum that grows."""
        k = 60_000
        dy = (1 + 2.0**-7 * torch.randint(0, 8, (k, 4), generator=torch.Generator().manual_seed(0))).to(dtype)
        d_bias = torch.zeros(4)
        native.call(module.linear_gradients, dy, torch.ones(k, 1, dtype=dtype), torch.empty(4, 1), False, d_bias)
        exact = dy.double().sum(0)
        assert ((d_bias.double() - exact) / exact).abs().max() <= 2e-6

    def test_no_tokens(self, module):
        dweight, d_bias = torch.full((3, 4), float("nan")), torch.ones(3)
        native.call(module.linear_gradients, torch.empty(0, 3), torch.empty(0, 4), dweight, False, d_bias)
        assert dweight.eq(0).all() and d_bias.eq(1).all()

    def test_errors(self, module):
        dy, x, dweight, d_bias = torch.ones(2, 3), torch.ones(2, 4), torch.ones(3, 4), torch.ones(3)
        for args, text in [
            ((dy, x[:1], dweight, d_bias), "x must have 2 rows and some columns, got 1 x 4"),
            ((dy, x[:, :0], dweight[:, :0], d_bias), "x must have 2 rows and some columns, got 2 x 0"),
            ((dy, x, dweight[:2], d_bias), "dweight must be 3 x 4, got 2 x 4"),
            ((dy, x, dweight, d_bias[:2]), "dbias must have 3 elements, got 2"),
            ((dy, x.bfloat16(), dweight, d_bias), "dy and x must have the same dtype"),
            ((torch.ones(3, 2).t(), x, dweight, d_bias), "contiguous last dimensions"),
            ((dy, x, dweight.bfloat16(), d_bias), "expected a float32 tensor, got bfloat16"),
            ((dy, x, dweight, d_bias.double()), "expected a float32 tensor, got float64"),
        ]:
            with pytest.raises(ValueError, match=text):
                native.call(module.linear_gradients, *args[:3], False, args[3])
