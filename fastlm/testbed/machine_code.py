"""What a compiler made of a kernel, read from its machine code: registers, stack, memory, instructions.

NVIDIA: cuobjdump reports what a cubin uses and nvdisasm lists its instructions; both come with Triton.
AMD: the assembly text says both.
"""

from __future__ import annotations

import math
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["Usage", "read_amdgcn", "read_cubins"]


class Usage(NamedTuple):
    """What one kernel uses. Instructions are counted as they stand in the code, not as often as they run."""

    registers: int  # of a thread
    spill_bytes: int  # of a thread: its stack and local memory; on AMD 4 for each spilled register
    shared_bytes: int  # of a program, without what is asked for at the launch
    threads: int  # of a program at most, by its launch bounds; 0: unknown
    instructions: int
    tensor_core: int  # matrix products by tensor cores (AMD: matrix cores)
    warpgroup: int  # of them, those that no single warp can issue: wgmma on sm_90, tcgen05.mma on sm_100
    local_memory: int  # reads and writes of local memory, where spilled registers go
    wide: int  # accesses to global memory of 16 bytes a thread and more
    narrow: int  # and of fewer


# SASS: HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100, PTX's tcgen05.mma) and their kin of other dtypes.
_SASS = {
    "tensor_core": r"(?:[A-Z]G?|UTC[A-Z]*)MMA\b",
    "warpgroup": r"(?:[A-Z]G|UTC[A-Z]*)MMA\b",
    "local_memory": r"(?:LDL|STL)\b",
    # TMA's bulk copies count as wide; .ENL2.256 are the 32-byte accesses of sm_100
    "wide": r"(?:LDG|STG|LDGSTS)\b\S*\.(?:128|256)\b|(?:UTMALDG|UTMASTG|UBLKCP)\b",
    "narrow": r"(?:LDG|STG|LDGSTS)\b(?!\S*\.(?:128|256)\b)",
}
_AMDGCN = {
    "tensor_core": r"v_s?mfma",
    "warpgroup": r"(?!)",  # there are none
    "local_memory": r"scratch_(?:load|store)",
    "wide": r"(?:global|buffer|flat)_(?:load|store)(?:_lds)?_dwordx4\b",
    "narrow": r"(?:global|buffer|flat)_(?:load|store)_(?!(?:lds_)?dwordx4\b)",
}
_SASS_BYTES = 16  # of one instruction


def read_cubins(cubins: Sequence[bytes], arch: int) -> list[dict[str, Usage]]:
    """Of each cubin for sm_<arch>, its kernels by their name in the linker's spelling."""
    sections = [_sections(cubin) for cubin in cubins]
    # One disassembly for all: nvdisasm takes longer to start than to work.
    code = [text for of_cubin in sections for name, text in of_cubin.items() if name.startswith(".text.")]
    listed = iter(_disassemble(b"".join(code), arch))
    found = []
    for cubin, of_cubin in zip(cubins, sections, strict=True):
        instructions = {
            name.removeprefix(".text."): [next(listed) for _ in range(0, len(text), _SASS_BYTES)]
            for name, text in of_cubin.items()
            if name.startswith(".text.")
        }
        kernels = {}
        for name, text in re.findall(
            r"^ Function (\S+):\n(.*)$", _ask("cuobjdump", "-res-usage", cubin), re.M
        ):
            used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
            reserved = 1024 if arch >= 90 else 0  # by the driver: from sm_90 on the figure holds it
            kernels[name] = Usage(
                used["REG"], used["STACK"] + used["LOCAL"], max(used["SHARED"] - reserved, 0),
                _launch_bounds(of_cubin.get(f".nv.info.{name}", b"")), len(instructions[name]),
                **_count(instructions[name], _SASS),
            )  # fmt: skip
        found.append(kernels)
    return found


def read_amdgcn(assembly: str) -> Usage:
    """The one kernel of AMD assembly as Triton writes it."""
    metadata = {key: int(value) for key, value in re.findall(r"^ +(?:- )?\.(\w+): +(\d+)$", assembly, re.M)}
    instructions = re.findall(r"^\t([a-z]\w+)", assembly, re.M)
    return Usage(
        metadata["vgpr_count"], 4 * (metadata["vgpr_spill_count"] + metadata["sgpr_spill_count"]),
        metadata["group_segment_fixed_size"], metadata["max_flat_workgroup_size"], len(instructions),
        **_count(instructions, _AMDGCN),
    )  # fmt: skip


def _sections(elf: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit ELF file that have contents, by name."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    count, of_names = struct.unpack_from("<HH", elf, 0x3C)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + 64 * i) for i in range(count)]
    names = headers[of_names][4]
    sections = {}
    for name, kind, _, _, offset, size in headers:
        if kind != 8:  # SHT_NOBITS
            start = names + name
            sections[elf[start : elf.index(b"\0", start)].decode()] = elf[offset : offset + size]
    return sections


def _launch_bounds(information: bytes) -> int:
    """The most threads of a program, from a kernel's .nv.info section; 0 if it does not say."""
    return next((math.prod(struct.unpack("<III", v)) for k, v in _attributes(information) if k == 0x05), 0)


def _attributes(information: bytes) -> Iterator[tuple[int, bytes]]:
    """(EIATTR number, value) of those that have a size of their own: format 4, EIFMT_SVAL."""
    at = 0
    while at < len(information):
        form, key, size = struct.unpack_from("<BBH", information, at)
        at += 4
        if form == 4:
            yield key, information[at : at + size]
            at += size


def _disassemble(code: bytes, arch: int) -> list[str]:
    """The instructions of raw machine code, each with its modifiers, without operands."""
    listing = _ask("nvdisasm", f"--binary=SM{arch}{'a' if arch >= 90 else ''}", code) if code else ""
    return re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\S*)", listing, re.M)


def _ask(program: str, option: str, contents: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(contents)
        file.flush()
        command = [getattr(knobs.nvidia, program).path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _count(instructions: Sequence[str], patterns: dict[str, str]) -> dict[str, int]:
    return {key: sum(bool(re.match(p, name)) for name in instructions) for key, p in patterns.items()}
