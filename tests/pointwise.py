"""Operands of a 1x1 convolution: what the tests of the moment form share."""

import convolutions
import torch

from fused_res.primitives.operands import Activation
from fused_res.primitives.run import of


def statistics(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class Draw(convolutions.Draw):
    def opened(self, pixels, channels):
        return torch.rand(pixels, channels, generator=self.generator).to(self.device) > 0.4

    def activation(self, n, channels, h, w, dtype, *, prologue=True, stride=(1, 1), mean=0.0):
        """An operand; one without a prologue has the mean."""
        if prologue:
            return Activation(
                self.normal(n, channels, h, w, dtype=dtype), self.normal(5, channels, dtype=statistics(dtype)), stride
            )
        return Activation((self.normal(n, channels, h, w, dtype=torch.float64) + mean).to(dtype), None, stride)


def exact_rows(z, backend):
    """The rows of an operand as the backend itself makes them, in float64."""
    return Activation(z.image, z.vectors, z.stride).rows(of(backend)).double()


def run_with_threads(run):
    """The results with 1, 2 and 5 threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results
