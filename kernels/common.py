"""What every kernel file needs: whether it is interpreted, and how many programs fill a device."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

__all__ = ["INTERPRETING", "device_programs", "meta"]

# Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot: kernels upcast the operands under this flag.
INTERPRETING = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


def device_programs(device: torch.device, per_multiprocessor: int = 4) -> int:
    """Programs that fill the device; a small fixed number in the interpreter, so that a program gets several rows."""
    if device.type == "meta":  # compiled for a GPU that is not here
        properties = triton.runtime.driver.active.utils.get_device_properties(0)
        return per_multiprocessor * int(properties["multiprocessor_count"])
    if device.type != "cuda":
        return 3
    return per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without memory, for the `compile_cases()` of a kernel file (fastlm/testbed/gpu_code.py)."""
    return torch.empty(shape, dtype=dtype, device="meta")
