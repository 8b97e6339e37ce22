"""The numerical check: each backend, level and dtype that runs on a device, held against fp64 by `fused_res.accuracy`'s rule."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_res import accuracy, backends
from fused_res.environment import DTYPES, one_thread, temporarily
from fused_res.modules import BasicBlock, Bottleneck, PreActBasicBlock, PreActBlock, PreActBottleneck, ResidualBlock
from fused_res.planner import LEVELS

CHECKED = ("fp32", "fp16", "bf16")
SEEDS = accuracy.SEEDS
MODES = ("train", "eval")


class Shape(NamedTuple):
    """A block that is checked, small, with odd image sizes and channel counts, so that no tile of a kernel is ever full."""

    block: type[ResidualBlock]
    inplanes: int
    planes: int
    stride: int

    def __str__(self) -> str:
        identity = self.stride == 1 and self.inplanes == self.planes * self.block.expansion
        return f"{self.block.__name__} {'identity' if identity else 'projection'}"


BATCH, HEIGHT, WIDTH = 4, 9, 7
SHAPES = (
    *(Shape(BasicBlock, 20, 20, 1), Shape(BasicBlock, 12, 20, 2), Shape(Bottleneck, 40, 10, 1), Shape(Bottleneck, 24, 10, 2)),
    *(Shape(PreActBasicBlock, 20, 20, 1), Shape(PreActBottleneck, 24, 10, 2)),
)


class Job(NamedTuple):
    """One block in one mode and dtype, on one backend and level."""

    shape: Shape
    mode: str
    dtype: str
    backend: str
    level: str

    def __str__(self) -> str:
        return f"{self.backend}, {self.level}: {self.shape}, {self.mode}, {self.dtype}"


@dataclass(frozen=True)
class Row:
    """One quantity of one job: relative L2 errors of fused and of eager, and the limit of the former.

    `reason` says why a backend cannot run a dtype here, and is None where it can; the row then has nothing else.
    """

    backend: str
    dtype: str
    level: str | None = None
    block: str | None = None
    mode: str | None = None
    quantity: str | None = None
    error: float | None = None
    eager_error: float | None = None
    limit: float | None = None
    reason: str | None = None

    @property
    def ratio(self) -> float:
        """Error over limit; infinite where the error is not a number, 0 where nothing ran."""
        if self.reason is not None:
            return 0.0
        return self.error / self.limit if self.error == self.error else float("inf")

    @property
    def passed(self) -> bool:
        return self.ratio <= 1.0

    def to_dict(self) -> dict:
        """For JSON, which has no NaN or infinity: they become null, with `passed` false."""
        finite = {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in asdict(self).items()}
        return finite | {"passed": self.passed}


def problem(shape: Shape, mode: str, device: torch.device, seed: int) -> tuple[ResidualBlock, Tensor, Tensor]:
    """A block in fp64 with random parameters and running statistics, an input, and an incoming gradient."""
    outplanes, generator = shape.planes * shape.block.expansion, torch.Generator().manual_seed(seed)
    downsample = None
    if shape.stride != 1 or shape.inplanes != outplanes:
        downsample = nn.Sequential(nn.Conv2d(shape.inplanes, outplanes, 1, shape.stride, bias=False))
        if not issubclass(shape.block, PreActBlock):
            downsample.append(nn.BatchNorm2d(outplanes))
    block = shape.block(shape.inplanes, shape.planes, shape.stride, downsample)
    block = accuracy.random_block(block, seed).train(mode == "train").to(device)
    size = (HEIGHT - 1) // shape.stride + 1, (WIDTH - 1) // shape.stride + 1
    x = torch.randn(BATCH, shape.inplanes, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    grad = torch.randn(BATCH, outplanes, *size, generator=generator, dtype=torch.float64)
    return block, x.to(device), grad.to(device)


def judge(job: Job, device: torch.device, seeds: int = SEEDS) -> Iterator[Row]:
    """The rows of one job, one per quantity."""

    def make(seed: int) -> tuple[ResidualBlock, Tensor, Tensor]:
        return problem(job.shape, job.mode, device, seed)

    verdicts = accuracy.judge(make, DTYPES[job.dtype], job.backend, job.level, range(seeds))
    for v in verdicts:
        yield Row(job.backend, job.dtype, job.level, str(job.shape), job.mode, v.quantity, v.error, v.eager, v.limit)


class Selection(NamedTuple):
    """What is checked; everything by default. shapes: by their names."""

    dtypes: Sequence[str] = CHECKED
    backends: Sequence[str] = backends.NAMES
    levels: Sequence[str] = LEVELS
    shapes: Sequence[str] = tuple(map(str, SHAPES))
    modes: Sequence[str] = MODES


def plan(device: torch.device, selection: Selection = Selection()) -> tuple[list[Job], list[Row]]:  # noqa: B008 - immutable
    """The jobs that run on a device, and a row with the reason for every backend and dtype that do not."""
    jobs, refused = [], []
    dtypes, names, levels, wanted, modes = selection
    shapes = [shape for shape in SHAPES if str(shape) in wanted]
    for name in names:
        for dtype in dtypes:
            reason = backends.supports(name, device, DTYPES[dtype])
            if reason is not None:
                refused.append(Row(name, dtype, reason=reason))
                continue
            jobs += [Job(shape, mode, dtype, name, level) for level in levels for shape in shapes for mode in modes]
    return jobs, refused


def run(
    device: torch.device,
    selection: Selection = Selection(),  # noqa: B008 - immutable
    seeds: int = SEEDS,
    advance: Callable[[str], None] = lambda label: None,
) -> list[Row]:
    """The whole check on one device, fp32 being IEEE's, not TF32; calls `advance` with a label before each job of `plan`."""
    jobs, rows = plan(device, selection)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    with one_thread(device), temporarily(cudnn, allow_tf32=False), temporarily(matmul, allow_tf32=False):
        for job in jobs:
            advance(str(job))
            rows += judge(job, device, seeds)
    return rows


def worst(rows: Sequence[Row]) -> list[Row]:
    """Of every job the quantity nearest to its limit, or furthest beyond; refusals as they are."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.backend, row.dtype, row.level, row.block, row.mode), []).append(row)
    return [max(group, key=lambda row: row.ratio) for group in groups.values()]


def summary(rows: Sequence[Row]) -> dict:
    """Whether all passed, how many quantities were compared, and the largest error over its limit.

    Nothing compared is not a pass.
    """
    compared = [row for row in rows if row.reason is None]
    largest = max((row.ratio for row in compared), default=None)
    return {
        "passed": bool(compared) and all(row.passed for row in compared),
        "compared": len(compared),
        "worst": largest if largest is None or largest < float("inf") else None,
        "rows": [row.to_dict() for row in worst(rows)],
    }
