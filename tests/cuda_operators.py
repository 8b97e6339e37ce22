"""The compiled operators as they run on a GPU, by their kernels on the CPU: what torch.ops.fused_res has, less the checks."""

from collections import Counter
from types import SimpleNamespace

import cuda_emulator
import cuda_products
import torch
from cuda_emulator import Emulator, build, number

FINALIZE = ("moments_finalize", "scaled_weight", "tail_finalize", "move_statistics")


def sampling(image, down, right):
    """The numbers of a `Sampling`, and how many pixels it has."""
    n, height, width, _ = image.shape
    lines, pixels = -(-height // down), -(-width // right)
    return (height * width, width, lines * pixels, pixels, min(down, height), min(right, width)), n * lines * pixels


class Finalize:
    """The steps of the moment form between its passes, and `move_statistics`."""

    def __init__(self, folder):
        self.emulator = Emulator(build(folder, "cuda_finalize"), FINALIZE)

    def _pixels(self, z, vectors, down, right, tf32):
        sampled, count = sampling(z, down, right)
        return (z, vectors), (number(z), *sampled, count, z.shape[-1], tf32)

    def moments_finalize_direct(
        self, mean, covariance, z, z_vectors, down, right, tf32, weight, gamma, beta, eps, residual_scale, ratio, **options
    ):
        buffers, integers = self._pixels(z, z_vectors, down, right, tf32)
        channels = weight.shape[0]
        vectors, suspect = torch.empty(5, channels), torch.empty(channels, dtype=torch.bool)
        numbers = torch.tensor([eps, ratio], dtype=torch.float64)
        parameters = gamma, beta, residual_scale
        self.emulator.run(
            "moments_finalize",
            (*integers, channels, number(weight), *map(number, parameters)),
            (numbers, *buffers, weight, mean, covariance, *parameters, vectors, suspect),
            (vectors, suspect),
            **options,
        )
        return vectors, suspect

    def scaled_weight(self, weight, vectors, tf32, **options):
        scaled = torch.empty_like(weight)
        self.emulator.run("scaled_weight", (number(weight), *weight.shape, tf32), (weight, vectors, scaled), (scaled,), **options)
        return scaled

    def pointwise_tail_backward_finalize_direct(
        self,
        total,
        product,
        dout,
        signs,
        z,
        z_vectors,
        down,
        right,
        tf32,
        mean,
        covariance,
        suspect,
        weight,
        vectors,
        scaled,
        gamma,
        beta,
        residual_scale,
        ratio,
        **options,
    ):
        buffers, integers = self._pixels(z, z_vectors, down, right, tf32)
        channels, depth = weight.shape
        coefficients, dweight = torch.empty(4, channels), torch.empty_like(weight)
        if covariance is None:
            scaled = None
        quadratic = None if scaled is None else torch.empty(depth, depth, dtype=weight.dtype)
        constant = None if scaled is None else torch.empty(depth)
        parameters = weight, scaled, dout, gamma, beta, residual_scale
        outputs = [t for t in (coefficients, dweight, quadratic, constant) if t is not None]
        ratio = torch.tensor([ratio], dtype=torch.float64)
        rest = signs, total, product, mean, covariance, suspect, vectors, coefficients, dweight, quadratic, constant
        integers = (*integers, channels, *map(number, parameters))
        self.emulator.run("tail_finalize", integers, (ratio, *buffers, *parameters, *rest), outputs, **options)
        return dweight, coefficients, quadratic, constant

    @property
    def move_statistics(self):
        return SimpleNamespace(default=self._move_statistics)

    def _move_statistics(self, means, variances, counts, vectors, pixels, momenta):
        """In place: the kernel writes to other memory, which is copied back. Every unit must have a counter."""
        integers, buffers, written, first = [len(means)], [], [], {}
        for i, (mean, var, count) in enumerate(zip(means, variances, counts, strict=True)):
            shared = first.setdefault(mean.data_ptr(), i)
            integers += [-1 if shared == i else shared, mean.numel(), pixels[i]]
            buffers += [torch.tensor([momenta[i]], dtype=torch.float64), vectors[i]]
            if shared == i:
                integers += [number(mean), number(var)]
                for buffer in (mean, var, count):
                    written.append((buffer, torch.empty_like(buffer)))
                    buffers += written[-1]
        self.emulator.run("move_statistics", integers, buffers, [out for _, out in written])
        for buffer, out in written:
            buffer.copy_(out)

    def close(self):
        self.emulator.close()


class Pointwise:
    """1x1 `conv_fprop` and `pointwise_tail`."""

    def __init__(self, folder):
        self.emulator = Emulator(build(folder, "cuda_pointwise", "-O0"), cuda_products.POINTWISE)

    def pointwise_fprop(self, x, x_vectors, down, right, weight, statistics, **options):
        y, partials = cuda_products.run_fprop(self.emulator, x, weight, x_vectors, (down, right), statistics, **options)
        return y, partials, cuda_products.ROWS

    def pointwise_tail(
        self,
        z,
        z_vectors,
        down,
        right,
        weight,
        vectors,
        skip,
        y2,
        x,
        x_vectors,
        x_down,
        x_right,
        weight2,
        vectors2,
        keep_signs,
        **options,
    ):
        main, side = (z, z_vectors, weight, vectors), None
        if x is not None:
            side, vectors2 = (x, x_vectors, weight2, vectors2), None
        joins = {"skip": skip, "y2": y2, "vectors2": vectors2, "projection": side, "signs": keep_signs}
        strides = {"main_stride": (down, right), "stride": (x_down, x_right)}
        return cuda_products.run_tail(self.emulator, main, **joins, **strides, **options)

    def close(self):
        self.emulator.close()


class Moments:
    """`moments`, of TF32 where z is float32."""

    def __init__(self, folder):
        self.emulator = Emulator(build(folder, "cuda_moments", "-O0"), ("moments",))

    def moments(self, z, z_vectors, down, right, **options):
        channels = z.shape[-1]
        mean, covariance = (torch.empty(*shape, dtype=torch.float64) for shape in ((channels,), (channels, channels)))
        numbers = (number(z), *z.shape, down, right)
        self.emulator.run("moments", numbers, (z, z_vectors, mean, covariance), (mean, covariance), **options)
        return mean, covariance

    def close(self):
        self.emulator.close()


class TailBackward:
    """The passes of `pointwise_tail_backward`, of TF32 where z is float32."""

    def __init__(self, folder):
        self.emulator = Emulator(build(folder, "cuda_tail_backward", "-O0"), ("reduce", "apply"))

    def pointwise_tail_backward_reduce(self, dout, signs, z, z_vectors, down, right, mean, scaled, **options):
        channels, inner = dout.shape[1], z.shape[-1]
        total, product = (torch.empty(*shape, dtype=torch.float64) for shape in ((channels,), (channels, inner)))
        through = None
        if scaled is not None and max(channels, inner) <= 64:
            through = torch.empty(len(dout), inner, dtype=z.dtype)
        outputs = [t for t in (total, product, through) if t is not None]
        numbers = (number(z), channels, *z.shape, down, right)
        buffers = (dout, signs, z, z_vectors, scaled, through, mean, total, product)
        self.emulator.run("reduce", numbers, buffers, outputs, **options)
        return total, product, through

    def pointwise_tail_backward_apply(
        self,
        dz,
        through,
        dout,
        signs,
        z,
        z_vectors,
        down,
        right,
        scaled,
        mean,
        quadratic,
        constant,
        inner,
        joins,
        **options,
    ):
        """In place: the kernel writes to other memory, which is copied back."""
        rows, channels = dout.shape
        out, partials = torch.empty_like(dz), torch.empty(-(-rows // 128), 2, z.shape[-1]) if inner else None
        numbers = (number(z), channels, *z.shape, down, right, dz.numel() * dz.element_size())
        before = dz if joins else None
        if joins:
            through = None
        buffers = (dout, signs, z, z_vectors, scaled, mean, quadratic, constant, through, before, out, partials)
        self.emulator.run("apply", numbers, buffers, [t for t in (out, partials) if t is not None], **options)
        dz.copy_(out)
        return partials

    def close(self):
        self.emulator.close()


class Normalisation:
    """The steps of BN, ReLU and shortcut that go over activations."""

    def __init__(self, folder):
        self.emulator = Emulator(build(folder))

    def bn_stats(self, y):
        tiles = torch.empty(2, dtype=torch.int64)
        self.emulator.run("row_tiles", tuple(y.shape), (tiles,), (tiles,))
        rows = int(tiles[1])
        return cuda_emulator.run_stats(self.emulator, y, rows), rows

    def bn_finalize(self, partials, rows, pixels, gamma, beta, eps, residual_scale):
        assert eps == 1e-5, "which the program takes for granted"
        tiles, _, channels = partials.shape
        vectors, parameters = torch.empty(5, channels), (gamma, beta, residual_scale)
        numbers = (*map(number, parameters), tiles, rows, pixels - rows * (tiles - 1), pixels, channels)
        self.emulator.run("bn_finalize", numbers, (partials, *parameters, vectors), (vectors,))
        return vectors

    def bn_act(self, y, vectors, skip, y2, vectors2, keep_signs, relu=True):
        assert relu
        return cuda_emulator.run_act(self.emulator, y, vectors, skip, y2, vectors2, keep_signs)

    def bn_act_backward_reduce(self, dout, y, vectors, signs, y2, vectors2):
        tiles = torch.empty(2, dtype=torch.int64)
        self.emulator.run("row_tiles", tuple(y.shape), (tiles,), (tiles,))
        return cuda_emulator.run_reduce(self.emulator, dout, y, vectors, signs, y2, vectors2, int(tiles[1]))

    def bn_act_backward_finalize(self, partials, row, pixels, vectors, gamma, beta, residual_scale, training):
        tiles, sums, channels = partials.shape
        out, parameters = torch.empty(7, channels), (gamma, beta, residual_scale)
        numbers = (*map(number, parameters), tiles, pixels, sums, row, channels, training)
        self.emulator.run("bn_act_backward_finalize", numbers, (partials, vectors, *parameters, out), (out,))
        return out

    def bn_act_backward_apply(self, dout, y, vectors, c, signs, training, y2, c2, training2, keep_masked):
        return cuda_emulator.run_apply(self.emulator, dout, y, vectors, c, signs, training, y2, c2, training2, keep_masked)

    @property
    def masked_add(self):
        return SimpleNamespace(default=self._masked_add)

    def _masked_add(self, dx, image, signs, down, right):
        dx.copy_(cuda_emulator.run_add(self.emulator, dx, image, signs, (down, right)))

    def close(self):
        self.emulator.close()


class Together:
    """All that several of these have; each names its operators. `calls`: how often each was asked for."""

    def __init__(self, *parts):
        self._parts = parts
        self.calls = Counter()

    def __getattr__(self, name):
        part = next((part for part in self._parts if hasattr(type(part), name)), None)
        if part is None:
            raise AttributeError(name)
        self.calls[name] += 1
        return getattr(part, name)

    def close(self):
        for part in self._parts:
            part.close()
