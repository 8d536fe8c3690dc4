"""What importing costs and pulls in, in fresh processes; and that rooms import only rooms below them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _run(code: str, **env: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "FASTLM"))} | env
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_pulls_in_neither_triton_nor_the_compiler():
    names = _run(
        "import sys, fastlm, fastlm.ops, fastlm.nn, fastlm.models, fastlm.engine\n"
        "print([n for n in ('triton', 'torch._dynamo', 'torch._inductor', 'transformers', 'tokenizers') if n in sys.modules])"
    )
    assert names == "[]"


def test_import_is_light():
    """`import fastlm` adds under 0.1 s to `import torch`; the fastest of three, since the machine is shared."""
    code = "import torch, time; t = time.perf_counter(); import fastlm; print(time.perf_counter() - t)"
    assert min(float(_run(code)) for _ in range(3)) < 0.1


def test_an_op_serves_where_triton_cannot_be_imported():
    out = _run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastlm\n"
        "y = fastlm.ops.layer_norm(torch.randn(2, 8))\n"
        "print(tuple(y.shape), fastlm.explain(fastlm.ops.layer_norm, torch.randn(2, 8)).split(' (')[0])"
    )
    assert out.startswith("(2, 8) layer_norm: ")


# From top to bottom: a room imports only rooms further down.
ROOMS = [
    "cli",
    "testbed",
    "train",
    "tasks",
    "generate",
    "data",
    "engine",
    "models",
    "nn",
    "distributed",
    "optim",
    "ops",
    "check",
    "registry",
    "samples",
    "backends",
    "native",
]


@pytest.mark.parametrize(
    "path", sorted(p.relative_to(ROOT) for p in (ROOT / "fastlm").rglob("*.py")), ids=str
)
def test_rooms_import_only_rooms_below(path):
    room = path.parts[1].removesuffix(".py")
    if room not in ROOMS:
        pytest.skip(f"{room} is not a room of the way through")
    level = ROOMS.index(room)
    for node in ast.parse(
        (ROOT / path).read_text()
    ).body:  # at import, that is; what a function imports is late on purpose
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parts[:-1][: len(path.parts) - node.level]
            full = [*base, *(node.module or "").split(".")]
            targets = [full[1]] if len(full) > 1 and full[1] else [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastlm."):
            targets = [node.module.split(".")[1]]
        else:
            continue
        for target in targets:
            if target in ROOMS and target != room:
                assert ROOMS.index(target) > level, (
                    f"{path}:{node.lineno} imports {target}, which is above {room}"
                )
