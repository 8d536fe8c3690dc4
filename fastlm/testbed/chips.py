"""Peak rates of GPUs, as their makers state them: what no kernel can pass.

Dense rates, without the factor of two for structured sparsity that data sheets like to print first. Operations a second
are those of matrix units, in float32 those of the ordinary ones: matrix units take float32 only rounded to TF32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CHIPS", "Chip"]


@dataclass(frozen=True)
class Chip:
    """A GPU: its name, what it is compiled for, peak rates, and who says so."""

    name: str
    target: str  # of `fastlm kernels compile`
    bytes_per_s: float
    flop_per_s: Mapping[str, float]  # by dtype
    source: str


def _chip(name: str, target: str, tb_per_s: float, half: float, tf32: float, float32: float, source: str) -> Chip:
    rates = {"bfloat16": half, "float16": half, "tfloat32": tf32, "float32": float32}
    return Chip(name, target, tb_per_s * 1e12, {k: v * 1e12 for k, v in rates.items()}, source)


# TB/s; TFLOP/s of bfloat16 and float16, of TF32, of float32
CHIPS = {
    "a100": _chip("NVIDIA A100 SXM 80 GB", "sm_80", 2.039, 312, 156, 19.5,
                  "NVIDIA A100 Tensor Core GPU data sheet (2021)"),
    "h100": _chip("NVIDIA H100 SXM", "sm_90", 3.35, 989.4, 494.7, 66.9,
                  "NVIDIA H100 Tensor Core GPU Architecture white paper, table 2; bandwidth: H100 data sheet"),
    "h200": _chip("NVIDIA H200 SXM", "sm_90", 4.8, 989.4, 494.7, 66.9, "NVIDIA H200 Tensor Core GPU data sheet (2024)"),
    "b200": _chip("NVIDIA B200 (HGX, 1000 W)", "sm_100", 7.7, 2250, 1100, 75,
                  "NVIDIA Blackwell data sheet (2025), HGX B200; half of the sparse rates"),
    "mi300x": _chip("AMD Instinct MI300X", "gfx942", 5.3, 1307.4, 653.7, 163.4,
                    "AMD Instinct MI300X Accelerator data sheet (2023)"),
}  # fmt: skip
