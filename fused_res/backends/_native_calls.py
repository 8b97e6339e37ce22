"""How primitives whose arguments are operands call the compiled operators, which take tensors and numbers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_res.backends import native
from fused_res.layout import nhwc, to_image, to_rows
from fused_res.primitives.conv_dgrad import Inflow
from fused_res.primitives.conv_fprop import Convolved, finished
from fused_res.primitives.moments import SUSPECT, Moments
from fused_res.primitives.moments import plain as plain_moments
from fused_res.primitives.move_statistics import Move
from fused_res.primitives.operands import Activation, Addend, Gradient, Output
from fused_res.primitives.pointwise_direct import pointwise_direct_stats, pointwise_direct_sums
from fused_res.primitives.pointwise_tail import Joined, Pointwise
from fused_res.primitives.pointwise_tail import plain as plain_tail
from fused_res.primitives.pointwise_tail_backward import Sums, TailGradients, plain_apply, plain_reduce
from fused_res.primitives.run import of
from fused_res.primitives.step import Step
from fused_res.spec import ConvBN

_RUN = of("native")


def _pixels_first(image: Tensor) -> Tensor:
    """[N, C, H, W] as a contiguous [N, H, W, C]; a view where the image is channels_last."""
    return nhwc(image).permute(0, 2, 3, 1).contiguous()


def _activation(z: Activation) -> tuple:
    return _pixels_first(z.image), z.vectors, *z.stride


def _gradient(dy: Gradient) -> tuple:
    if dy.coefficients is None:
        return _pixels_first(dy.image), None, None, None, None, True
    return _pixels_first(dy.image), _pixels_first(dy.y), dy.vectors, dy.coefficients, dy.signs, dy.training


def _matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1).contiguous()


def _filter(weight: Tensor) -> Tensor:
    """[K, C, 3, 3] as a contiguous [K, 3, 3, C]; a view where the weight is channels_last."""
    return weight.permute(0, 2, 3, 1).contiguous()


def _rows(image: Tensor | None) -> Tensor | None:
    return None if image is None else to_rows(image)


def _on_gpu(tensor: Tensor) -> bool:
    """Whether the compiled CUDA kernels run; they decide on the device which channels need a direct pass."""
    return tensor.is_cuda


def _tf32(image: Tensor) -> bool:
    """Whether the moment form's products on the GPU round float32 to TF32: all of its steps do, or none."""
    wide = image.dtype == torch.float32 and _on_gpu(image)
    return wide and native.multiplies(torch.float32) and not native.before_ampere(image.device)


def _formula(image: Tensor) -> bool:
    """Whether the GPU's tensor cores may not multiply it: float32 that is not to be rounded."""
    return _on_gpu(image) and image.dtype == torch.float32 and not _tf32(image)


def multiplied(weight: Tensor) -> Tensor:
    if not _tf32(weight):
        return weight
    return torch.ops.fused_res.scaled_weight(_matrix(weight), None, True).view_as(weight)


def scaled_weight(branch: Pointwise) -> Tensor:
    return torch.ops.fused_res.scaled_weight(_matrix(branch.weight), branch.vectors, _tf32(branch.weight))


def moments(z: Activation) -> tuple[Tensor, Tensor]:
    if _formula(z.image):
        return plain_moments(z, _RUN)
    return torch.ops.fused_res.moments(*_activation(z))


def moments_finalize(found: Moments, z: Activation, unit: ConvBN, residual_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    affine = unit.gamma, unit.beta, unit.eps, residual_scale, SUSPECT
    if _on_gpu(z.image):
        operands = *found, *_activation(z), _tf32(z.image), _matrix(unit.weight)
        return torch.ops.fused_res.moments_finalize_direct(*operands, *affine)
    finalize = torch.ops.fused_res.moments_finalize
    vectors, suspect, suspects = finalize(*found, _matrix(unit.weight), *affine, None)
    if suspects:
        direct = pointwise_direct_stats(z, unit.weight, suspect, run=_RUN)
        vectors, *_ = finalize(*found, _matrix(unit.weight), *affine, direct)
    return vectors, suspect


def _tail(main: Pointwise, shortcut: Joined, keep_signs: bool) -> tuple[Tensor, Tensor | None]:
    projection, x, weight2, vectors2 = shortcut.projection, (None, None, 1, 1), None, shortcut.vectors2
    if projection is not None:
        x, weight2, vectors2 = _activation(projection.z), _matrix(projection.weight), projection.vectors
    return torch.ops.fused_res.pointwise_tail(
        *_activation(main.z),
        _matrix(main.weight),
        main.vectors,
        _rows(shortcut.skip),
        _rows(shortcut.y2),
        *x,
        weight2,
        vectors2,
        keep_signs,
    )


def pointwise_tail(main: Pointwise, shortcut: Joined, keep_signs: bool) -> tuple[Tensor, Tensor | None]:
    if _formula(main.z.image):
        return plain_tail(main, shortcut, keep_signs, _RUN)
    out, signs = _tail(main, shortcut, keep_signs)
    n, _, h, w = main.z.image.shape
    return to_image(out, n, h, w), signs


def pointwise_tail_backward_reduce(
    dout: Tensor, signs: Tensor, z: Activation, mean: Tensor | None, scaled: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if _formula(z.image):
        return plain_reduce(dout, signs, z, mean, _RUN)
    return torch.ops.fused_res.pointwise_tail_backward_reduce(to_rows(dout), signs, *_activation(z), mean, scaled)


def pointwise_tail_backward_finalize(
    sums: Sums,
    found: Moments | None,
    branch: Pointwise,
    scaled: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual_scale: Tensor | None,
    dout: Tensor,
    signs: Tensor,
    suspect: Tensor | None,
) -> TailGradients:
    z, weight, vectors = branch
    mean, covariance = (None, None) if found is None else found
    parameters = gamma, beta, residual_scale, SUSPECT
    if _on_gpu(dout):
        operands = sums.total, sums.product, to_rows(dout), signs, *_activation(z), _tf32(z.image), mean, covariance
        finalize = torch.ops.fused_res.pointwise_tail_backward_finalize_direct
        results = finalize(*operands, suspect, _matrix(weight), vectors, scaled, *parameters)
    else:
        arguments = sums.total, sums.product, z.pixels, covariance, _matrix(weight), vectors, scaled
        finalize = torch.ops.fused_res.pointwise_tail_backward_finalize
        *results, suspect, suspects = finalize(*arguments, *parameters, None)
        if suspects:
            direct = pointwise_direct_sums(dout, signs, z, weight, vectors[0], suspect, run=_RUN)
            *results, _, _ = finalize(*arguments, *parameters, direct)
    dweight, coefficients, quadratic, constant = results
    mean = None if quadratic is None else mean
    return TailGradients(dweight.view_as(weight), *coefficients.unbind(), mean, quadratic, constant)


def pointwise_tail_backward_apply(
    dout: Tensor,
    signs: Tensor,
    z: Activation,
    scaled: Tensor,
    through: Tensor | None,
    gradients: TailGradients,
    inner: bool,
    into: Tensor | None,
) -> Inflow:
    if _formula(z.image):
        return plain_apply(dout, signs, z, scaled, gradients, inner, into, _RUN)
    rows = to_rows(dout)
    if into is not None:
        dz = into.permute(0, 2, 3, 1)
    elif through is not None and through.dtype == scaled.dtype:
        dz = through
    else:
        dz = rows.new_empty(rows.shape[0], scaled.shape[1])
    partials = torch.ops.fused_res.pointwise_tail_backward_apply(
        dz,
        through,
        rows,
        signs,
        *_activation(z),
        scaled,
        gradients.mean,
        gradients.quadratic,
        gradients.constant,
        inner,
        into is not None,
    )
    if into is not None:
        return Inflow(into)
    n, _, h, w = dout.shape
    return Inflow(to_image(dz, n, h, w), partials, inner and _on_gpu(dout))


def masked_add(dx: Tensor, image: Tensor, signs: Tensor | None, stride: tuple[int, int]) -> None:
    torch.ops.fused_res.masked_add.default(dx.permute(0, 2, 3, 1), _pixels_first(image), signs, *stride)


def _is_plain(buffer: Tensor, like: Tensor) -> bool:
    """Whether the kernel may write to the buffer of a BN: dense, of no autograd graph, and where the vectors are."""
    if type(buffer) is not Tensor or buffer.requires_grad or buffer.is_inference() or not buffer.is_contiguous():
        return False
    return buffer.is_cuda == like.is_cuda and buffer.is_cpu == like.is_cpu


def move_statistics(moves: Sequence[Move]) -> bool:
    means, variances, counts, vectors, pixels, momenta = [], [], [], [], [], []
    for unit, found, count in moves:
        batches, mean = unit.num_batches_tracked, unit.running_mean
        if batches is not None:
            if batches.dtype != torch.int64 or batches.dim() != 0:
                return False
            counts.append(batches)
        if mean is None:
            continue
        if unit.bias is not None or type(unit.momentum) is not float:
            return False
        means.append(mean)
        variances.append(unit.running_var)
        vectors.append(found)
        pixels.append(count)
        momenta.append(unit.momentum)
    written, like = [*means, *variances, *counts], moves[0].vectors
    for buffer in written:
        if not _is_plain(buffer, like):
            return False
    if written:
        torch.ops.fused_res.move_statistics.default(means, variances, counts, vectors, pixels, momenta)
        torch.autograd.graph.increment_version(written)
    return True


def conv_fprop(x: Activation, unit: ConvBN, statistics: bool, output: Output | None) -> Convolved:
    if output is not None and not output.relu:  # for which these kernels have no epilogue
        return Convolved(finished(conv_fprop(x, unit, False, None).image, output, run=_RUN))
    if not unit.is_pointwise():
        finish = (None,) * 4 if output is None else (output.vectors, _rows(output.skip), _rows(output.y2), output.vectors2)
        image, vectors, *_ = _activation(x)
        y, partials, rows = torch.ops.fused_res.winograd_fprop(
            image, vectors, _filter(unit.weight), *unit.padding, statistics, *finish
        )
        return Convolved(y.permute(0, 3, 1, 2), partials, rows if statistics else 0)
    sample = Activation(x.image, x.vectors, unit.stride)
    n, _, h, w = x.image.shape
    size = n, *unit.output_size(h, w)
    if output is not None:
        main, shortcut = Pointwise(sample, unit.weight, output.vectors), Joined(output.skip, output.y2, output.vectors2)
        return Convolved(to_image(_tail(main, shortcut, False)[0], *size))
    y, partials, rows = torch.ops.fused_res.pointwise_fprop(*_activation(sample), _matrix(unit.weight), statistics)
    return Convolved(to_image(y, *size), partials, rows if statistics else 0)


def conv_dgrad(dy: Gradient, like: Tensor, unit: ConvBN, inner: Activation | None, add: Addend | None) -> Inflow:
    below = (None, None) if inner is None else (_pixels_first(inner.image), inner.vectors)
    joins = (None, None, 1, 1) if add is None else (_pixels_first(add.image), add.signs, *add.stride)
    if unit.is_pointwise():
        dx, partials = torch.ops.fused_res.pointwise_dgrad(*_gradient(dy), _matrix(unit.weight), *below, *joins)
    else:
        filters = _filter(unit.weight), *unit.padding
        dx, partials = torch.ops.fused_res.winograd_dgrad(*_gradient(dy), *filters, *below, *joins)
    return Inflow(dx.permute(0, 3, 1, 2), partials)


def conv_wgrad(dy: Gradient, x: Activation, unit: ConvBN) -> Tensor:
    if not unit.is_pointwise():
        image, vectors, *_ = _activation(x)
        return torch.ops.fused_res.winograd_wgrad(*_gradient(dy), image, vectors, *unit.padding).permute(0, 3, 1, 2)
    sample = Activation(x.image, x.vectors, unit.stride)
    return torch.ops.fused_res.pointwise_wgrad(*_gradient(dy), *_activation(sample)).view_as(unit.weight)


def conv_bn_act(unit: ConvBN, vectors: Tensor, relu: bool) -> Step:
    pointwise = unit.is_pointwise()
    if not (pointwise or relu):
        raise ValueError("relu: expected with a 3x3 convolution")
    prepare = torch.ops.fused_res.pointwise_prepare if pointwise else torch.ops.fused_res.winograd_prepare
    call = torch.ops.fused_res.pointwise_bn_act.default if pointwise else torch.ops.fused_res.winograd_bn_act.default
    prepared = prepare.default(_matrix(unit.weight) if pointwise else _filter(unit.weight))
    channels, (down, right) = unit.weight.shape[0], unit.stride if pointwise else unit.padding

    def step(x: Tensor, skip: Tensor | None) -> Tensor:
        arguments = _pixels_first(x), prepared, channels, down, right, vectors, _rows(skip)
        if not pointwise:
            return call(*arguments).permute(0, 3, 1, 2)
        out = call(*arguments, relu)
        n, _, h, w = x.shape
        return to_image(out, n, -(-h // down), -(-w // right))

    return Step(step, (prepared, vectors))


def unfolded_bn_act(unit: ConvBN, vectors: Tensor, relu: bool) -> Step:
    """`conv_bn_act` of any ungrouped convolution, as a 1x1 one over its windows."""
    prepared = torch.ops.fused_res.pointwise_prepare.default(unit.weight.permute(0, 2, 3, 1).flatten(1).contiguous())
    channels, _, *kernel = unit.weight.shape
    numbers = channels, *kernel, *unit.stride, *unit.padding, *unit.dilation
    call = torch.ops.fused_res.unfolded_bn_act.default

    def step(x: Tensor, skip: Tensor | None) -> Tensor:
        out = call(nhwc(x), prepared, *numbers, vectors, _rows(skip), relu)
        return to_image(out, x.shape[0], *unit.output_size(*x.shape[2:]))

    return Step(step, (prepared, vectors))


def onednn_bn_act(geometry: tuple, relu: bool) -> Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]:
    """oneDNN's convolution with a shift and a shortcut, and the ReLU: of x, weight, shift, shortcut, and whether it is written to.

    geometry: padding, stride and dilation as lists, and groups.
    """
    apart, onto = torch.ops.fused_res.onednn_bn_act.default, torch.ops.fused_res.onednn_bn_act_.default

    def call(x: Tensor, weight: Tensor, shift: Tensor, skip: Tensor | None, spare: bool) -> Tensor:
        if skip is None or not spare:
            return apart(x, weight, shift, skip, *geometry, relu)
        onto(skip, x, weight, shift, *geometry, relu)
        return skip

    return call
