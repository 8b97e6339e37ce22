"""What the moment form allocates: nothing of the width of x or out but out, dx, and for ResNet-D the pooled x and its gradient."""

import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_res import backends
from fused_res.block.backward import Gradients, backward
from fused_res.block.forward import Saved, forward
from fused_res.primitives.run import of
from fused_res.spec import AvgPool, Block, ConvBN

# At a stride of 2 more pixels are left than `FEW`.
N, SIZE, WIDTH, OUT = 2, 6, 16, 64
# Channels of x, stride of the 3x3 convolution, stride of the projection, pool.
KINDS = {
    "identity": (OUT, 1, None, None),
    "projection": (48, 1, 1, None),
    "strided projection": (48, 2, 2, None),
    "ResNet-D": (48, 2, 1, AvgPool((2, 2), (2, 2), ceil_mode=True, count_include_pad=False)),
}


def unit(outputs, inputs, kernel, stride, dtype):
    weight = torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
    padding = (kernel // 2, kernel // 2)
    return ConvBN(weight.to(dtype), gamma=torch.rand(outputs), beta=torch.rand(outputs), stride=(stride, stride), padding=padding)


def block(kind, dtype):
    inputs, stride, projection, pool = KINDS[kind]
    main = [unit(WIDTH, inputs, 1, 1, dtype), unit(WIDTH, WIDTH, 3, stride, dtype), unit(OUT, WIDTH, 1, 1, dtype)]
    return Block(main, None if projection is None else unit(OUT, inputs, 1, projection, dtype), pool)


class Images(TorchDispatchMode):
    """The images, as matrices or not, that operators make, as (pixels, channels), and how many of WIDTH are there at once."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.wide, self.inner, self.most = sizes, [], [], 0

    def _image(self, shape):
        for n, h, w in self.sizes:
            if len(shape) == 2 and shape[0] == n * h * w:
                return shape
            if len(shape) == 4 and shape[0] == n and (h, w) in (shape[1:3], shape[2:]):
                return n * h * w, shape.numel() // (n * h * w)
        return None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def storages(values):
            return {t.untyped_storage()._cdata for t in tree_leaves(values) if isinstance(t, torch.Tensor)}

        before = storages((args, kwargs))
        made = function(*args, **(kwargs or {}))
        # Triton's interpreter lends its kernels views of what is there. Windows are unfolded of so many images at a time as take
        # 16 MiB, whatever the batch (`fused_res.primitives.products`).
        if function.overloadpacket is torch.ops.aten.set_ or function.name() == "fused_res::im2col":
            return made
        for t in tree_leaves(made):
            if not isinstance(t, torch.Tensor) or t.untyped_storage()._cdata in before:
                continue
            image = self._image(t.shape)
            if image is not None and image[1] > WIDTH:
                self.wide.append(tuple(image))
            elif image is not None and image[1] == WIDTH:
                self.inner = [*(r for r in self.inner if r() is not None), weakref.ref(t.untyped_storage())]
                self.most = max(self.most, len(self.inner))
        return made


def cases():
    """Interpreted ones take seconds: two of them stand for the others, which CI runs."""
    for name, kind, dtype in itertools.product(("native", "triton"), KINDS, (torch.float32, torch.bfloat16)):
        few = name == "native" or (kind, dtype) in {("identity", torch.float32), ("strided projection", torch.bfloat16)}
        yield pytest.param(name, kind, dtype, marks=[] if few else pytest.mark.slow)


@pytest.mark.parametrize(("name", "kind", "dtype"), cases())
def test_only_out_and_dx_are_as_wide_as_x_or_out(name, kind, dtype, request):
    reason = backends.supports(name, torch.device("cpu"), dtype)
    if reason is not None:
        pytest.skip(reason)
    inputs, stride, _, pool = KINDS[kind]
    torch.manual_seed(0)
    parts = block(kind, dtype)
    x = torch.randn(N, inputs, SIZE, SIZE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    small = SIZE // stride
    before, after = N * SIZE**2, N * small**2
    sizes = [(N, SIZE, SIZE), (N, small, small)]
    wants = ConvBN(True, gamma=True, beta=True)
    needs = Gradients(True, False, False, Block([wants] * 3, None if parts.projection is None else wants))
    with torch.no_grad():
        with Images(sizes) as forwards:
            out, saved = forward(x, None, None, parts, "moment", True, of(name))
        dout = torch.randn_like(out)
        kept = Saved.from_list(saved, parts, "moment")
        with Images(sizes) as backwards:
            gradients = backward(dout, x, None, parts, kept, needs, "moment", of(name))
    assert gradients.x.shape == x.shape
    pooled = [] if pool is None else [(after, inputs)]
    assert forwards.wide == [*pooled, (after, OUT)]
    # The pooled x is computed again, and what flows into it needs all of it.
    assert sorted(backwards.wide) == sorted([*pooled, *pooled, (before, inputs)])
    # A convolution of ours holds the gradient that it reads, which the one before has left, and the one that it writes. One of the
    # library also has to be given what ours compute as they read; on a CPU that is a 3x3 one that is strided or in 16 bits.
    librarys = name == "native" and (stride > 1 or dtype != torch.float32)
    assert forwards.most == backwards.most == (3 if librarys else 2)
