"""`python -m fused_res.benchmarks.native_kernels`: what nvcc makes of the CUDA C++ kernels of 1x1 convolutions and the moment form.

One line for each kernel, number format and architecture: registers of a thread, shared memory of a block, bytes of local memory of
a thread, and how many blocks and warps fit a multiprocessor. For those that multiply also the issue slots of the whole kernel for
the 1x1 convolutions of ResNet-50's stages 1 and 2 at batch 256, counted in its machine code with both branches of every condition,
over the time that its bytes take at the GPU's published bandwidth. It needs a source checkout, nvcc, and nvdisasm, which comes with
Triton.

`--update docs/native.md` writes all lines into docs/native.csv, and the page's table anew.
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fused_res.aot import disassemble
from fused_res.benchmarks.loops import ARCHS as MEASURED
from fused_res.benchmarks.native_work import STAGES, Layer, work
from fused_res.console import table
from fused_res.cost.constants import GPUS
from fused_res.cost.counted import disassembled, skipped, spans

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
ARCHS = (80, 86, 90, 100, 120)
FORMATS = {"float32": 4, "float16": 2, "bfloat16": 2}
"""By the ending of a source file's name, bytes of an element."""
_THREADS = 256  # of a block of the kernels without a tile
_REGISTERS = 65536  # of a multiprocessor
_SHARED = {80: 164, 86: 100, 90: 228, 100: 228, 120: 100}  # KiB, of which a block takes one for the system
_WARPS = {80: 64, 86: 48, 90: 64, 100: 64, 120: 48}
_FILES = ("pointwise", "moments", "pointwise_tail_backward")
"""Sources that are compiled one format a file."""
_ANY = "any"
"""The format of kernels that are compiled once for all."""
_HEADERS = ("moments", "moments_finalize", "pointwise_tail_backward_reduce", "pointwise_tail_backward_finalize", "move_statistics")
"""Where those are."""


@dataclass(frozen=True)
class Line:
    """A kernel as compiled for one architecture. tile: rows x columns of its result. stage1, stage2: issue slots over memory."""

    kernel: str
    tile: str
    format: str
    arch: int
    threads: int
    registers: int
    shared_kib: float
    local: int
    blocks: int
    warps: int
    stage1: float | None = None
    stage2: float | None = None


def _name(form: str) -> str:
    return "TF32" if form == "float32" else form


def _functions(cubin: bytes) -> dict[str, str]:
    """The text of `nvdisasm` for every kernel of a cubin, by its mangled name."""
    parts = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", disassemble(cubin), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _length(instructions: list[str]) -> int:
    """Less the padding behind a program: a branch to itself, which nothing reaches, and instructions that do nothing."""
    end = len(instructions)
    while end and instructions[end - 1].startswith("NOP"):
        end -= 1
    return end - 1 if end and instructions[end - 1].startswith("BRA") else end


_GIVEN = {("pointwise_tail, projection", (128, 128)): 80}
"""KiB of shared memory that a launch gives, of which the compiler knows nothing: two stages of 16, and 48 for an accumulator."""

_TWICE = ("moments", "pointwise_tail_backward_reduce")
"""Kernels with a second loop, the longer one, for columns that count from a start, and of `moments` for blocks off the diagonal."""


def _ratio(kernel: str, layer: Layer, size: int, tile: tuple[int, int], warps: int, arch: int, sass: str) -> float | None:
    """Issue slots of the whole kernel over the time that its bytes take."""
    found = work(kernel, layer, size, tile)
    if found is None:
        return None
    gpu, code = GPUS[MEASURED[arch]], disassembled(sass)
    bodies, length = spans(code), _length(code.instructions)
    if kernel in _TWICE:
        rare, ordinary = sorted(bodies, key=lambda span: span[0] - span[1])
        bodies, length = [ordinary], length - skipped(code, rare, [ordinary])
    sizes = [b - a for a, b in bodies]
    program = length - sum(sizes) + sum(n * size for n, size in zip(found.steps, sizes, strict=True))
    return round(found.blocks * warps * program / gpu.slots / (found.bytes / gpu.bandwidth), 2)


def _line(report: str, name: str, form: str, arch: int, sass: str) -> Line | None:
    """None for kernels that copy nothing in 16 bytes: what they are for needs no haste."""
    found = re.search(r"\d+([a-z_]+)_kernel(?:\w*?TilingILi(\d+)ELi(\d+)ELi\d+ELi\d+ELi(\d+)EEE((?:Lb[01]E)+))?", name)
    if found is None or (found[2] is None) != (form == _ANY):
        return None
    kernel, tile, warps = found[1], None, _THREADS // 32
    if form != _ANY:
        flags = re.findall(r"Lb([01])", found[5])
        if flags[0] != "1":
            return None
        kernel, tile = found[1] + (", projection" if flags[1:2] == ["1"] else ""), (int(found[2]), int(found[3]))
        warps = int(found[4]) * tile[1] // 64
    registers = int(re.search(r"(\d+) registers", report)[1])
    shared = int((re.search(r"(\d+) bytes smem", report) or (0, 0))[1])
    shared += _GIVEN.get((kernel, tile), 0) * 1024
    local = [int(re.search(rf"(\d+) bytes {what}", report)[1]) for what in ("stack frame", "spill stores", "spill loads")]
    resident = min(
        _REGISTERS // (-(-registers // 8) * 8 * 32 * warps), _SHARED[arch] * 1024 // (shared + 1024), _WARPS[arch] // warps
    )
    ratios: list[float | None] = [None, None]
    if arch in MEASURED and tile is not None:
        ratios = [_ratio(kernel, layer, FORMATS[form], tile, warps, arch, sass) for layer in STAGES]
    return Line(
        kernel=kernel,
        tile="-" if tile is None else f"{tile[0]}x{tile[1]}",
        format=_name(form),
        arch=arch,
        threads=32 * warps,
        registers=registers,
        shared_kib=round(shared / 1024, 1),
        local=sum(local),
        blocks=resident,
        warps=resident * warps,
        stage1=ratios[0],
        stage2=ratios[1],
    )


def _compile(nvcc: str, source: Path, form: str, arch: int, folder: Path) -> Iterator[Line]:
    cubin = folder / f"{source.stem}.{arch}.cubin"
    command = [nvcc, "-cubin", f"-arch=sm_{arch}", source, "-o", cubin]
    command += ["-std=c++17", "-O3", "-Xptxas=-v", "--expt-relaxed-constexpr", f"-I{SOURCES}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    functions = _functions(cubin.read_bytes())
    for report in done.stderr.split("Compiling entry function '")[1:]:
        name = report.split("'")[0]
        line = _line(report, name, form, arch, functions[name])
        if line is not None:
            yield line


def compiled(nvcc: str, form: str, arch: int, folder: Path, files: Sequence[str] = _FILES) -> Iterator[Line]:
    """The lines of the kernels in these files that are compiled for this format, or of those that are for none."""
    if form != _ANY:
        for stem in files:
            yield from _compile(nvcc, SOURCES / f"{stem}_{form}.cu", form, arch, folder)
        return
    source = folder / "any.cu"
    source.write_text("".join(f'#include "{header}.cuh"\n' for header in _HEADERS))
    yield from _compile(nvcc, source, form, arch, folder)


def _file(line: Line) -> str:
    """Where the kernel is, of `_FILES`."""
    return max((stem for stem in _FILES if line.kernel.startswith(stem)), key=len, default="")


def write(path: Path, found: Sequence[Line]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Line)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, found))


def read(path: Path) -> list[Line]:
    """What `write` has written."""
    kinds = {"str": str, "int": int, "float": float}

    def value(kind: object, text: str) -> object:
        return None if text == "" else kinds.get(str(getattr(kind, "__name__", kind)), float)(text)

    with path.open(newline="") as file:
        return [Line(**{field.name: value(field.type, row[field.name]) for field in fields(Line)}) for row in csv.DictReader(file)]


def _span(values: Sequence[float]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def rendered(found: Sequence[Line]) -> str:
    """The page's table: a row for each kernel, tile and format, over all architectures."""
    rows = ["| kernel | tile | format | threads | registers | shared memory | blocks | issue / memory, stage 1 | stage 2 |"]
    rows.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for key in dict.fromkeys((line.kernel, line.tile, line.format) for line in found):
        lines = [line for line in found if (line.kernel, line.tile, line.format) == key]
        ratios = [[v for line in lines if (v := getattr(line, stage)) is not None] for stage in ("stage1", "stage2")]
        blocks = "/".join(str(line.blocks) for line in lines)
        what = [*key, str(lines[0].threads), _span([line.registers for line in lines]), f"{lines[0].shared_kib} KiB", blocks]
        rows.append(f"| {' | '.join([*what, *(_span(values) if values else '' for values in ratios)])} |")
    return "\n".join(rows) + "\n"


def update(page: Path, found: Sequence[Line]) -> None:
    """Write the lines beside the page, and what is between its comments `native:begin` and `native:end`."""
    write(page.with_suffix(".csv"), found)
    section = re.compile(r"(<!-- native:begin -->\n).*?(<!-- native:end -->)", re.DOTALL)
    page.write_text(section.sub(lambda match: match[1] + rendered(found) + match[2], page.read_text()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_res.benchmarks.native_kernels", description=__doc__)
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--format", nargs="+", default=[*FORMATS, _ANY], choices=[*FORMATS, _ANY])
    parser.add_argument("--only", nargs="+", default=list(_FILES), choices=_FILES, help="of the kernels with a format")
    parser.add_argument("--nvcc", default="nvcc", help="where it is not on the path")
    parser.add_argument(
        "--update", type=Path, metavar="PAGE", help="docs/native.md: write these lines into its table, and beside it"
    )
    options = parser.parse_args(arguments)
    if not SOURCES.is_dir():
        parser.error(f"expected a source checkout, {SOURCES} is not there")
    with tempfile.TemporaryDirectory() as folder:
        made = [(arch, form) for arch in options.arch for form in options.format]
        found = [line for case in made for line in compiled(options.nvcc, *reversed(case), Path(folder), options.only)]
    if options.update and options.update.with_suffix(".csv").is_file():
        made = {(arch, _name(form)) for arch, form in made}
        kept = read(options.update.with_suffix(".csv"))
        anew = [line for line in kept if (line.arch, line.format) in made and (line.format == _ANY or _file(line) in options.only)]
        found += [line for line in kept if line not in anew]
    found.sort(key=lambda line: (line.kernel, line.tile, line.format, line.arch))
    names = [field.name for field in fields(Line)]
    rows = [["-" if value is None else str(value) for value in asdict(line).values()] for line in found]
    print(table(names, rows))
    if options.update:
        update(options.update, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
