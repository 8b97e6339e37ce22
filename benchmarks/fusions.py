"""The fusions that a residual block would like cuDNN to run, at ResNet-50's shapes, each beside plain PyTorch of the same meaning.

`fprop`   y = W * relu(s x + t), sum y, sum y^2                          the preceding BN and ReLU before, statistics behind
`dgrad`   g = dx where s x + t > 0, sum g, sum g (x - mean)              dx = W^T * dy, ReLU' and the sums of BN's backward behind
`tail`    out = relu(s (W * x) + t + skip), its signs                    the block's end behind the last 1x1 convolution
`wgrad`   dW = dy^T relu(s x + t) in fp32                                a 1x1 convolution's, as a matrix product
`masked`  dW = (dy where mask)^T relu(s x + t) in fp32                   likewise, from the gradient behind the outer ReLU

Images are [N, C, H, H] in channels_last, s, t and mean fp32 vectors per channel, sums fp32, signs and masks uint8. What the
convolution reads is rounded to the images' dtype, everything else is computed in fp32. A ReLU keeps NaN, as PyTorch's does, and
ReLU' of NaN is 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SLICE = 4
"""Images at either end of the batch that are computed again in float64."""


def _random(*shape: int, mean: float = 0.0, std: float = 1.0, **options: object) -> Tensor:
    """Normally distributed; on the device `meta`, where arithmetic would make PyTorch import a compiler, just of this shape."""
    found = torch.empty(shape, **options)
    return found if found.is_meta else found.normal_(mean, std)


def _image(n: int, c: int, h: int, **options: object) -> Tensor:
    return _random(n, h, h, c, **options).permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    """The [1, N H W, C] matrix that an image in channels_last is."""
    return image.permute(0, 2, 3, 1).reshape(1, -1, image.shape[1])


def _relu_of_affine(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """relu(s x + t) rounded to x's dtype, in float64."""
    vector = (1, -1, 1, 1)
    return torch.relu(x.double() * s.double().view(vector) + t.double().view(vector)).to(x.dtype).double()


def _normalised(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """s x + t in x's dtype, by PyTorch's BN kernel: for a variance of 1, which has to be summed with an epsilon above 0."""
    epsilon = 2.0**-10
    return F.batch_norm(x, torch.zeros_like(s), torch.full_like(s, 1 - epsilon), s, t, False, 0.0, epsilon)


@dataclass(frozen=True)
class Fusion:
    """A fusion of an unstrided RxR convolution of C into K channels, images of H x H pixels."""

    kind: str
    C: int
    K: int
    H: int
    R: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind} {self.R}x{self.R} {self.C}->{self.K} {self.H}x{self.H}"

    @property
    def images(self) -> dict[str, int]:
        """Channels of the inputs that are images, in the order of the computation."""
        return {
            "fprop": {"x": self.C},
            "dgrad": {"dy": self.K, "x": self.C},
            "tail": {"x": self.C, "skip": self.K},
            "wgrad": {"dy": self.K, "x": self.C},
            "masked": {"dy": self.K, "x": self.C, "mask": self.K},
        }[self.kind]

    @property
    def is_product(self) -> bool:
        return self.kind in ("wgrad", "masked")

    def inputs(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
        """Random inputs; on the device `meta` their shapes alone."""
        found = {name: _image(batch, c, self.H, dtype=dtype, device=device) for name, c in self.images.items() if name != "mask"}
        if self.kind == "masked":
            mask = torch.empty(batch, self.H, self.H, self.K, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
            found["mask"] = mask if mask.is_meta else mask.random_(0, 2)
        if not self.is_product:
            found["w"] = _image(self.K, self.C, self.R, std=(self.C * self.R**2) ** -0.5, dtype=dtype, device=device)
        channels = self.K if self.kind == "tail" else self.C
        found["s"] = _random(channels, mean=1.0, std=0.25, device=device)
        found["t"] = _random(channels, mean=0.2, std=0.5, device=device)
        if self.kind == "dgrad":
            found["mean"] = _random(channels, std=0.25, device=device)
        return found

    def outputs(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
        """Uninitialised outputs, the one of the convolution first."""
        if self.is_product:
            return {"dw": torch.empty(1, self.K, self.C, device=device)}
        c = self.C if self.kind == "dgrad" else self.K
        names = ("y", "sum", "squares") if self.kind == "fprop" else ("g", "sum", "products")
        shape = (batch, self.H, self.H, c)
        image = torch.empty(shape, dtype=dtype, device=device).permute(0, 3, 1, 2)
        if self.kind == "tail":
            return {"out": image, "signs": torch.empty(shape, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)}
        return dict(zip(names, (image, *torch.empty(2, 1, c, 1, 1, device=device)), strict=True))

    def views(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs as the graph takes them: vectors with an image's or a matrix's axes, and a zero to compare with."""
        shape = (1, 1, -1) if self.is_product else (1, -1, 1, 1)
        found = {name: t.view(shape) if t.dim() == 1 else t for name, t in inputs.items()}
        if self.is_product:
            found |= {name: _rows(inputs[name]) for name in self.images}
            found |= {name: found[name].transpose(1, 2) for name in ("dy", "mask") if name in found}
        if self.kind in ("tail", "masked"):
            found["zero"] = torch.zeros(1, device=inputs["s"].device).view(shape)
        return found

    def wire(self, cudnn: object, graph: object, nodes: dict, io: object) -> dict:
        """Make the graph's nodes from those of the inputs; the outputs by name. `io` is cuDNN's name of the images' dtype."""
        single, add = cudnn.data_type.FLOAT, cudnn.reduction_mode.ADD
        geometry = {"padding": [self.R // 2] * 2, "stride": [1, 1], "dilation": [1, 1]}

        def affine(x: object) -> object:
            return graph.add(graph.mul(x, nodes["s"]), nodes["t"])

        if self.kind == "fprop":
            z = graph.relu(affine(nodes["x"])).set_data_type(io)
            # The sums are of y as it is stored: in fp32 it would not be the graph's output.
            y = graph.conv_fprop(image=z, weight=nodes["w"], **geometry).set_data_type(io)
            return {"y": y, "sum": graph.reduction(y, mode=add), "squares": graph.reduction(graph.mul(y, y), mode=add)}
        if self.kind == "dgrad":
            dx = graph.conv_dgrad(loss=nodes["dy"], filter=nodes["w"], **geometry).set_data_type(single)
            dx.set_dim(nodes["x"].get_dim()).set_stride(nodes["x"].get_stride())
            g = graph.relu_backward(dx, affine(nodes["x"])).set_data_type(io)
            products = graph.mul(g, graph.sub(nodes["x"], nodes["mean"]))
            return {"g": g, "sum": graph.reduction(g, mode=add), "products": graph.reduction(products, mode=add)}
        if self.kind == "tail":
            y = graph.conv_fprop(image=nodes["x"], weight=nodes["w"], **geometry).set_data_type(single)
            before = graph.add(affine(y), nodes["skip"])
            return {"out": graph.relu(before), "signs": graph.cmp_gt(before, nodes["zero"])}
        dy = nodes["dy"]
        if self.kind == "masked":
            # A product with the mask would make NaN of infinity where the mask is 0.
            dy = graph.binary_select(dy, nodes["zero"], nodes["mask"]).set_data_type(io)
        return {"dw": graph.matmul(dy, graph.relu(affine(nodes["x"])).set_data_type(io))}

    def ends(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of `SLICE` images at either end of the batch, of all where they are summed over."""
        if self.is_product:
            return inputs
        return {name: slice_of(t) if name in self.images else t for name, t in inputs.items()}

    def exact(self, inputs: dict[str, Tensor]) -> Tensor:
        """The convolution's output in float64."""
        s, t, x = (inputs[name] for name in ("s", "t", "x"))
        if self.kind == "fprop":
            return F.conv2d(_relu_of_affine(x, s, t), inputs["w"].double(), padding=self.R // 2)
        if self.kind == "dgrad":
            dx = F.conv_transpose2d(inputs["dy"].double(), inputs["w"].double(), padding=self.R // 2)
            return dx.masked_fill(x.double() * s.double().view(1, -1, 1, 1) + t.double().view(1, -1, 1, 1) <= 0, 0)
        if self.kind == "tail":
            y = F.conv2d(x.double(), inputs["w"].double())
            return torch.relu(y * s.double().view(1, -1, 1, 1) + t.double().view(1, -1, 1, 1) + inputs["skip"].double())
        dy = inputs["dy"].double()
        dy = dy.masked_fill(inputs["mask"] == 0, 0) if self.kind == "masked" else dy
        return _rows(dy).transpose(1, 2) @ _rows(_relu_of_affine(x, s, t))

    def derived(self, inputs: dict[str, Tensor], first: Tensor) -> dict[str, Tensor]:
        """What the other outputs are if the first is `first`: sums in float64, or the signs."""
        if self.is_product:
            return {}
        if self.kind == "tail":
            return {"signs": (first > 0).to(torch.uint8)}
        first = first.double()
        if self.kind == "fprop":
            other = {"squares": first.square()}
        else:
            other = {"products": first * (inputs["x"].double() - inputs["mean"].double().view(1, -1, 1, 1))}
        return {name: values.sum((0, 2, 3), keepdim=True) for name, values in {"sum": first, **other}.items()}

    def bare(self, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
        """The convolution alone, in PyTorch."""
        if self.kind in ("fprop", "tail"):
            return lambda: F.conv2d(inputs["x"], inputs["w"], padding=self.R // 2)
        return lambda: self._backward(inputs, inputs["dy"], inputs["x"])

    def unfused(self, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
        """The same outputs by PyTorch's kernels one after another, those that eager training runs; returns the first."""
        s, t, x = (inputs[name] for name in ("s", "t", "x"))
        if self.kind == "tail":
            return lambda: _normalised(F.conv2d(x, inputs["w"]), s, t).add_(inputs["skip"]).relu_()
        if self.kind == "fprop":

            def forward() -> Tensor:
                y = F.conv2d(_normalised(x, s, t).relu_(), inputs["w"], padding=self.R // 2)
                _statistics(y)
                return y

            return forward
        if self.kind == "dgrad":
            z, one = _normalised(x, s, t).relu_(), torch.ones_like(s)

            def backward() -> Tensor:
                g = torch.ops.aten.threshold_backward(self._backward(inputs, inputs["dy"], x), z, 0)
                _backward_sums(g, x, inputs["mean"], one)
                return g

            return backward

        def weights() -> Tensor:
            dy = inputs["dy"]
            if self.kind == "masked":
                dy = torch.where(inputs["mask"].view(torch.bool), dy, 0)
            return self._backward(inputs, dy, _normalised(x, s, t).relu_())

        return weights

    def _backward(self, inputs: dict[str, Tensor], dy: Tensor, x: Tensor) -> Tensor:
        """dx, or dW as [1, K, C] of a 1x1 convolution."""
        wanted = [self.kind == "dgrad", self.is_product, False]
        w = inputs["w"] if "w" in inputs else dy.new_empty(self.K, 1, 1, self.C).permute(0, 3, 1, 2)
        padding = [self.R // 2] * 2
        found = torch.ops.aten.convolution_backward(dy, x, w, None, [1, 1], padding, [1, 1], False, [0, 0], 1, wanted)
        return found[1].view(1, self.K, self.C) if self.is_product else found[0]


def slice_of(image: Tensor) -> Tensor:
    """The first and last `SLICE` images, all of a small batch."""
    return image if image.shape[0] <= 2 * SLICE else torch.cat([image[:SLICE], image[-SLICE:]])


def _statistics(y: Tensor) -> tuple:
    """Mean and variance per channel as BN computes them; its own kernel exists on CUDA only."""
    return torch.batch_norm_stats(y, 1e-5) if y.is_cuda else torch.var_mean(y.float(), (0, 2, 3))


def _backward_sums(g: Tensor, x: Tensor, mean: Tensor, one: Tensor) -> tuple:
    if g.is_cuda:
        return torch.batch_norm_backward_reduce(g, x, mean, one, one, True, True, True)
    g = g.float()
    return g.sum((0, 2, 3)), (g * (x - mean.view(1, -1, 1, 1))).sum((0, 2, 3))


def resnet50() -> list[Fusion]:
    """All fusions at the shapes of ResNet-50's four stages, those first that decide most."""
    stages = [(64, 56), (128, 28), (256, 14), (512, 7)]
    wide = [(c, 4 * c, h) for c, h in stages]
    return [
        *(Fusion(kind, c, c, h, 3) for kind in ("fprop", "dgrad") for c, h in stages),
        *(Fusion(kind, *shape) for kind in ("tail", "fprop") for shape in wide),
        *(Fusion("fprop", k, c, h) for c, k, h in wide),
        *(Fusion(kind, *shape) for kind in ("wgrad", "masked", "dgrad") for shape in wide),
    ]
