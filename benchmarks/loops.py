"""`python -m fused_res.benchmarks.loops`: what the inner loops of the kernels with a matrix product issue, from machine code alone.

For every such kernel that ResNet-50's blocks of stages 1 and 2 launch in training, bfloat16, batch 256, and each architecture one
line: instructions of a warp outside of its loops and in each of them, how often a program runs them, and

- bound: cycles that the tensor cores need, over the larger of these and the issue slots of the loops. 1: they can be kept busy.
- issue_over_memory: issue slots of the whole kernel over the time that its bytes take at the published bandwidth.
- blocks: of the kernel, resident on a multiprocessor, by registers, shared memory and warps.
"""

import argparse
import csv
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from fused_res import aot
from fused_res.benchmarks.cases import SUITES, Case
from fused_res.console import table
from fused_res.cost.constants import GPUS, Gpu
from fused_res.cost.counted import count, disassembled
from fused_res.cost.recorded import Step, launches, of_launch

BATCH = 256
ARCHS = {80: "A100", 90: "H100", 100: "B200", 120: "RTX 5090"}
"""By compute capability the GPU whose peaks the times are of."""
_LEVELS = ("epilogue", "prologue", "moment")
_REGISTERS, _SHARED = 65536, {80: 164, 90: 228, 100: 228, 120: 100}  # of a multiprocessor; KiB
_WARPS = {80: 64, 90: 64, 100: 64, 120: 48}


@dataclass(frozen=True)
class Line:
    """A kernel as compiled for one architecture; lists are of its loops."""

    kernel: str
    at: str
    tile: str
    arch: int
    warps: int
    registers: int
    shared_kib: float
    blocks: int
    programs: int
    rest: int
    bodies: str
    trips: str
    bound: float
    issue_us: float
    memory_us: float
    issue_over_memory: float
    per_result: float
    per_mac: float


def _resident(arch: int, warps: int, registers: int, shared: int) -> int:
    """Blocks on a multiprocessor: registers come in eights for each of 32 threads, shared memory with 1 KiB for the system."""
    by_registers = _REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, _SHARED[arch] * 1024 // (shared + 1024), _WARPS[arch] // warps)


def _line(launch: object, at: str, arch: int, gpu: Gpu) -> Line:
    step, compiled = of_launch(launch), aot.compile_launch(launch, arch)
    used, found = aot.usage(compiled.asm["cubin"]), count(launch, disassembled(aot.disassemble(compiled.asm["cubin"])))
    slots = found.programs * launch.warps * found.program
    looped = found.programs * launch.warps * (found.program - found.rest)
    issue, memory = slots / gpu.slots, step.bytes / gpu.bandwidth
    tile = "x".join(str(launch.constants[name]) for name in ("BLOCK_P", "BLOCK_C", "BLOCK_K") if name in launch.constants)
    return Line(
        kernel=step.kind,
        at=at,
        tile=tile,
        arch=arch,
        warps=launch.warps,
        registers=used["REG"],
        shared_kib=round(compiled.metadata.shared / 1024, 3),
        blocks=_resident(arch, launch.warps, used["REG"], compiled.metadata.shared),
        programs=launch.programs,
        rest=found.rest,
        bodies=" ".join(map(str, found.bodies)),
        trips=" ".join(map(str, found.trips)),
        bound=round(min(1.0, 4 * step.macs / gpu.macs / looped), 3),
        issue_us=round(1e6 * issue, 1),
        memory_us=round(1e6 * memory, 1),
        issue_over_memory=round(issue / memory, 2),
        per_result=round(found.programs * launch.warps * found.rest / step.results, 4),
        per_mac=round(looped / step.macs, 7),
    )


def lines(cases: Sequence[Case], archs: Collection[int], only: Collection[str] = ()) -> Iterator[Line]:
    """Each kernel once: those that differ in nothing that is compiled or counted are launched by several levels and blocks."""
    for arch in archs:
        seen: set[tuple] = set()
        for case in cases:
            for level in _LEVELS:
                for launch in launches(case.geometry(BATCH), level, torch.bfloat16, arch):
                    if isinstance(launch, Step) or not of_launch(launch).macs:
                        continue
                    step = of_launch(launch)
                    key = step, launch.programs, tuple(launch.constants.items())
                    if key in seen or (only and step.kind.split()[0] not in only):
                        continue
                    seen.add(key)
                    yield _line(launch, f"{case.name} {level}", arch, GPUS[ARCHS[arch]])


def read(path: Path) -> list[Line]:
    with path.open(newline="") as file:
        types = {
            field.name: {"int": int, "float": float, "str": str}[str(getattr(field.type, "__name__", field.type))]
            for field in fields(Line)
        }
        return [Line(**{name: types[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def write(path: Path, found: Sequence[Line]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Line)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, found))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_res.benchmarks.loops", description=__doc__)
    parser.add_argument("--stages", nargs="+", default=["1", "2"], choices=["1", "2", "3", "4"], help="of ResNet-50")
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--only", nargs="+", default=[], metavar="KERNEL", help="such as pointwise_tail")
    parser.add_argument(
        "--update", type=Path, metavar="FILE", help="write the lines into this file, in place of those of these architectures"
    )
    options = parser.parse_args(arguments)
    import triton

    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET: expected unset, the interpreter cannot compile")
    cases = [case for case in SUITES["resnet50"] if case.name.split(".")[1] in options.stages]
    found = []
    shown = [field.name for field in fields(Line)]
    for line in lines(cases, options.arch, options.only):
        found.append(line)
        print(
            line.arch,
            line.kernel,
            line.at,
            f"bound {line.bound}, issue over memory {line.issue_over_memory}",
            file=sys.stderr,
            flush=True,
        )
    print(table(shown, [[str(getattr(line, name)) for name in shown] for line in found]))
    if options.update:
        kept = read(options.update) if options.update.is_file() else []
        names = set(options.only)
        stays = [line for line in kept if line.arch not in options.arch or (names and line.kernel.split()[0] not in names)]
        write(options.update, sorted([*stays, *found], key=lambda line: line.arch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
