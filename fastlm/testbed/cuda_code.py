"""CUDA C++ kernels compiled by nvcc for GPUs that are not here, with setup.py's flags."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .machine_code import Usage, read_cubins

__all__ = ["Failed", "compile_source", "sources", "why_not"]


class Failed(NamedTuple):
    """What the compiler said when it refused a file."""

    message: str


@cache
def _setup(root: Path) -> Any:
    """setup.py as a module: where it looks for nvcc, and its flags."""
    spec = importlib.util.spec_from_file_location("fastlm_setup", root / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(root: Path) -> dict[str, Path]:
    """The .cu files of a source tree by op; none in an installed package."""
    return {path.stem: path for path in sorted((root / "csrc" / "cuda").glob("*.cu"))}


def why_not(root: Path) -> str:
    """Why CUDA C++ cannot be compiled here; "" if it can."""
    if not sources(root):
        return "csrc/cuda is not here: an installed package does not hold the sources"
    try:
        nvcc = _setup(root).find_nvcc()
    except ImportError as error:
        return f"setup.py, which holds the flags, cannot be imported: {error}"
    return "" if nvcc else "nvcc was not found (NVCC, CUDA_HOME, PATH and /usr/local/cuda were searched)"


def compile_source(source: Path, arch: int, flags_of: Path) -> dict[str, Usage] | Failed:
    """The kernels of a .cu file, compiled for sm_<arch>, by name: `sweep_kernel<float, 4>`.

    flags_of: the source tree whose setup.py says how; another revision's sources are compiled with our flags.
    """
    setup = _setup(flags_of)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        target = f"arch=compute_{arch},code=sm_{arch}"
        command = [*setup.nvcc_command(setup.find_nvcc()), *setup.NVCC_FLAGS, "-gencode", target,
                   f"-I{source.parent.parent}", "-cubin", "-o", str(cubin), str(source)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line] or [
                "no message"
            ]
            return Failed(lines[0].strip().replace(f"{source.parent}/", "")[:400])
        (kernels,) = read_cubins([cubin.read_bytes()], arch)
    return dict(zip(_readable(list(kernels)), kernels.values(), strict=True))


def _readable(names: list[str]) -> list[str]:
    """Names as the source spells them, without namespace and arguments; the linker's where c++filt is missing."""
    program = shutil.which("c++filt")
    if program is None or not names:
        return names
    plain = subprocess.run(
        [program, "-p", *names], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    short = [re.sub(r"\bfastlm::|\(anonymous namespace\)::|^void ", "", name) for name in plain]
    return short if len(set(short)) == len(short) else names
