"""Machine code of the guided step for GPUs that are not here: registers, spills, widths of accesses, bytes per sample.

    python -m bench.machine_code            # writes bench/MACHINE_CODE.md
    python -m bench.machine_code --all      # every configuration that the launcher can choose (8,640 compilations: hours of one core)

Triton compiles for a named target without the device; ptxas, cuobjdump and LLVM's AMD backend ship inside it. What this cannot
show is time: that takes a GPU (`python -m bench.gpu`).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.assembly import Code, read_cuda, read_hip
from fastguard.kernels import triton_step as kernels
from fastguard.kernels.layout import Row, Rule, State

FILE = Path(__file__).with_name("MACHINE_CODE.md")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SIZES = {"one launch": 4 * 64 * 64, "two launches": 4 * 128 * 128}
WIDTH = {"fp16": 2, "bf16": 2, "fp32": 4, "i64": 8}
SLOTS = 3  # what is counted: all history is read, and both halves of the model input are written


@dataclass(frozen=True)
class Configuration:
    """What makes Triton compile another kernel: types of pointers, which of them are None, and the launch heuristic.

    `aligned`: all sizes divide by 16 (UNIT = 16); otherwise accesses are as narrow as one element.
    """

    kernel: str  # "norm" | "step"
    launches: str  # key of SIZES
    model: str = "fp16"
    both: bool = True
    noise: str | None = None
    model_input: bool = True
    timestep: str | None = "fp32"
    combined: str | None = None
    anchored: bool = False
    aligned: bool = True

    def source(self) -> ASTSource:
        single = self.launches == "one launch"
        pointers = {
            "u_ptr": self.model,
            "c_ptr": self.model if self.both else None,
            "combined_ptr": self.combined,
            "anchor_ptr": "fp32" if self.anchored else None,
            "shares_ptr": "fp32" if self.anchored else None,
            "x_ptr": "fp32",
            "history_ptr": "fp32",
            "model_input_ptr": self.model if self.model_input else None,
            "trace_ptr": "fp32",
            "state_ptr": "fp64",
            "rows_ptr": "fp64",
            "rules_ptr": "fp64",
            "guidance_ptr": "fp32",
            "noise_ptr": self.noise,
            "timestep_ptr": self.timestep,
            "snapshot_ptr": None if single else "fp64",
            "partials_ptr": None if single else "fp32",
        }
        block, _, _ = kernels.launch_shape(SIZES[self.launches], self.aligned)
        values: dict[str, Any] = {
            "UNIT": 16 if self.aligned else 1,
            "BLOCK": block,
            "PARTIALS": kernels.PARTIALS,
        }
        function = kernels._norm_kernel if self.kernel == "norm" else kernels._step_kernel
        signature, constants, attributes = {}, {}, {}
        for index, name in enumerate(function.arg_names):
            if name in pointers and pointers[name] is not None:
                signature[name] = f"*{pointers[name]}"
                attributes[(index,)] = [["tt.divisibility", 16]]  # torch aligns what it allocates
            elif name in pointers or name in values:
                signature[name] = "constexpr"
                constants[(index,)] = values.get(name)
            else:
                signature[name] = "i32"
        return ASTSource(function, signature, constants, attributes)

    def compile(self, target: str, **options: int) -> Code:
        gpu = TARGETS[target]
        hip = gpu.backend == "hip"
        _, _, chosen = kernels.launch_shape(SIZES[self.launches], self.aligned, hip)
        built = triton.compile(self.source(), target=gpu, options={**chosen, **options})
        threads = built.metadata.num_warps * gpu.warp_size
        return (read_hip if hip else read_cuda)(built, threads)

    def tile_bytes(self) -> dict[str, int]:
        """Bytes of latents that the kernel's text reads and writes per element, each access counted once."""
        w, both = WIDTH[self.model], int(self.both)
        own = WIDTH[self.combined] if self.combined else 0
        norm = 2 * w * both
        held = self.anchored and self.both
        norm += held * (4 + 8 + own)  # x, m, mu, beside u and c
        if self.kernel == "norm":
            return {"loads": norm, "stores": 0}
        loads = w + w * both + 4 + 4 * SLOTS + (WIDTH[self.noise] if self.noise else 0)
        loads += WIDTH[self.combined] if self.combined else 0
        loads += norm if self.launches == "one launch" else 0
        loads += 4 * held  # m
        return {"loads": loads, "stores": 8 + 8 * held + (2 * w if self.model_input else 0)}

    def paper_bytes(self) -> int:
        """Bytes of latents that one sample's step must move through this kernel."""
        return SIZES[self.launches] * sum(self.tile_bytes().values())

    def counted_bytes(self, code: Code) -> int:
        """The same from the accesses in the machine code, with the scalars (state, rules, row, partial sums)."""
        block, programs, _ = kernels.launch_shape(SIZES[self.launches], self.aligned)
        wide = SIZES[self.launches] // block * 16 * code.threads * (code.wide_loads + code.wide_stores)
        return wide + programs * code.narrow_bytes

    def faults(self, code: Code) -> list[str]:
        """Why this code must not ship."""
        found = []
        if code.spills:
            found.append(f"{code.spills} spilled")
        if self.aligned:
            block, _, _ = kernels.launch_shape(SIZES[self.launches])
            tile = self.tile_bytes()
            for name, have in (("loads", code.wide_loads), ("stores", code.wide_stores)):
                want = block * tile[name] / (16 * code.threads)
                if have != want:
                    found.append(f"{have} 16-byte {name} instead of {want:g}")
            counted, paper = self.counted_bytes(code), self.paper_bytes()
            if paper and not 0.95 * paper <= counted <= 1.05 * paper:
                found.append(f"{counted} bytes a sample, {paper} on paper")
        return found


def configurations() -> Iterator[Configuration]:
    """Every one that the launcher can choose."""
    models = ("fp16", "bf16", "fp32")
    for model, both, aligned in itertools.product(models, (True, False), (True, False)):
        yield Configuration("norm", "two launches", model, both, aligned=aligned)
        for combined in (None, "fp32", model):
            yield Configuration("norm", "two launches", model, both, combined=combined, anchored=True, aligned=aligned)
        narrow = (None, *sorted({"fp32", model}))
        for launches, noise, model_input, timestep, combined, anchored in itertools.product(
            SIZES, narrow, (True, False), (None, "fp32", "i64"), narrow, (False, True)
        ):
            yield Configuration(
                "step", launches, model, both, noise, model_input, timestep, combined, anchored, aligned
            )


def typical() -> list[Configuration]:
    """Those that pipelines run: everything is there; with noise, without, and with one branch."""
    chosen = []
    for model in ("fp16", "bf16", "fp32"):
        chosen += [Configuration("norm", "two launches", model, anchored=anchored) for anchored in (False, True)]
        for launches in SIZES:
            chosen += [
                Configuration("step", launches, model),
                Configuration("step", launches, model, noise="fp32"),
                Configuration("step", launches, model, both=False),
                Configuration("step", launches, model, anchored=True),
            ]
    return chosen


def markdown(chosen: list[Configuration]) -> str:
    """The table. RuntimeError if any configuration has a fault."""
    lines = [
        "# Machine code of the guided step",
        "",
        f"Written by `python -m bench.machine_code`, Triton {triton.__version__}. Compiled without a GPU.",
        "",
        "Bytes are per sample and launch, at 4x64x64 (one launch) and 4x128x128 (two launches), two halves of the model input and",
        f"{SLOTS} history slots; *counted* = from the accesses in the machine code, with state ({8 * len(State)} bytes), rules "
        f"({8 * len(Rule)}) and rows ({8 * len(Row)});",
        "*paper* = latents alone. Spills: none (stack, local memory, vector registers). Scalar registers that gfx942 keeps in lanes of a vector register (*parked*) are shown and",
        "not counted as spills, as they touch no memory. Every access to latents is 16 bytes wide where the latent's size divides by 16, else as narrow as one element.",
        "",
        "| target | kernel | launches | model dtype | noise | branches | anchored | registers | parked | shared bytes | 16-byte loads | 16-byte stores | counted bytes | paper bytes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for target, configuration in tqdm(list(itertools.product(TARGETS, chosen)), desc="compile"):
        code = configuration.compile(target)
        if faults := configuration.faults(code):
            raise RuntimeError(f"{target}, {configuration}: {'; '.join(faults)}")
        if not configuration.aligned:
            continue
        cells = [
            target,
            configuration.kernel,
            configuration.launches,
            configuration.model,
            configuration.noise or "none",
            "both" if configuration.both else "one",
            "yes" if configuration.anchored else "",
            code.registers,
            code.parked,
            code.shared,
            code.wide_loads,
            code.wide_stores,
            f"{configuration.counted_bytes(code):,}",
            f"{configuration.paper_bytes():,}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.machine_code", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--all", action="store_true", help="check every configuration; the table keeps the typical ones"
    )
    arguments = parser.parse_args()
    if arguments.all:
        markdown(list(configurations()))
    table = markdown(typical())
    FILE.write_text(table, encoding="utf-8")
    print(f"{FILE}: {len(TARGETS) * len(typical())} rows, no faults")


if __name__ == "__main__":
    main()
