"""Every Triton kernel compiles for GPUs that are not here, fits their shared memory and spills no register.

In processes of their own, since those of this session may be interpreted. Triton keeps what it has compiled,
so only the first run takes long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastlm import gpu_code

pytestmark = pytest.mark.backend("triton-compiled")

OPS = gpu_code.ops_with_kernels()


def compiler(*arguments):
    """A Python process in which Triton compiles."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)


@pytest.fixture(scope="module")
def compiled():
    """What became of each kernel by (op, target): `Code`s, or the error."""
    found = defaultdict(list)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = pool.map(
            lambda t: compiler("-m", "fastlm.gpu_code", "--json", "--target", t), gpu_code.TARGETS
        )
        for run in runs:
            for row in map(json.loads, run.stdout.splitlines()):
                found[row["op"], row["target"]].append(row.get("error") or gpu_code.Code(**row))
            assert run.returncode in (0, 1), run.stderr
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", gpu_code.TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_spills(compiled, op, target):
    codes = compiled[op, target]
    assert codes, "no kernel was compiled"
    faults = [c if isinstance(c, str) else f"{c.kernel} {c.fault} for {c.case}" for c in codes]
    faults = [f for c, f in zip(codes, faults, strict=True) if isinstance(c, str) or c.fault]
    assert not faults, "\n".join(faults)


def test_a_spill_and_a_broken_kernel_are_seen(tmp_path):
    """A kernel with far too few registers is reported as spilling, one with a wrong name as an error."""
    kernels = tmp_path / "poor.py"
    kernels.write_text(
        """\
import sys, torch, triton, triton.language as tl
from fastlm import gpu_code

@triton.jit
def many_sums(x, y, N: tl.constexpr):
    b_x = tl.load(x + tl.arange(0, N))
    for i in range(0, 100):
        b_x = b_x * tl.load(x + i) + tl.load(y + tl.arange(0, N))
    tl.store(x + tl.arange(0, N), b_x)

@triton.jit
def broken(x):
    tl.store(x, no_such_name)

x, codes = torch.empty(4096, device="meta"), []
def seen(function, kernel):
    codes.append(gpu_code._read("op", function.__name__, kernel, "", True, "sm_90"))

with gpu_code._compiling("sm_90", seen):
    many_sums[(1,)](x, x, 4096, num_warps=4)
    many_sums[(1,)](x, x, 4096, num_warps=4, maxnreg=32)
    try:
        broken[(1,)](x)
    except triton.CompilationError as error:
        print("refused")
print([code.fault for code in codes], codes[1].spill_bytes > 0)
"""
    )
    run = compiler(str(kernels))
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == "refused"
    assert "['', 'spills " in run.stdout and run.stdout.endswith("True\n")


def test_it_refuses_to_interpret():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "fastlm.gpu_code", "adamw"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "TRITON_INTERPRET" in run.stderr
