"""`fastlm kernels explain`: what would run for a call, and the least time and memory that it can take.

No kernel runs and, but for the rates of the device that is here, nothing is measured. The floor is the larger of the
op's operations over the chip's peak rate and its bytes over the chip's bandwidth (Op.cost, chips.py): no kernel that
reads its inputs from memory is faster. The memory is that of tensors: results, what is kept for backward, gradients, and what
a launcher asks torch for; scratch of C++ threads and intermediates of the reference are not in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import backends, info, native
from ..registry import Cost, Op
from ..train.config import OptionError
from . import roof
from .bench_report import bytes_text, seconds_text
from .chips import CHIPS
from .launches import Call, Notes, meta_call, record
from .options import ExplainOptions
from .shapes import chosen_ops, dimensions, full_dimensions
from .targets import TARGETS

__all__ = ["explain", "run"]


def run(options: ExplainOptions) -> int:
    """Print the explanation; always 0. OptionError for an op, a dimension or a device that there is not."""
    about = explain(options)
    print(json.dumps(about, indent=1) if options.json else _text(about))
    return 0


def explain(options: ExplainOptions) -> dict[str, Any]:
    """Everything that `run` prints, as plain JSON values."""
    op = chosen_ops([options.op])[0]
    dims = full_dimensions(op, dimensions(op, options.shape, "shape"))
    if options.device != "here" and options.device not in CHIPS:
        raise OptionError("device", options.device, f"here, {', '.join(CHIPS)}")
    dtype = getattr(torch, options.dtype)
    device = _device(options, dtype)
    choices = _choices(op, dims, dtype, device["type"])
    args = op.case(**dims).build(dtype, "meta")
    call = meta_call(op, args)
    notes = _notes(op, call, choices, options.device) if device["type"] == "cuda" else {}
    return {
        "op": op.name, "dims": dims, "dtype": options.dtype, "device": device, "backends": choices,
        "launches": {
            direction: [asdict(launch) for launch in noted.launches] if isinstance(noted, Notes) else noted
            for direction, noted in notes.items()
        },
        "work": _work(op.cost(**args), device),
        "memory": _memory(op, args, call, notes),
    }  # fmt: skip


def _device(options: ExplainOptions, dtype: torch.dtype) -> dict[str, Any]:
    """Name and rates of the chip: measured if it is here."""
    if options.device in CHIPS:
        chip = CHIPS[options.device]
        return {
            "name": chip.name, "type": "cuda", "bytes_per_s": chip.bytes_per_s,
            "flop_per_s": chip.flop_per_s[options.dtype], "rates": f"peak, {chip.source}",
        }  # fmt: skip
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    measured = roof.measure(kind, dtype, seconds=0.5)
    return {
        "name": torch.cuda.get_device_name() if kind == "cuda" else info.chip(), "type": kind,
        "bytes_per_s": measured.bytes_per_s, "flop_per_s": measured.flop_per_s,
        "rates": "measured now: torch's copy and matrix product",
    }  # fmt: skip


def _choices(op: Op, dims: Mapping[str, Any], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """By direction the backend and the reason, and why each of the others does not come first."""
    with FakeTensorMode():  # tensors on a device that need not be here
        call = meta_call(op, _on(op.case(**dims).build(dtype, "meta"), device))
        found: dict[str, dict[str, Any]] = {}
        for direction, args in (("forward", call.arguments), ("backward", call.backward)):
            if not args:
                continue
            choice = backends.choose(op, args, direction)
            others = {
                b: backends.why_not(op, b, args, direction) or "could serve too"
                for b in backends.BACKENDS if b != choice.backend
            }  # fmt: skip
            found[direction] = {"backend": choice.backend, "reason": choice.reason, "others": others}
            if choice.backend == "cpu":
                variant = native.load("cpu").__name__.removeprefix("fastlm._cpu_")
                found[direction] |= {"variant": variant, "threads": torch.get_num_threads()}
    return found


def _on(args: Mapping[str, Any], device: str) -> dict[str, Any]:
    return {
        k: torch.empty(v.shape, dtype=v.dtype, device=device) if isinstance(v, Tensor) else v for k, v in args.items()
    }


def _notes(op: Op, call: Call, choices: Mapping[str, Any], device: str) -> dict[str, Notes | str]:
    """What Triton would launch, in the directions that it serves; or why that cannot be said."""
    served = [d for d, choice in choices.items() if choice["backend"] == "triton"]
    if backends.interpreting():
        return dict.fromkeys(served, "TRITON_INTERPRET=1 is set: launchers choose tiles for the interpreter")
    properties = None
    if device in CHIPS:
        target = TARGETS[CHIPS[device].target]
        properties = {
            "max_shared_mem": target.program_shared, "multiprocessor_count": target.multiprocessors,
            "warpSize": target.warp_size,
        }  # fmt: skip
    noted = record(op, call, properties) if served else {}
    return {d: noted[d] for d in served}


def _work(cost: Cost, device: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By direction: operations, bytes, their quotient, the floor and what sets it."""
    flops = {"forward": cost.forward_flops, "backward": cost.backward_flops}
    moved = {"forward": cost.forward_bytes, "backward": cost.backward_bytes}
    found = {}
    for direction in ("forward", "backward", "both") if flops["backward"] else ("forward",):
        f = sum(flops.values()) if direction == "both" else flops[direction]
        b = sum(moved.values()) if direction == "both" else moved[direction]
        by_flops, by_bytes = f / device["flop_per_s"], b / device["bytes_per_s"]
        found[direction] = {
            "flops": f, "bytes": b, "intensity": f / b, "floor_seconds": max(by_flops, by_bytes),
            "bound": "flops" if by_flops > by_bytes else "bytes",
        }  # fmt: skip
    return found


def _memory(op: Op, args: Mapping[str, Any], call: Call, notes: Mapping[str, Notes | str]) -> dict[str, int]:
    """Bytes by purpose, and the most that a call adds in each direction to what is there before it."""

    def size(*tensors: object) -> int:
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor))

    def workspace(direction: str) -> int:
        noted = notes.get(direction)
        return noted.workspace if isinstance(noted, Notes) else 0

    results, statistics = call.results[: op.results], call.results[op.results :]
    sizes = {
        "inputs": size(*args.values()), "outputs": size(*results), "statistics": size(*statistics),
        "workspace_forward": workspace("forward"),
    }  # fmt: skip
    kept = sizes["outputs"] + sizes["statistics"]
    sizes["forward"] = kept + sizes["workspace_forward"]
    if call.backward:
        given = dict(zip((n for n, _, _ in op.arguments), call.arguments, strict=True))
        pairs = [(g, given[n]) for n, g in zip(op.grads, call.gradients, strict=True) if g is not None]
        sizes["gradients"] = size(*call.gradients)
        # Autograd wants a gradient in its parameter's dtype: a copy of the float32 sums.
        sizes["gradient_copies"] = sum(g.numel() * x.element_size() for g, x in pairs if g.dtype != x.dtype)
        sizes["workspace_backward"] = workspace("backward")
        sizes["backward"] = sizes["gradients"] + max(sizes["gradient_copies"], sizes["workspace_backward"])
        sizes["both"] = max(sizes["forward"], kept + sizes["backward"])
    return sizes


# --- text


def _text(about: Mapping[str, Any]) -> str:
    device, memory = about["device"], about["memory"]
    dims = " ".join(f"{k}={v}" for k, v in about["dims"].items())
    rates = f"{device['bytes_per_s'] / 1e9:.4g} GB/s, {device['flop_per_s'] / 1e12:.4g} TFLOP/s"
    lines = [f"{about['op']} {dims} {about['dtype']} on {device['name']}", f"{'rates':10}{rates} ({device['rates']})"]
    for direction, choice in about["backends"].items():
        where = f", {choice['variant']}, {choice['threads']} threads" if "variant" in choice else ""
        lines += ["", f"{direction:10}{choice['backend']}{where}: {choice['reason']}"]
        lines += [f"{'':10}  not {name}: {why}" for name, why in choice["others"].items() if why != "could serve too"]
        launches = about["launches"].get(direction, [])
        lines += [f"{'':10}{launches}"] if isinstance(launches, str) else [f"{'':10}{_launch(x)}" for x in launches]
        lines.append(f"{'':10}{_floor(about['work'][direction])}")
    if "both" in about["work"]:
        lines += ["", f"{'both':10}{_floor(about['work']['both'])}"]
    lines += ["", f"{'memory':10}inputs {bytes_text(memory['inputs'])}; a call adds at most"]
    lines.append(
        f"{'':10}forward  {bytes_text(memory['forward'])}: outputs {bytes_text(memory['outputs'])}, statistics "
        f"{bytes_text(memory['statistics'])}, workspace {bytes_text(memory['workspace_forward'])}"
    )
    if "backward" in memory:
        lines.append(
            f"{'':10}backward {bytes_text(memory['backward'])}: gradients {bytes_text(memory['gradients'])}, copies in "
            f"the parameters' dtype {bytes_text(memory['gradient_copies'])}, "
            f"workspace {bytes_text(memory['workspace_backward'])}"
        )
        lines.append(f"{'':10}both     {bytes_text(memory['both'])}")
    return "\n".join(lines)


def _floor(work: Mapping[str, Any]) -> str:
    return (
        f"floor {seconds_text(work['floor_seconds'])}, by {work['bound']}: {work['flops'] / 1e9:.4g} GFLOP, "
        f"{work['bytes'] / 1e6:.4g} MB, {work['intensity']:.4g} FLOP a byte"
    )


def _launch(launch: Mapping[str, Any]) -> str:
    how = "".join(f", {launch[k]} {k}" for k in ("warps", "stages") if launch[k] is not None)
    constants = " ".join(f"{k}={v}" for k, v in launch["constants"].items())
    return f"{launch['kernel']} grid {'x'.join(map(str, launch['grid']))}{how}: {constants}"
