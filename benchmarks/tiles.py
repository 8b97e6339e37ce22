"""`python -m fused_res.benchmarks.tiles`: the Triton kernels with a matrix product, at ResNet-50's shapes, with tile after tile.

Each kernel runs alone, on random operands; a tile's result is held against the default tile's. JSON lines: microseconds, and the
share of the time that a copy of the same bytes would take; a table of the best at the end.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res import environment
from fused_res.benchmarks import lines
from fused_res.benchmarks.cases import SUITES, Case
from fused_res.benchmarks.peers import is_lost
from fused_res.benchmarks.steps import UNFINISHED
from fused_res.internals import gpu_sleep
from fused_res.kernels import conv_dgrad, conv_fprop, conv_wgrad, moments, pointwise_tail, pointwise_tail_backward
from fused_res.kernels.conv_tiling import Config, configurations
from fused_res.kernels.tiling import ProductTile
from fused_res.primitives.operands import Activation, Addend, Gradient
from fused_res.primitives.pointwise_tail import Joined, Pointwise
from fused_res.primitives.pointwise_tail_backward import TailGradients
from fused_res.spec import ConvBN

REPEATS = 9
AGREE = 2.0**-6
"""Largest relative L2 difference between two tiles' results: a sum in another order, rounded to 16 bits, is far below it."""
ROWS_BY_COLUMNS = tuple(
    ProductTile(rows, columns, depth, warps, stages)
    for rows, columns, depth, warps, stages in (
        (64, 64, 64, 4, 3),
        (64, 128, 32, 4, 4),
        (64, 128, 64, 4, 3),
        (128, 64, 32, 4, 4),
        (128, 64, 64, 4, 3),
        (128, 128, 32, 4, 4),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 3),
        (128, 256, 64, 8, 3),
    )
)
"""Pixels by channels."""
CHANNELS_SQUARED = tuple(
    ProductTile(rows, columns, depth, warps, stages)
    for rows, columns, depth, warps, stages in (
        (64, 64, 64, 4, 3),
        (64, 128, 64, 8, 3),
        (128, 64, 32, 4, 3),
        (128, 64, 64, 4, 3),
        (128, 128, 32, 4, 3),
        (128, 128, 32, 8, 3),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 3),
        (256, 64, 32, 8, 3),
    )
)
"""Channels by channels, over the pixels."""


class Job(NamedTuple):
    """One kernel at one shape. run(tile) gives its results; None is the default tile. bytes: what it must read and write."""

    name: str
    run: Callable[[tuple | None], object]
    tiles: tuple[tuple, ...]
    bytes: int


def _size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class _Operands:
    """Random operands of a block at one batch size."""

    def __init__(self, case: Case, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.generator, self.dtype, self.device = torch.Generator(device).manual_seed(0), dtype, device
        self.case, self.batch = case, batch

    def image(self, channels: int, size: int) -> Tensor:
        shape = (self.batch, size, size, channels)
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype).permute(0, 3, 1, 2)

    def weight(self, out: int, channels: int, taps: int = 1) -> Tensor:
        shape = (out, taps, taps, channels)
        scale = (taps * taps * channels) ** -0.5
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(self.dtype).permute(0, 3, 1, 2)

    def vectors(self, rows: int, channels: int) -> Tensor:
        return 0.5 + torch.rand(rows, channels, generator=self.generator, device=self.device)

    def signs(self, pixels: int, channels: int) -> Tensor:
        shape = (pixels, channels // 8)
        return torch.randint(0, 256, shape, generator=self.generator, device=self.device, dtype=torch.uint8)


def _configs(direction: str, dtype: torch.dtype, pixels: int, weight: Tensor) -> tuple[Config, ...]:
    """The tiles that tuning tries, and those of `ROWS_BY_COLUMNS` or `CHANNELS_SQUARED` that fit the channels."""
    k, c = weight.shape[:2]
    usual = configurations(direction, dtype, pixels, tuple(weight.shape))
    if tuple(weight.shape[2:]) != (1, 1):
        return tuple(usual)
    if direction == "wgrad":
        more = [Config(t.depth, t.rows, t.columns, t.warps, t.stages) for t in CHANNELS_SQUARED if t.rows <= k and t.columns <= c]
    elif direction == "fprop":
        more = [Config(t.rows, t.columns, t.depth, t.warps, t.stages) for t in ROWS_BY_COLUMNS if t.columns <= k]
    else:
        more = [Config(t.rows, t.depth, t.columns, t.warps, t.stages) for t in ROWS_BY_COLUMNS if t.columns <= c]
    return tuple(dict.fromkeys([*usual, *more]))


def convolution_jobs(make: _Operands, taps: int) -> Iterator[Job]:
    """The convolutions of an identity block with what each level fuses into them: 1x1, or the 3x3 alone."""
    case, dtype = make.case, make.dtype
    u, wide, size = case.width, case.outplanes, case.output_size
    y, z_vectors = make.image(u, size), make.vectors(5, u)
    inner, coefficients = Activation(y, z_vectors), make.vectors(7, u)
    pixels = make.batch * size * size
    masked = Gradient(make.image(u, size), y, z_vectors, coefficients, masked=True)
    if taps == 3:
        unit = ConvBN(make.weight(u, u, 3), stride=(1, 1), padding=(1, 1))
        shapes = {"fprop": (inner, unit, True, None), "dgrad": (masked, y, unit, inner, None), "wgrad": (masked, inner, unit)}
        moved = {"fprop": _size(y, y), "dgrad": _size(y, y, y, y), "wgrad": _size(y, y, y)}
        yield from _three("3x3", shapes, moved, dtype, pixels, unit.weight)
        return
    x, signs = make.image(wide, size), make.signs(pixels, wide)
    unit = ConvBN(make.weight(u, wide), stride=(1, 1), padding=(0, 0))
    shapes = {
        "fprop": (Activation(x), unit, True, None),
        "dgrad": (masked, x, unit, None, Addend(x, signs)),
        "wgrad": (masked, Activation(x), unit),
    }
    moved = {"fprop": _size(x, y), "dgrad": _size(y, y, x, x, signs), "wgrad": _size(y, y, x)}
    yield from _three("1x1 first", shapes, moved, dtype, pixels, unit.weight)
    unit = ConvBN(make.weight(wide, u), stride=(1, 1), padding=(0, 0))
    outer = Gradient(x, make.image(wide, size), make.vectors(5, wide), make.vectors(7, wide), signs)
    shapes = {"fprop": (inner, unit, True, None), "dgrad": (outer, y, unit, inner, None), "wgrad": (outer, inner, unit)}
    moved = {"fprop": _size(y, x), "dgrad": _size(x, x, signs, y, y), "wgrad": _size(x, x, signs, y)}
    yield from _three("1x1 last", shapes, moved, dtype, pixels, unit.weight)


def _three(what: str, shapes: dict, moved: dict, dtype: torch.dtype, pixels: int, weight: Tensor) -> Iterator[Job]:
    kernels = {"fprop": conv_fprop.conv_fprop, "dgrad": conv_dgrad.conv_dgrad, "wgrad": conv_wgrad.conv_wgrad}
    for direction, arguments in shapes.items():

        def run(tile: tuple | None, kernel: Callable = kernels[direction], arguments: tuple = arguments) -> object:
            return kernel(*arguments, config=tile)

        yield Job(f"conv_{direction} {what}", run, _configs(direction, dtype, pixels, weight), moved[direction])


def _tail_gradients(weight: Tensor, inner: int, dtype: torch.dtype, device: torch.device) -> TailGradients:
    mean = torch.rand(inner, device=device, dtype=torch.float64)
    quadratic, constant = torch.randn(inner, inner, device=device).to(dtype) / inner, torch.rand(inner, device=device)
    return TailGradients(weight, constant, constant, constant, constant, mean, quadratic, constant)


def moment_jobs(make: _Operands) -> Iterator[Job]:
    """The moment form's kernels: of an identity block's tail, or of a projection's."""
    case = make.case
    wide, size, pixels = case.outplanes, case.output_size, make.batch * case.output_size**2
    main = Activation(make.image(case.width, size), make.vectors(5, case.width))
    dout, signs = make.image(wide, size), make.signs(pixels, wide)
    branches = [("", main)]
    if case.projection:
        x = make.image(case.inplanes, case.size)
        branches = [(" projection", Activation(x, stride=(case.stride, case.stride)))]
    pointwise = {
        name: Pointwise(z, make.weight(wide, z.image.shape[1]), make.vectors(5, wide)) for name, z in [("main", main), *branches]
    }
    shortcut = Joined(projection=pointwise[" projection"]) if case.projection else Joined(skip=dout)
    rows = tuple(t for t in ROWS_BY_COLUMNS if t.columns <= wide)
    yield Job(
        "pointwise_tail",
        lambda tile: pointwise_tail.pointwise_tail(pointwise["main"], shortcut, True, tile=tile),
        rows,
        _size(main.image, dout, dout, signs) if not case.projection else _size(main.image, dout, signs) + _sampled(branches[0][1]),
    )
    for name, z in branches:
        yield from _branch_jobs(name, z, pointwise[name or "main"].weight, dout, signs)


def _branch_jobs(name: str, z: Activation, weight: Tensor, dout: Tensor, signs: Tensor) -> Iterator[Job]:
    """What runs once for each unit in the moment form; a projection's dz joins an image."""
    wide, inner = weight.shape[:2]
    gradients, scaled = _tail_gradients(weight, inner, weight.dtype, weight.device), weight.flatten(1).contiguous()
    into = torch.zeros_like(z.image) if name else None

    def reduce(tile: tuple | None) -> object:
        wanted = None if name else scaled
        return pointwise_tail_backward.pointwise_tail_backward_reduce(dout, signs, z, gradients.mean, wanted, tile=tile)

    def apply(tile: tuple | None) -> object:
        if into is not None:
            into.zero_()
        ends = (z.vectors is not None, into)
        return pointwise_tail_backward.pointwise_tail_backward_apply(dout, signs, z, scaled, None, gradients, *ends, tile=tile)

    fitting = [t for t in CHANNELS_SQUARED if t.columns <= max(inner, 64)]
    square, blocks = (t for t in fitting if t.rows == t.columns), (t for t in fitting if t.rows <= wide)
    columns = (t for t in ROWS_BY_COLUMNS if t.columns <= max(inner, 64))
    yield Job(f"moments{name}", functools.partial(_moments, z), tuple(square), _sampled(z))
    yield Job(f"pointwise_tail_backward_reduce{name}", reduce, tuple(blocks), _size(dout, signs) + _sampled(z))
    yield Job(f"pointwise_tail_backward_apply{name}", apply, tuple(columns), _size(dout, signs) + 2 * _sampled(z))


def _moments(z: Activation, tile: tuple | None) -> object:
    return moments.moments(z, tile=tile)


def _sampled(z: Activation) -> int:
    return z.pixels * z.image.shape[1] * z.image.element_size()


def _tensors(found: object) -> list[Tensor]:
    """Of a launcher's result the tensors whose values do not depend on the tile: partial results by tiles are left out."""
    found = found if isinstance(found, tuple) else (found,)
    return [t for t in found[:2] if isinstance(t, Tensor) and (t.dim() != 3)]


def _differs(found: object, wanted: list[Tensor]) -> float:
    """Largest relative L2 difference; of sign bytes the share that differs."""
    worst = 0.0
    for got, true in zip(_tensors(found), wanted, strict=True):
        if got.dtype == torch.uint8:
            worst = max(worst, (got != true).float().mean().item())
        else:
            norm = torch.linalg.vector_norm(true.float()).clamp_min(1e-30)
            worst = max(worst, (torch.linalg.vector_norm(got.float() - true.float()) / norm).item())
    return worst


def microseconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median by CUDA events, of launches that wait in a queue."""
    call()
    gpu_sleep(2_000_000)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def jobs(case: Case, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Job]:
    make = _Operands(case, batch, dtype, device)
    if not case.projection:
        yield from convolution_jobs(make, 1)
        yield from convolution_jobs(make, 3)
    yield from moment_jobs(make)


def measure(job: Job, copy_rate: float, compile_only: bool) -> Iterator[dict]:
    """A row for the default tile and for every other one; the last one where that has taken the GPU's context with it."""
    wanted = None
    for tile in (None, *job.tiles):
        row: dict = {"kernel": job.name, "tile": None if tile is None else list(tile)}
        try:
            found = job.run(tile)
            if not compile_only:
                wanted = _tensors(found) if wanted is None else wanted
                row["difference"] = _differs(found, wanted)
                del found
                row["us"] = round(microseconds(functools.partial(job.run, tile)), 1)
                row["share"] = round(1e6 * job.bytes / copy_rate / row["us"], 3)
        except Exception as error:  # out of shared memory, say: it is a result
            row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        yield row


def _copy_rate(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e6 * source.numel() / microseconds(lambda: target.copy_(source))


def _best(case: Case, rows: list[dict]) -> str | None:
    """A line about the fastest tile that is right."""
    right = [row for row in rows if row.get("difference", 1.0) <= AGREE]
    if not right:
        return None
    best = min(right, key=lambda row: row["us"])
    what = f"{case.name} {rows[0]['kernel']}: {rows[0].get('us')} us"
    return f"{what}, best {best['us']} us with {best['tile']}, {best['share']} of a copy"


def _measured(path: Path) -> set[tuple[str, str]]:
    """The cases and kernels that a file has rows of."""
    lines.mend(path)
    return {(row["case"], row["kernel"]) for row in lines.read(path)}


def _chosen(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[Case, Job]]:
    for case in SUITES["resnet50"]:
        if options.cases is None or case.name in options.cases:
            for job in jobs(case, options.batch, torch.bfloat16, device):
                if options.kernels is None or any(f"{job.name} ".startswith(f"{name} ") for name in options.kernels):
                    yield case, job


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 where a tile's result differs, 3 where a kernel has taken the GPU with it: --resume goes on after that."""
    parser = argparse.ArgumentParser(prog="python -m fused_res.benchmarks.tiles", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE", help="not with --compile-only")
    parser.add_argument("--batch", type=int, default=256, help="default %(default)s")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="of resnet50; default: all")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="only kernels whose name begins with these words")
    parser.add_argument("--compile-only", action="store_true", help="fill the cache, time nothing")
    parser.add_argument("--resume", action="store_true", help="leave out the kernels that FILE has rows of")
    options = parser.parse_args(argv)
    device = environment.default_device()
    if options.compile_only:
        for case, job in _chosen(options, device):
            failed = [row for row in measure(job, 0.0, compile_only=True) if "reason" in row]
            print(f"{case.name} {job.name}: {len(job.tiles) + 1} tiles, {len(failed)} do not run", flush=True)
        return 0
    if options.output is None:
        parser.error("--output: expected a file")
    before = _measured(options.output) if options.resume else set()
    copy_rate, wrong = _copy_rate(device), 0
    with options.output.open("a" if options.resume else "w") as file:
        for case, job in _chosen(options, device):
            if (case.name, job.name) in before:
                continue
            rows = []
            for row in measure(job, copy_rate, compile_only=False):
                rows.append(row)
                file.write(json.dumps({"case": case.name, "batch": options.batch, "copy": copy_rate, **row}) + "\n")
                file.flush()
                if "reason" in row and is_lost(device):
                    print(f"{case.name} {job.name}: {row['tile']} took the GPU with it: {row['reason']}", flush=True)
                    return UNFINISHED
            wrong += sum(not row.get("difference", 0.0) <= AGREE for row in rows)
            if line := _best(case, rows):
                print(line, flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
