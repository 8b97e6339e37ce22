"""Compile the Triton kernels ahead of time, without a GPU, and check the machine code: `python -m fused_res.aot`.

With --update docs/kernels.csv and the worst cases in docs/kernels.md are written anew; with --check nothing is compiled, only the
names of the lines are compared, and the page with them.
"""

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import fused_res.kernels
from fused_res import aot_table

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Shared memory that one block may use, in bytes, by compute capability.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# Of these a sample takes one for each kind of matrix instruction, of `mma` the newest, which has little shared memory.
_SAMPLE = (90, 100, 120)
# Local memory that does not count as a spill where no loop uses it, in bytes. On an H200 the tail's tile that parks 40 of them is
# faster than any that parks none (docs/results-gpu.md); in float16 it parks up to 88. Without masks it parks up to 136, and issues
# a seventh fewer instructions for a tile all the same, those of the parking among them (docs/loops.csv).
PARKED = 136
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int64: "*i64",
}


@dataclass
class Row:
    """One compiled kernel: what the assembler made of it, and what is wrong with it."""

    kernel: str
    variant: str
    dtype: str
    arch: int
    registers: int
    local: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    matrix: str
    copies: int
    problems: list[str] = field(default_factory=list)


def variants(dtype: torch.dtype, arch: int, what: str = "aot_variants") -> list[tuple[str, object]]:
    """Name of the file and variant, for all files of `fused_res.kernels` that have `aot_variants`, or `aot_tiles`.

    Their tiles are those that the launchers choose on such a GPU.
    """
    from fused_res.kernels.tiling import compiling_for

    found = []
    with compiling_for(arch, SHARED[arch]):
        for module in pkgutil.iter_modules(fused_res.kernels.__path__):
            make = getattr(importlib.import_module(f"fused_res.kernels.{module.name}"), what, None)
            found += [(module.name, variant) for variant in make(dtype)] if make else []
    return found


def _specialise(value, path: tuple[int, ...], constants: dict, attributes: dict):
    """Triton's type of an argument, or of a tuple of them; what is known of them beside goes into the two dictionaries."""
    if isinstance(value, tuple):
        types = [_specialise(item, (*path, i), constants, attributes) for i, item in enumerate(value)]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, torch.Tensor) or value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return _POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32" if value < 2**31 else "i64"


def compile_launch(launch, arch: int):
    """The compiled kernel, specialised as the launcher's arguments make Triton do: aligned pointers, 1, multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants, attributes = dict(launch.constants), {}
    signature = dict.fromkeys(launch.kernel.arg_names, "constexpr")
    for i, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        signature[name] = _specialise(value, (i,), constants, attributes)
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": launch.warps})


def accesses(ptx: str, kind: str) -> dict[int, int]:
    """How many instructions load ("ld") or store ("st") how many bytes of global memory per thread."""
    counts: dict[int, int] = {}
    sizes = [
        int(vector or 1) * int(bits) // 8
        for vector, bits in re.findall(rf"\b{kind}\.global[.\w:]*?(?:\.v(\d))?\.[bsuf](\d+)\s", ptx)
    ]
    if kind == "ld":
        sizes += [
            int(size, 0) for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[.\w:]* \[[^]]*\], \[[^]]*\], (\w+)", ptx)
        ]
    for size in sizes:
        counts[size] = counts.get(size, 0) + 1
    return dict(sorted(counts.items()))


def matrix_instruction(ptx: str) -> str:
    """The tensor cores' instructions that a kernel multiplies with, of wgmma, tcgen05 and mma; empty without one."""
    found = set(re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", ptx))
    return "+".join(sorted(name.split(".")[0] for name in found))


def asynchronous_copies(ptx: str) -> int:
    """How many instructions copy from global to shared memory on the side."""
    return len(re.findall(r"\bcp\.async\.(?:c[ag]|bulk\.\S*?global)\b", ptx))


def _dump(cubin: bytes, tool: str, *options: str) -> str:
    """What one of the tools that come with Triton prints about a cubin."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> str:
    """What `nvdisasm` prints of a kernel."""
    return _dump(cubin, "nvdisasm")


def usage(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump -res-usage` says: REG, STACK, SHARED, LOCAL and more."""
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", _dump(cubin, "cuobjdump", "-res-usage"))}


def loops_spill(sass: str) -> bool:
    """Whether an access to local memory can follow itself, in `nvdisasm`'s text of a kernel."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.+);", line):
            code.append(instruction[1])

    def following(at: int) -> Iterator[int]:
        if target := re.search(r"\bBRA\b.*`\((\.L\w+)\)", code[at]):
            yield labels[target[1]]
        if not re.match(r"(?:BRA `|EXIT|RET)", code[at]):
            yield at + 1

    for spill in (at for at, text in enumerate(code) if re.search(r"\b(?:STL|LDL)\b", text)):
        seen, ahead = set(), list(following(spill))
        while ahead:
            at = ahead.pop()
            if at == spill:
                return True
            if at not in seen and at < len(code):
                seen.add(at)
                ahead += following(at)
    return False


def problems(row: Row, compiled, variant) -> Iterator[str]:
    """What a kernel of this project must not do."""
    ptx, ttir = compiled.asm["ptx"], compiled.asm["ttir"]
    # A few words outside of loops are the assembler's choice: with fewer registers one more block fits a multiprocessor.
    if row.local > PARKED or (row.local and loops_spill(_dump(compiled.asm["cubin"], "nvdisasm"))):
        yield f"spills: {row.local} bytes of local memory"
    if row.shared > SHARED[row.arch]:
        yield f"shared memory: {row.shared} bytes of {SHARED[row.arch]}"
    apart = (1, 4, 8) if variant.matrix else (1,)  # sign bytes; per-channel vectors, of which a thread may want few
    single = 3 * ("REACH" in variant.launch.constants)  # `pivot` reads three rows before the loop, one element a thread
    for kind, sizes, wide, few in (("loads", row.loads, variant.loads, single), ("stores", row.stores, variant.stores, 0)):
        narrow = {size: count for size, count in sizes.items() if size < 16 and size not in apart and count > few}
        if wide and (narrow or not any(size >= 16 for size in sizes)):
            yield f"narrow {kind}: bytes x instructions {sizes}"
    if variant.matrix and not row.matrix and "ieee" not in variant.launch.constants.values():
        yield "no matrix instruction"
    if variant.matrix and variant.loads and not row.copies:
        yield "operands: no asynchronous copies"
    if drops := re.findall(r"\b(?:max|min)(?:\.ftz)?\.f\w+", ptx):
        yield f"drops NaN: {', '.join(sorted(set(drops)))}"
    if racy := re.findall(r"\b(?:atom|red)\.\S+", ptx):
        yield f"atomics: {', '.join(sorted(set(racy)))}"
    # The one tile of partial results begins at 0, as vectors do, of kernels that know no rows.
    arguments = dict(zip(variant.launch.kernel.arg_names, variant.launch.arguments, strict=False))
    rows = arguments.get("T") != 1 and not {"P", "T", "K", "N"}.isdisjoint(arguments)
    if rows and not re.search(r"arith\.muli .*\bi64\b|arith\.muli .*xi64>", ttir):
        yield "row offsets: no 64-bit multiplication"


def kernel_name(variant) -> str:
    """What a kernel is called in the tables: as in a profile, without the ending all have."""
    return variant.launch.kernel.__name__.removesuffix("_kernel")


def inspect(variant, dtype: torch.dtype, arch: int) -> Row:
    """Compile a variant for an architecture and check it."""
    compiled = compile_launch(variant.launch, arch)
    ptx, used = compiled.asm["ptx"], usage(compiled.asm["cubin"])
    row = Row(
        kernel=kernel_name(variant),
        variant=variant.name,
        dtype=str(dtype).removeprefix("torch."),
        arch=arch,
        registers=used["REG"],
        local=used["LOCAL"] + used["STACK"],
        shared=compiled.metadata.shared,
        loads=accesses(ptx, "ld"),
        stores=accesses(ptx, "st"),
        matrix=matrix_instruction(ptx),
        copies=asynchronous_copies(ptx),
    )
    row.problems = list(problems(row, compiled, variant))
    return row


def table(
    sample: bool,
    only: Collection[str] = (),
    tiles: bool = False,
    archs: Collection[int] = tuple(SHARED),
    dtypes: Collection[torch.dtype] = DTYPES,
) -> Iterator[tuple[str, Row]]:
    """File and row of all variants for these architectures and dtypes, or of some files only; or of the convolutions' tiles.

    A sample has the variants marked so, in two dtypes, for compute capability 9.0, and in bfloat16 those that multiply matrices for
    a few more.
    """
    for dtype in DTYPES:
        if dtype not in dtypes or (sample and dtype == torch.float16):
            continue
        for arch in archs:
            for file, variant in variants(dtype, arch, "aot_tiles" if tiles else "aot_variants"):
                sampled = arch == 90 or (variant.matrix and arch in _SAMPLE and dtype == torch.bfloat16)
                if (not sample or (variant.sample and sampled)) and (not only or file in only):
                    yield file, inspect(variant, dtype, arch)


def stale(lines: list[aot_table.Line]) -> list[str]:
    """What these lines lack, and what they have that is no more."""
    there = aot_table.documented(lines)
    here = {
        (file, kernel_name(variant), variant.name, str(dtype).removeprefix("torch."))
        for dtype in DTYPES
        for file, variant in variants(dtype, next(iter(SHARED)))
    }
    return [
        *(f"missing: {', '.join(line)}" for line in sorted(here - there)),
        *(f"gone: {', '.join(line)}" for line in sorted(there - here)),
    ]


def _line(row: Row) -> str:
    def sizes(counts: dict[int, int]) -> str:
        return " ".join(f"{count}x{size}" for size, count in counts.items())

    left = f"{row.kernel:24} {row.variant:54} {row.dtype:9} sm_{row.arch:<4}"
    right = f"{sizes(row.loads):24} {sizes(row.stores):14} {row.copies:4} {row.matrix}"
    return f"{left}{row.registers:4} {row.local:5} {row.shared:6}  {right}"


def _check(document: Path) -> int:
    lines, text = aot_table.read(aot_table.data(document)), document.read_text()
    found = stale(lines)
    if aot_table.rewritten(text, lines) != text:
        found.append(f"{document.name} does not show the worst of {aot_table.data(document).name}")
    for line in found:
        print(line)
    return 1 if found else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_res.aot", description=__doc__)
    parser.add_argument("--sample", action="store_true", help="a quick selection instead of all variants")
    parser.add_argument(
        "--only", action="append", default=[], metavar="FILE", help="a file of kernels, such as conv_fprop; repeatable"
    )
    parser.add_argument(
        "--arch", action="append", default=[], type=int, choices=SHARED, help="for this architecture only, such as 90; repeatable"
    )
    parser.add_argument(
        "--dtype",
        action="append",
        default=[],
        choices=[str(dtype).removeprefix("torch.") for dtype in DTYPES],
        help="in this dtype only; repeatable",
    )
    parser.add_argument("--tiles", action="store_true", help="instead, the convolutions with every tile that tuning tries")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--update", type=Path, metavar="DOCUMENT", help="write docs/kernels.md anew, and the data beside it")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="DOCUMENT",
        help="exit with 1 unless the data beside docs/kernels.md has the kernels there are",
    )
    options = parser.parse_args(arguments)
    import triton

    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET: expected unset, the interpreter cannot compile")
    if options.check:
        return _check(options.check)
    if (options.update or options.tiles) and options.sample:
        parser.error("--sample: expected neither --update nor --tiles with it")
    if options.update and options.tiles:
        parser.error("--tiles: expected no --update with it")
    if options.update and options.dtype:
        parser.error("--dtype: expected no --update with it")
    failed = 0
    if not options.json:
        heads = f"{'kernel':24} {'variant':54} {'dtype':9} {'arch':7}{'regs':>4} local shared"
        print(f"{heads}  {'loads (n x bytes)':24} {'stores':14} async matrix")
    sections: dict[str, list[Row]] = {}
    dtypes = [getattr(torch, name) for name in options.dtype] or DTYPES
    for file, row in table(options.sample, options.only, options.tiles, options.arch or SHARED, dtypes):
        sections.setdefault(file, []).append(row)
        print(json.dumps(asdict(row)) if options.json else _line(row), flush=True)
        for problem in row.problems:
            failed += 1
            print(f"{row.kernel} {row.variant}, {row.dtype}, sm_{row.arch}: {problem}", file=sys.stderr, flush=True)
    if options.update and not failed:
        aot_table.update(options.update, sections)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
