"""How far a block is from the truth: errors of outputs, gradients and running statistics against float64.

The rule that every backend, level and dtype has to meet:

    err(fused) <= max(1.25 * err(eager), floor)

err is the relative L2 error over all seeds together; eager is the worse of NCHW and channels_last in the same dtype;
the floor is 8 * 2^-24 for float32 and half an ulp for float16 and bfloat16. Truth is the block in float64 from the unrounded
inputs. Gradients are held against a float64 run with the candidate's own ReLU signs, in every dtype: a sign flips where the
pre-activation is within rounding of 0, and a few flips would drown everything else; `check_signs` sees to it that none flips
elsewhere.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fused_res import reference
from fused_res.block.forward import Saved
from fused_res.functional import residual_block_with_saved
from fused_res.layout import to_rows
from fused_res.modules import ResidualBlock
from fused_res.planner import use_backend
from fused_res.primitives.bn_act import unpack_signs
from fused_res.primitives.bn_finalize import Vectors
from fused_res.spec import FORMS, Block, ConvBN
from fused_res.tolerance import MARGIN, floor, scatter

SEEDS = 8
"""Random problems that the rule needs."""


@dataclass
class Result:
    """What a step of a block gives: named tensors, the signs of its ReLUs in order (True where open), and their inputs."""

    tensors: dict[str, Tensor]
    signs: list[Tensor]
    pre_activations: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """One quantity of one case held against the rule."""

    quantity: str
    error: float
    eager: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


_Run = tuple[Tensor, list[Tensor], list[Tensor]]


def _through_modules(block: ResidualBlock, x: Tensor, force: list[Tensor] | None = None) -> _Run:
    """The block through its modules, noting the signs of its ReLUs, or imposing the given ones."""
    signs: list[Tensor] = []
    inputs: list[Tensor] = []

    def relu(total: Tensor) -> Tensor:
        open_ = ~(total.detach() <= 0) if force is None else force[len(signs)]
        signs.append(open_)
        inputs.append(total.detach())
        return torch.where(open_, total, 0)

    form = block._anatomy.form
    return reference.run_modules(x, block._layers(), block.downsample, block.residual_scale, relu, form), signs, inputs


def _step(block: ResidualBlock, x: Tensor, dout: Tensor, run: Callable[[Tensor], _Run]) -> Result:
    x = x.detach().requires_grad_()
    out, signs, inputs = run(x)
    parameters = dict(block.named_parameters())
    grads = torch.autograd.grad(out, [x, *parameters.values()], dout.to(out.dtype))
    tensors = {"out": out.detach(), "dx": grads[0]}
    tensors |= {f"d{name}": grad for name, grad in zip(parameters, grads[1:], strict=True)}
    tensors |= {name: b.clone() for name, b in block.named_buffers() if b.is_floating_point()}
    return Result(tensors, signs, inputs)


def _through_operator(block: ResidualBlock, x: Tensor, level: str) -> _Run:
    """The block through the operator, and the signs of its ReLUs, read from what was saved for backward."""
    operands = block.operands(x)
    out, saved = residual_block_with_saved(x, **operands)
    main, shortcut, form = operands["main"], operands["shortcut"], operands["form"]
    kept = Saved.from_list(saved, Block(main, shortcut if isinstance(shortcut, ConvBN) else None, form=form), level)
    sizes = [tuple(x.shape[2:])]
    for unit in main:
        sizes.append(unit.output_size(*sizes[-1]))
    # What the inner BNs normalised; a BN in front of all has normalised x.
    ys, count = kept.ys[: len(main) - 1], len(main) - 1
    if FORMS[form].preactivated:
        ys, count = [to_rows(x), *ys], len(main)
    else:
        del sizes[0]
    opened = []
    for y, vectors in zip(ys, kept.vectors[:count], strict=True):
        v = Vectors(*vectors)
        opened.append(~(torch.addcmul(v.shift, y.to(v.scale.dtype), v.scale) <= 0))
    if kept.signs is not None:
        opened.append(unpack_signs(kept.signs, out.shape[1]))
    rows = zip(opened, sizes, strict=False)
    return out, [open_.view(x.shape[0], *size, -1).permute(0, 3, 1, 2) for open_, size in rows], []


def step(
    block: ResidualBlock,
    x: Tensor,
    dout: Tensor,
    dtype: torch.dtype,
    backend: str,
    level: str,
    channels_last: bool,
    pure: bool = False,
) -> Result:
    """One forward and backward of a copy of the float64 block in a dtype, 16 bits under autocast unless `pure`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    parameters = dtype if pure else torch.float32
    block = copy.deepcopy(block).to(parameters).to(memory_format=layout)
    # The BN in front of a pre-activation block is given what convolutions give, in the network too.
    x = x.to(dtype if FORMS[block._anatomy.form].preactivated else parameters).contiguous(memory_format=layout)
    with torch.autocast(x.device.type, dtype, enabled=parameters != dtype):
        if backend == "eager":
            return _step(block, x, dout, lambda t: _through_modules(block, t))
        with use_backend(backend, level):
            return _step(block, x, dout, lambda t: _through_operator(block, t, level))


def _truth(block: ResidualBlock, x: Tensor, dout: Tensor, signs: list[Tensor] | None = None) -> Result:
    """The step of the block itself, whose running statistics are put back."""
    buffers = list(block.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        return _step(block, x, dout, lambda t: _through_modules(block, t, signs))
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def _squares(candidate: Result, truth: Result) -> dict[str, tuple[float, float]]:
    """For each tensor the squared error and the squared truth."""

    def squares(name: str) -> tuple[float, float]:
        want = truth.tensors[name].double()
        return (candidate.tensors[name].double() - want).square().sum().item(), want.square().sum().item()

    return {name: squares(name) for name in truth.tensors}


def check_signs(candidate: Result, truth: Result, tolerance: float) -> None:
    """Raise AssertionError where a sign differs although the true pre-activation is beyond the tolerance, relative to their rms."""
    for i, (got, want, pre) in enumerate(zip(candidate.signs, truth.signs, truth.pre_activations, strict=True)):
        off = got != want
        if off.any() and pre[off].abs().max() > tolerance * pre.square().mean().sqrt():
            raise AssertionError(f"ReLU {i}: a sign differs where the pre-activation is {pre[off].abs().max():.3g}")


def _pooled(seeds: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Relative L2 error over all seeds together, so that one seed with a vanishing truth does not decide."""
    totals = {name: [sum(seed[name][i] for seed in seeds) for i in (0, 1)] for name in seeds[0]}
    return {name: (error / truth) ** 0.5 if truth > 0 else error**0.5 for name, (error, truth) in totals.items()}


def judge(
    make: Callable[[int], tuple[ResidualBlock, Tensor, Tensor]],
    dtype: torch.dtype,
    backend: str,
    level: str,
    seeds: Iterable[int] = range(SEEDS),
    sign_tolerance: float | None = None,
    pure: bool = False,
) -> list[Verdict]:
    """Hold a block on a backend and level against the rule.

    Args:
        make: from a seed, a float64 block, x and the incoming gradient, on the device to run on.
        dtype: float32, float16 or bfloat16; the 16-bit ones under autocast, or with all parameters and buffers if `pure`.
        backend, level: as for `use_backend`.
        seeds: the rule is for `SEEDS` of them or more; with fewer the limit leaves room for what chance does to so few values
            (`fused_res.tolerance.scatter`), and tells gross errors only.
        sign_tolerance: see `check_signs`; None to leave the signs unchecked.

    Returns:
        One verdict for out, dx, the gradient of every parameter, and every running statistic.
    """
    return judge_each(make, dtype, [(backend, level)], seeds, sign_tolerance, pure)[backend, level]


def judge_each(
    make: Callable[[int], tuple[ResidualBlock, Tensor, Tensor]],
    dtype: torch.dtype,
    ways: Sequence[tuple[str, str]],
    seeds: Iterable[int] = range(SEEDS),
    sign_tolerance: float | None = None,
    pure: bool = False,
) -> dict[tuple[str, str], list[Verdict]]:
    """`judge` for several pairs of backend and level: the truth and what eager makes of it, most of the work, are found once."""
    layouts = {"NCHW": False, "channels_last": True}
    errors: dict[tuple[str, str], list[dict[str, tuple[float, float]]]] = {
        way: [] for way in [*ways, *(("eager", layout) for layout in layouts)]
    }
    seeds = list(seeds)
    for seed in seeds:
        block, x, dout = make(seed)
        plain = _truth(block, x, dout)
        for (backend, level), found in errors.items():
            eager = backend == "eager"
            run = step(block, x, dout, dtype, backend, level, channels_last=layouts[level] if eager else True, pure=pure)
            if sign_tolerance is not None and not eager:
                check_signs(run, plain, sign_tolerance)
            against = _truth(block, x, dout, run.signs)
            against.tensors["out"] = plain.tensors["out"]
            found.append(_squares(run, against))
    pooled = {way: _pooled(found) for way, found in errors.items()}
    verdicts: dict[tuple[str, str], list[Verdict]] = {way: [] for way in ways}
    for name, truth in plain.tensors.items():
        eager_error = max(pooled["eager", layout][name] for layout in layouts)
        stored = dtype if pure or truth.dim() == 4 else torch.float32  # autocast casts images and weights
        margin = MARGIN if len(seeds) >= SEEDS else MARGIN * scatter(truth.numel() * len(seeds))
        for way, found in verdicts.items():
            found.append(Verdict(name, pooled[way][name], eager_error, max(margin * eager_error, floor(stored))))
    return verdicts


def random_block(block: ResidualBlock, seed: int) -> ResidualBlock:
    """The block in float64 with random BN parameters and running statistics, so that nothing hides behind a 1 or a 0."""
    generator = torch.Generator().manual_seed(seed)
    block = block.double()
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.dim() == 4:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * (2 / fan_in) ** 0.5)
        for bn in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
            for tensor, low, high in (
                (bn.weight, 0.5, 1.5),
                (bn.bias, -0.5, 0.5),
                (bn.running_mean, -0.5, 0.5),
                (bn.running_var, 0.5, 1.5),
            ):
                if tensor is not None:
                    tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)
    return block
