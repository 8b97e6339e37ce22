"""Whole blocks against autograd in float64: every geometry, shortcut, layout, mode and frozen parameter, at every level."""

import os
from contextlib import nullcontext
from math import isfinite
from typing import NamedTuple
from unittest import mock

import torch
from compare import same
from torch import Tensor

from fused_res import reference
from fused_res.accuracy import MARGIN, Result, check_signs
from fused_res.block.forward import Saved
from fused_res.functional import residual_block_with_saved
from fused_res.planner import use_backend
from fused_res.primitives.bn_act import unpack_signs
from fused_res.primitives.bn_finalize import Vectors
from fused_res.spec import FORMS, Block, ConvBN
from fused_res.tolerance import floor, scatter
from fuzz.block_cases import Unit, Whole, cases, pixels
from fuzz.draws import DTYPES, Target, Values, shifted


def laid(tensor: Tensor, layout: str) -> Tensor:
    """The same values, in memory of their own, in this layout."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "shifted":
        return shifted(tensor, 3)
    if layout == "sliced":
        return torch.stack((tensor, torch.full_like(tensor, 9)), -1)[..., 0]
    if layout == "narrowed":  # some channels of a channels_last image
        wider = torch.cat((torch.full_like(tensor, 9), tensor), 1).contiguous(memory_format=torch.channels_last)
        return wider[:, tensor.shape[1] :]
    if layout == "permuted":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "outside in":
        return tensor.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    if layout == "expanded":
        return tensor[:1].contiguous().expand(tensor.shape)
    return tensor.contiguous()


class Problem(NamedTuple):
    """Everything in float64."""

    x: Tensor
    skip: Tensor | None
    scale: Tensor | None
    block: Block
    dout: Tensor


def problem(case: Whole, seed: int) -> Problem:
    values = Values(seed)
    # Of a few values two often nearly coincide, and 1 / sqrt(var) then has no finite variance: eps bounds it.
    eps = 1e-5 if pixels(case) >= 32 else 0.1

    def uniform(there, count, low, high):
        return torch.rand(count, generator=values.generator, dtype=torch.float64) * (high - low) + low if there else None

    preactivated = FORMS[case.form].preactivated

    def unit(u: Unit, channels: int) -> ConvBN:
        fan_in = channels // u.groups * u.kernel[0] * u.kernel[1]
        weight = values.wide(u.out, channels // u.groups, *u.kernel) * (2 / fan_in) ** 0.5
        bias, gamma, beta, tracked = u.there
        tracked, normalised = tracked or not u.training, channels if preactivated else u.out
        return ConvBN(
            weight,
            uniform(bias, u.out, -0.5, 0.5),
            uniform(gamma, normalised, 0.5, 1.5),
            uniform(beta, normalised, -0.5, 0.5),
            uniform(tracked, normalised, -0.5, 0.5),
            uniform(tracked, normalised, 0.5, 1.5),
            torch.tensor(3) if tracked else None,
            u.stride,
            u.padding,
            u.dilation,
            u.groups,
            u.training,
            u.momentum,
            eps,
        )

    def image(layout, *shape):
        tensor = values.wide(*shape)
        return tensor[:1].expand(shape) if layout == "expanded" else tensor

    x = image(case.x_layout, case.n, case.channels, *case.size)
    main, channels = [], case.channels
    for u in case.main:
        main.append(unit(u, channels))
        channels = u.out
    projection = None if case.projection is None else unit(case.projection, case.channels)
    if projection is not None and preactivated:  # a convolution alone
        projection = projection._replace(**dict.fromkeys(ConvBN._fields[2:7]), training=False)
    _, k, _h, w = case.out
    skip = {"given": lambda: values.wide(*case.out), "broadcast": lambda: values.wide(k, 1, w)}.get(case.shortcut, lambda: None)()
    scale = values.wide() if case.scaled else None
    block = Block(main, projection, case.pool, skip is not None, case.form)
    return Problem(x, skip, scale, block, image(case.dout_layout, *case.out))


def _as(case: Whole, p: Problem, dtype: torch.dtype, x_layout: str, dout_layout: str) -> Problem:
    """A copy in the case's precision; leaves require grad unless frozen."""
    outer = torch.float32 if case.precision == "autocast" and dtype.itemsize < 4 else dtype
    inner = torch.float32 if case.precision == "mixed" and dtype.itemsize < 4 else outer
    place = iter(range(64))

    def leaf(tensor, to, layout="contiguous"):
        frozen = case.frozen >> next(place) & 1
        if tensor is None:
            return None
        return laid(tensor.to(to, copy=True), layout).detach().requires_grad_(not frozen)

    of_skip = x_layout if p.skip is not None and p.skip.dim() == 4 and x_layout != "expanded" else "contiguous"
    # A block whose first BN would take x in float32 under autocast runs unfused (docs/limits.md).
    of_images = dtype if FORMS[case.form].preactivated else outer
    x, skip = leaf(p.x, of_images, x_layout), leaf(p.skip, of_images, of_skip)
    scale = leaf(p.scale, inner)

    def unit(u):
        of_vectors = "sliced" if case.weight_layout == "sliced" else "contiguous"
        bn = [None if t is None else laid(t.to(inner, copy=True), of_vectors) for t in u[4:6]]
        count = None if u.num_batches_tracked is None else u.num_batches_tracked.clone()
        return u._replace(
            weight=leaf(u.weight, outer, case.weight_layout),
            bias=leaf(u.bias, outer, of_vectors),
            gamma=leaf(u.gamma, inner, of_vectors),
            beta=leaf(u.beta, inner, of_vectors),
            running_mean=bn[0],
            running_var=bn[1],
            num_batches_tracked=count,
        )

    block = p.block._replace(main=[unit(u) for u in p.block.main], projection=p.block.projection and unit(p.block.projection))
    return Problem(x, skip, scale, block, laid(p.dout, dout_layout))


def _names(p: Problem) -> dict[str, Tensor]:
    """The differentiable inputs by name."""
    named = {"x": p.x, "skip": p.skip, "scale": p.scale}
    for i, unit in enumerate(p.block.units()):
        named |= {f"{i}.{field}": getattr(unit, field) for field in ("weight", "bias", "gamma", "beta")}
    return {name: t for name, t in named.items() if t is not None}


def _finish(p: Problem, out: Tensor, signs: list, inputs: list) -> Result:
    wanted = {name: t for name, t in _names(p).items() if t.requires_grad}
    tensors = {"out": out.detach()}
    if wanted and out.requires_grad:
        dout = p.dout.to(out.dtype) if p.dout.dtype != out.dtype else p.dout
        grads = torch.autograd.grad(out, list(wanted.values()), laid_like(dout, p.dout))
        tensors |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    for i, unit in enumerate(p.block.units()):
        if unit.running_mean is not None:
            tensors |= {f"{i}.running_mean": unit.running_mean, f"{i}.running_var": unit.running_var}
    return Result(tensors, signs, inputs)


def laid_like(tensor: Tensor, like: Tensor) -> Tensor:
    """With the other's strides, which a cast to another dtype may have changed."""
    if tensor.stride() == like.stride():
        return tensor
    span = 1 + sum((s - 1) * step for s, step in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
    memory = torch.full((span,), 9, dtype=tensor.dtype)
    view = memory.as_strided(like.shape, like.stride())
    if 0 in like.stride():
        view[:1] = tensor[:1]
        return view
    view.copy_(tensor)
    return view


def _autocast(case: Whole, dtype: torch.dtype):
    return torch.autocast("cpu", dtype) if case.precision == "autocast" and dtype.itemsize < 4 else nullcontext()


def _plain(case: Whole, p: Problem, dtype: torch.dtype, force: list[Tensor] | None = None) -> Result:
    """Through ordinary autograd, noting the signs of its ReLUs, or imposing the given ones."""
    signs, inputs = [], []

    def relu(total):
        opened = ~(total.detach() <= 0) if force is None else force[len(signs)]
        signs.append(opened)
        inputs.append(total.detach())
        return torch.where(opened, total, 0)

    preactivated = FORMS[case.form].preactivated
    shortcut = None
    if p.skip is not None:
        shortcut = lambda _: p.skip  # noqa: E731
    elif p.block.projection is not None:
        project = reference._conv if preactivated else reference.conv_bn
        shortcut = lambda t: project(reference.pooled(t, p.block.pool), p.block.projection)  # noqa: E731
    with _autocast(case, dtype):
        if preactivated:
            pairs = [
                (lambda t, unit=unit: relu(reference._bn(t, unit)), lambda t, unit=unit: reference._conv(t, unit))
                for unit in p.block.main
            ]
            out = reference.compose_preactivated(p.x, pairs, shortcut, p.scale)
        else:
            units = [lambda t, unit=unit: reference.conv_bn(t, unit) for unit in p.block.main]
            out = reference.compose(p.x, units, shortcut, p.scale, relu, form=case.form)
    return _finish(p, out, signs, inputs)


def _fused(case: Whole, p: Problem, dtype: torch.dtype, backend: str) -> tuple[Result, bool]:
    """Through the operator; also whether what was saved tells the signs of the ReLUs."""
    shortcut = p.skip if p.skip is not None else p.block.projection
    who = mock.patch.dict(os.environ, FUSED_RES_CONVOLUTIONS="own" if case.own else "auto")
    with use_backend(backend, case.level), who:
        with _autocast(case, dtype):
            ends = {"pool": p.block.pool, "residual_scale": p.scale, "form": case.form}
            out, saved = residual_block_with_saved(p.x, p.block.main, shortcut, **ends)
        # Read first: the backward may free what the graph holds.
        signs = _signs(case, p, out, saved) if out.requires_grad else []
        return _finish(p, out, signs, []), bool(signs)


def _signs(case: Whole, p: Problem, out: Tensor, saved: list[Tensor]) -> list[Tensor]:
    """Of all ReLUs, in their order."""
    kept, form, sizes = Saved.from_list(saved, p.block, case.level), FORMS[case.form], case.sizes()
    inner = list(zip(sizes[1:-1], kept.ys, strict=False))
    if form.preactivated:
        inner.insert(0, (case.size, p.x.detach().permute(0, 2, 3, 1).reshape(-1, case.channels)))
    found = []
    for (size, y), vectors in zip(inner, kept.vectors, strict=False):
        v = Vectors(*vectors)
        found.append((size, ~(torch.addcmul(v.shift, y.to(v.scale.dtype), v.scale) <= 0)))
    if form.relu:
        found.append((sizes[-1], unpack_signs(kept.signs, out.shape[1])))
    return [rows.view(case.n, *size, -1).permute(0, 3, 1, 2) for size, rows in found]


def _truth(case: Whole, p: Problem, signs: list[Tensor] | None) -> Result:
    exact = case._replace(weight_layout="contiguous")
    return _plain(exact, _as(exact, p, torch.float64, "contiguous", "contiguous"), torch.float64, signs or None)


class Sums(NamedTuple):
    """Over the values of a tensor: of their squared errors, of the squares of those, and of the squared truth."""

    error: float
    fourth: float
    truth: float

    @property
    def relative(self) -> float:
        return (self.error / self.truth if self.truth > 0 else self.error) ** 0.5

    @property
    def values(self) -> float:
        """Over how many values the error is spread: the variance of a sum of squares is at most the sum of the fourth powers."""
        return self.error**2 / self.fourth if self.fourth > 0 else 1.0


def _errors(run: Result, case: Whole, p: Problem, plain: Result) -> dict[str, Sums]:
    """Of each tensor, gradients with the run's own signs."""
    against = _truth(case, p, run.signs)
    against.tensors["out"] = plain.tensors["out"]
    found = {}
    for name, got in run.tensors.items():
        want = against.tensors[name]
        squares = (got.double() - want).square()
        found[name] = Sums(squares.sum().item(), squares.square().sum().item(), want.square().sum().item())
    return found


def _pooled(many: list[dict[str, Sums]]) -> dict[str, Sums]:
    return {name: Sums(*map(sum, zip(*(one[name] for one in many), strict=True))) for name in many[0]}


def _faults(case: Whole, backend: str, seeds_: range) -> list[str]:
    """What breaks the rule of accuracy on these seeds together, with room for what chance does to so few values."""
    dtype = DTYPES[case.dtype]
    sums = {"fused": [], "NCHW": [], "channels_last": []}
    stored = {}
    for seed in seeds_:
        p = problem(case, seed)
        plain = _truth(case, p, None)
        run, known = _fused(case, _as(case, p, dtype, case.x_layout, case.dout_layout), dtype, backend)
        if known:
            check_signs(run, plain, 64 * torch.finfo(dtype).eps)
        runs = {"fused": run}
        for layout in ("contiguous", "channels_last"):
            name = "NCHW" if layout == "contiguous" else layout
            runs[name] = _plain(case, _as(case, p, dtype, layout, layout), dtype)
        if not known:  # nothing was kept, since nothing asked for a gradient
            for one in runs.values():
                one.signs = []
        for name, one in runs.items():
            sums[name].append(_errors(one, case, p, plain))
        stored = {name: dtype if t.dtype == dtype or t.dim() == 4 else t.dtype for name, t in run.tensors.items()}
    fused, nchw, nhwc = (_pooled(sums[name]) for name in sums)
    failed = []
    for name, ours in fused.items():
        # The library's own 16-bit gradients may read fresh memory, which is NaN here.
        eager = max((sums_ for sums_ in (nchw[name], nhwc[name]) if isfinite(sums_.error)), default=None)
        if eager is None:
            continue
        limit = max(MARGIN * scatter(min(ours.values, eager.values)) * eager.relative, floor(stored[name]))
        if not ours.relative <= limit:
            failed.append(f"{name}: {ours.relative:.2e}, eager {eager.relative:.2e}, limit {limit:.2e} on {len(seeds_)} seeds")
    return failed


def _check_float64(case: Whole, backend: str) -> None:
    """Nearer to eager than eager is to itself with every input changed by a billionth: 10^7 roundings."""
    p = problem(case, case.seed)
    run, _ = _fused(case, _as(case, p, torch.float64, case.x_layout, case.dout_layout), torch.float64, backend)
    truth = _truth(case, p, run.signs)
    noise = Values(case.seed + 1)

    def near(t):
        return t if t is None or not t.is_floating_point() else t * (1 + 1e-9 * noise.wide(*t.shape))

    def near_unit(u):
        return u._replace(**{name: near(getattr(u, name)) for name in ConvBN._fields[:6]})

    block = p.block._replace(
        main=[near_unit(u) for u in p.block.main], projection=p.block.projection and near_unit(p.block.projection)
    )
    changed = _truth(case, Problem(near(p.x), near(p.skip), near(p.scale), block, near(p.dout)), run.signs or None)
    for name, got in run.tensors.items():
        want = truth.tensors[name]
        limit = 4 * (changed.tensors[name] - want).norm() + 1e-12 * want.norm() + 1e-13
        assert (got - want).norm() <= limit, f"{name}: off by {(got - want).norm():.2e} of {want.norm():.2e}, limit {limit:.2e}"


def _library_is_sound(case: Whole) -> bool:
    """Whether torch has no known fault in the case's convolutions.

    Without AVX-512 the oneDNN of torch 2.13 writes past the end of its memory in some float32 gradients of weights: of strided 1x1
    convolutions of fewer than 8 channels on channels_last images.
    """
    channels = [case.channels, *(unit.out for unit in case.main)]
    units = [*zip(case.main, channels, strict=False), *([] if case.projection is None else [(case.projection, case.channels)])]
    return not any(unit.kernel == (1, 1) and unit.stride != (1, 1) and c // unit.groups < 8 for unit, c in units)


def check(case: Whole, backend: str) -> None:
    with nullcontext() if _library_is_sound(case) else torch.backends.mkldnn.flags(enabled=False):
        _check(case, backend)


def _check(case: Whole, backend: str) -> None:
    dtype = DTYPES[case.dtype]
    p = problem(case, case.seed)
    mine = _as(case, p, dtype, case.x_layout, case.dout_layout)
    given = [*_names(mine).values(), mine.dout]
    before = [t.detach().clone() for t in given]
    run, _ = _fused(case, mine, dtype, backend)
    for i, (t, copy) in enumerate(zip(given, before, strict=True)):
        same(t.detach(), copy, f"input {i} is as it was")
    theirs = _as(case, p, dtype, case.x_layout, case.dout_layout)
    eager = _plain(case, theirs, dtype)
    for unit, other in zip(mine.block.units(), theirs.block.units(), strict=True):
        if unit.num_batches_tracked is not None:
            same(unit.num_batches_tracked, other.num_batches_tracked, "num_batches_tracked")
    assert run.tensors.keys() == eager.tensors.keys()
    for name, got in run.tensors.items():
        want = eager.tensors[name]
        assert (got.shape, got.dtype) == (want.shape, want.dtype), (
            f"{name}: {got.dtype} {got.shape}, eager {want.dtype} {want.shape}"
        )
    # Where a dimension has one element its stride means nothing.
    steps = [
        [step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1]
        for t in (run.tensors["out"], eager.tensors["out"])
    ]
    # Images with batch and channels innermost are channels_last to some of eager's kernels, and not to others, if there is but one.
    if not (FORMS[case.form].preactivated and case.x_layout == "outside in"):
        assert steps[0] == steps[1], f"out: strides {steps[0]}, eager {steps[1]}"
    if case.seed % 4 == 0:
        again, _ = _fused(case, _as(case, p, dtype, case.x_layout, case.dout_layout), dtype, backend)
        for name, got in run.tensors.items():
            same(again.tensors[name], got, f"{name}, a second time")
    if dtype == torch.float64:
        _check_float64(case, backend)
        return
    # One seed tells gross errors, and chance exceeds its limit now and then: what fails is held to the rule on more of them.
    for count in (1, 8, 64):
        failed = _faults(case, backend, range(case.seed, case.seed + count))
        if not failed:
            return
    raise AssertionError("\n".join(failed))


TARGETS = {"blocks": Target(cases, check)}
