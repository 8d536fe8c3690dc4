"""The GPUs that kernels are compiled for: what a launcher asks of them, and how many warps one keeps resident.

Occupancy is arithmetic. A multiprocessor takes whole programs (blocks, workgroups) as long as it has for each of them

    registers       of a quarter of the register file for each warp, in units
    shared memory   in units, with what the driver keeps for itself
    warp slots, program slots, and on sm_100 columns of tensor memory

and the scarcest of these is the bound. Sources: for NVIDIA `cuda_occupancy.h` of the CUDA toolkit and the table
"Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide; for AMD the functions
getMaxWavesPerEU, getVGPRAllocGranule and getMaxWorkGroupsPerCU of LLVM's AMDGPUBaseInfo.cpp for gfx942, and the
"AMD Instinct MI300" CDNA3 instruction set guide (512 vector registers a lane and SIMD unit, 64 KiB of LDS).
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["TARGETS", "Occupancy", "Target", "occupancy"]


class Target(NamedTuple):
    """A GPU to compile for; sizes in bytes."""

    chip: str
    backend: str  # as Triton calls it
    arch: int | str
    warp_size: int
    multiprocessors: int
    program_shared: int  # most shared memory of one program
    shared: int  # of a multiprocessor
    shared_unit: int
    shared_reserved: int  # of each program, by the driver
    registers: int  # 32-bit, of one lane's quarter of the register file
    register_unit: int  # of a lane
    warps: int  # resident at most
    programs: int  # resident at most


_K = 1 << 10
# A lane's share of a quarter: NVIDIA 16384 registers / 32 lanes, given out 256 a warp, which is 8 a lane.
TARGETS = {
    "sm_80": Target("A100", "cuda", 80, 32, 108, 163 * _K, 164 * _K, 128, 1 * _K, 512, 8, 64, 32),
    "sm_90": Target("H100", "cuda", 90, 32, 132, 227 * _K, 228 * _K, 128, 1 * _K, 512, 8, 64, 32),
    "sm_100": Target("B200", "cuda", 100, 32, 148, 227 * _K, 228 * _K, 128, 1 * _K, 512, 8, 64, 32),
    "gfx942": Target("MI300X", "hip", "gfx942", 64, 304, 64 * _K, 64 * _K, 512, 0, 512, 8, 32, 16),
}
_TENSOR_COLUMNS = 512  # of tensor memory on a multiprocessor of sm_100 (PTX ISA, "Tensor Memory")


class Occupancy(NamedTuple):
    """How many warps a multiprocessor keeps resident at most, and what forbids more."""

    warps: int
    bound: str  # "registers", "shared", "warps", "programs" or "tensor memory"


def occupancy(target: Target, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> Occupancy:
    """The bound for programs of so many warps, registers a lane and bytes of shared memory."""
    room = {"warps": target.warps // warps}
    if registers:
        of_a_warp = -(-registers // target.register_unit) * target.register_unit
        room["registers"] = 4 * (target.registers // of_a_warp) // warps
    of_a_program = -(-(shared + target.shared_reserved) // target.shared_unit) * target.shared_unit
    if of_a_program:
        room["shared"] = target.shared // of_a_program
    if warps > 1 or target.backend == "cuda":  # an AMD workgroup of one wave needs no barrier, and so no slot
        room["programs"] = target.programs
    if tensor_columns:
        room["tensor memory"] = _TENSOR_COLUMNS // tensor_columns
    bound = min(room, key=room.__getitem__)
    return Occupancy(room[bound] * warps, bound)
