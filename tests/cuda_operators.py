"""The compiled operators as they run on a GPU, by their kernels on the CPU: what torch.ops.fused_res has, less the checks."""

from types import SimpleNamespace

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
