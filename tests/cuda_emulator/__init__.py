"""Builds csrc/cuda for the CPU against the headers beside this file, so that kernels run without a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from fastlm import native

__all__ = ["CSRC", "HERE", "build", "call", "run"]

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
# kernel<<<grid, block, shared, stream>>>(arguments)
LAUNCH = re.compile(r"([\w:]+(?:<[^<>;()]*>)?)<<<(.*?)>>>\(", re.DOTALL)


def run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end and keeps its output."""
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})


def build(folder: Path, cxx: str) -> ModuleType:
    """Compiles into `folder` and imports the module `_cuda`, whose functions take addresses of CPU memory."""
    import pybind11

    sources = [CSRC / "init.cpp", CSRC / "module.cpp"]
    for path in sorted((CSRC / "cuda").iterdir()):
        text = LAUNCH.sub(r"emulator::launch(\1, \2, ", path.read_text())
        copy = folder / (path.name if path.suffix == ".cuh" else f"{path.name}.cpp")
        copy.write_text(text)
        if path.suffix == ".cu":
            sources.append(copy)
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [HERE, folder, CSRC, sysconfig.get_paths()["include"], pybind11.get_include()]
    command = [
        *(*shlex.split(cxx), "-O1", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-D__CUDACC__"),
        *("-Wno-unknown-pragmas", "-DFASTLM_MODULE=_cuda", '-DFASTLM_BUILD="emulated"'),
        *(f"-I{path}" for path in includes),
        *(*map(str, sources), "-o", str(target)),
    ]
    done = run(command)
    if done.returncode:
        raise RuntimeError(f"the emulated CUDA kernels failed to compile:\n{done.stderr[-4000:]}")
    spec = importlib.util.spec_from_file_location("_cuda", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(module: ModuleType, name: str, *args: native.Argument) -> object:
    """What `native.call` does for CUDA tensors: workspace, poisoned here, and a stream come last."""
    function: Callable[..., object] = getattr(module, name)
    extra: list[native.Argument] = [0]
    if (workspace := getattr(module, f"{name}_workspace", None)) is not None:
        size = native.call(workspace, *args)
        assert isinstance(size, int)
        extra.insert(0, torch.full((size,), 0xFF, dtype=torch.uint8))
    return native.call(function, *args, *extra)
