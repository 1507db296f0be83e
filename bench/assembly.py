"""What the assembler's output says of a compiled kernel: registers, spills, widths of accesses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton


@dataclass(frozen=True)
class Code:
    """What the assembler's output says. Wide = 16 bytes; an access counts once, however often it runs."""

    threads: int
    registers: int
    shared: int
    spills: int  # bytes of stack and local memory, spilled registers
    parked: (
        int  # scalar registers that gfx942 keeps in lanes of a vector register: no spills, as that touches no memory
    )
    wide_loads: int
    wide_stores: int
    narrow_bytes: int  # bytes of all other accesses of one thread


def read_cuda(built: Any, threads: int) -> Code:
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [binaries / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [binaries / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    # Widths from the PTX: ptxas keeps them, and unrolls loops, in which an access would count more than once.
    accesses = re.findall(r"\b(ld|st)\.global(?:\.[a-zA-Z_:0-9]+?)*?(?:\.v(\d))?\.[busf](\d+)\s", built.asm["ptx"])
    widest = {("ld", "LDG"): 0, ("st", "STG"): 0}
    for kind, name in widest:
        widest[kind, name] = len(re.findall(rf"\b{name}\.E\.(?:\w+\.)*128\b", sass))
    loads, stores, narrow = 0, 0, 0
    for kind, lanes, bits in accesses:
        size = int(lanes or 1) * int(bits) // 8
        if size == 16:
            loads, stores = loads + (kind == "ld"), stores + (kind == "st")
        else:
            narrow += size
    if (loads and not widest["ld", "LDG"]) or (stores and not widest["st", "STG"]):
        loads = stores = 0  # ptxas split them
    return Code(
        threads,
        registers=numbers["REG"],
        shared=built.metadata.shared,
        spills=numbers["STACK"] + numbers["LOCAL"] + local,
        parked=0,
        wide_loads=loads,
        wide_stores=stores,
        narrow_bytes=narrow,
    )


def read_hip(built: Any, threads: int) -> Code:
    text = built.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", text)[-1])

    # Widths from LLVM's IR, as the assembler also joins neighbouring scalars; it must then hold at least as many 16-byte accesses.
    sizes = {"double": 8, "float": 4, "i64": 8, "i32": 4, "half": 2, "bfloat": 2, "i16": 2}
    loads, stores, narrow = 0, 0, 0
    pattern = r"\b(load|store) (?:volatile )?(?:<(\d+) x )?(\w+)>?[^,\n]*, ptr addrspace\(1\)"
    for kind, lanes, unit in re.findall(pattern, built.asm["llir"]):
        size = int(lanes or 1) * sizes[unit]
        if size == 16:
            loads, stores = loads + (kind == "load"), stores + (kind == "store")
        else:
            narrow += size
    for kind, found in (("load", loads), ("store", stores)):
        assert len(re.findall(rf"\b(?:global|flat|buffer)_{kind}_dwordx4\b", text)) >= found, "LLVM split a wide access"
    return Code(
        threads,
        registers=number("vgpr_count"),
        shared=built.metadata.shared,
        spills=number("vgpr_spill_count") + number("private_segment_fixed_size"),
        parked=number("sgpr_spill_count"),
        wide_loads=loads,
        wide_stores=stores,
        narrow_bytes=narrow,
    )
