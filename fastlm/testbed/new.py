"""`fastlm kernels new`: the files of a new op, to be filled in. Its tests are there at once, and fail until it is right."""

from __future__ import annotations

import keyword
import re
from string import Template

from ..train.config import OptionError
from .options import NewOptions

__all__ = ["run"]


def run(options: NewOptions) -> int:
    """The command: writes every file or none. Status 0."""
    name, root = options.op, options.root
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise OptionError("op", name, "a Python identifier in lower case")
    if not (root / "fastlm" / "ops").is_dir():
        raise OptionError("root", root, "the source tree of fastlm, which holds fastlm/ops")
    files = {root / _ROOMS[room][0].format(name): _ROOMS[room][1] for room in ("ops", *options.rooms)}
    for path in files:
        if path.exists():
            raise OptionError("op", name, f"a name whose files are not there yet; {path} is")
    for path, template in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(template).substitute(op=name, title=name.replace("_", " ")))
        print(f"wrote {path}")
    print(
        f"fill them in until they pass: fastlm kernels check {name}   and   pytest tests/test_ops.py -k {name}"
    )
    return 0


_OP = '''\
"""$title: what it computes, in a sentence.

    y = the formula

Gradients: the derivation of each, step by step.
    dx = ...

Saved: which inputs and results backward reads, in which dtype.

Edge cases
 1  rows, the size not a power of two
 2  no elements

Source: the paper, and the equation in it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import check_floating
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Normal, Pick, Sample, Values

__all__ = ["$op"]


def forward(x: Tensor) -> tuple[Tensor]:
    """x (..., N) -> y like x. Plain differentiable PyTorch, float32 inside (float64 for float64)."""
    raise NotImplementedError("$op: write forward in fastlm/ops/$op.py")


def backward(dy: Tensor, x: Tensor, needs: tuple[bool]) -> tuple[Tensor | None]:
    """dy (..., N) -> dx like x. By hand, without autograd."""
    raise NotImplementedError("$op: write backward in fastlm/ops/$op.py")


def outputs(x: Tensor) -> tuple[Spec]:
    """y."""
    return (Spec(tuple(x.shape), x.dtype),)


def gradients(dy: Tensor, x: Tensor, needs: Any) -> tuple[Spec]:
    """dx."""
    return (Spec(tuple(x.shape), x.dtype),)


def cost(x: Tensor) -> Cost:
    """The operations counted, and the fewest bytes that must move."""
    raise NotImplementedError("$op: write cost in fastlm/ops/$op.py")


def peer(x: Tensor) -> Tensor:
    """What a PyTorch user writes today; right in float64, independent of forward."""
    raise NotImplementedError("$op: write peer in fastlm/ops/$op.py")


samples = (
    Sample("1 rows", x=Normal((5, 37))),
    Sample("2 no elements", x=Normal((0, 16))),
)

errors = (Bad("x integer", TypeError, r"x: .*int64.*floating", x=Values([1, 2])),)


def random(pick: Pick) -> Sample:
    """Any number of dimensions."""
    return Sample("random", x=Normal(tuple(pick.integer(0, 40) for _ in range(pick.integer(1, 3)))))


def case(rows: int = 2048, columns: int = 768) -> Sample:
    """Activations (rows, columns)."""
    return Sample("case", x=Normal((rows, columns)))


shapes = {
    "default": ({"rows": 2048, "columns": 768},),
    "sweep": tuple({"rows": 2**22 // n, "columns": n} for n in (256, 1024, 4096, 16384)),
    "large": ({"rows": 2**17, "columns": 1024},),
}


op = register(
    Op(
        name="$op",
        schema="(Tensor x) -> (Tensor y)",
        forward=forward,
        backward=backward,
        outputs=outputs,
        gradients=gradients,
        cost=cost,
        peer=peer,
        samples=samples,
        errors=errors,
        random=random,
        case=case,
        shapes=shapes,
        grads=("x",),
        saved=("x",),
    )
)


def $op(x: Tensor, *, tape: Any = None) -> Tensor:
    """What it computes.

    Args:
        x: (..., N), floating-point.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        y, of x's shape and dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: the paper.
    """
    check_floating("x", x)
    y: Tensor = op(x, tape=tape)[0]
    return y
'''

_KERNEL = '''\
"""$title in Triton: how the work is split, what stays in registers, what is read and written once."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward", "forward"]


@triton.jit
def _fwd_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    b_x = tl.load(x + i, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    tl.store(y + i, b_x.to(y.dtype.element_ty), mask=m)


def forward(x, y):
    raise NotImplementedError("$op: write forward in kernels/$op.py")


def backward(dy, x, dx):
    raise NotImplementedError("$op: write backward in kernels/$op.py")
'''

_CPU = """\
// $title: what it computes, and its gradient.
#include "rows.h"

namespace fastlm {

// x (...) float32 or bfloat16, contiguous; y like x.
void ${op}_forward(Tensor x, Tensor y) { require(false, "$op: write csrc/cpu/$op.cpp"); }
FASTLM_EXPORT(${op}_forward);

// dy, x (...) contiguous, of one dtype; dx like x, not computed if it is None.
void ${op}_backward(Tensor dy, Tensor x, Tensor dx) { require(false, "$op: write csrc/cpu/$op.cpp"); }
FASTLM_EXPORT(${op}_backward);

}  // namespace fastlm
"""

_ROOMS = {
    "ops": ("fastlm/ops/{}.py", _OP),
    "kernels": ("kernels/{}.py", _KERNEL),
    "cpu": ("csrc/cpu/{}.cpp", _CPU),
}
