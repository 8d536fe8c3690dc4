"""What every kernel file needs: whether it is interpreted, and how many programs fill a device."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

__all__ = ["INTERPRETING", "device_programs", "meta", "tanh"]

# Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot: kernels upcast the operands under this flag.
INTERPRETING = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def tanh(b_u):
    """Within a few ulp: a minimax polynomial near 0, where 1 - 2 / (exp(2u) + 1) cancels."""
    b_z = b_u * b_u
    b_p = -0.00571704516 * b_z + 0.020650588
    b_p = b_p * b_z - 0.0537434965
    b_p = b_p * b_z + 0.133314908
    b_p = b_p * b_z - 0.333332837
    b_small = b_u + b_u * b_z * b_p
    b_large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(b_u)) + 1.0)
    return tl.where(tl.abs(b_u) < 0.625, b_small, tl.where(b_u < 0, -b_large, b_large))


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
