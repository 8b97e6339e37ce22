"""`BasicBlock` and `Bottleneck`, torchvision's blocks by constructor and by state dict, and their pre-activation forms, running as
one operator."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fused_res import reference
from fused_res.anatomy import PREACTIVATED, TORCHVISION
from fused_res.fusible import Fusible
from fused_res.identity import last_tensors


def _check_basic(name: str, groups: int, base_width: int, dilation: int) -> None:
    """What torchvision refuses of a block of two 3x3 convolutions."""
    if groups != 1 or base_width != 64:
        raise ValueError(f"{name} only supports groups=1 and base_width=64, got {groups} and {base_width}")
    if dilation > 1:
        raise NotImplementedError(f"Dilation > 1 not supported in {name}, got {dilation}")


def _conv3x3(inputs: int, outputs: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def _conv1x1(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False)


class ResidualBlock(Fusible, nn.Module):
    """What all of them share: `out = relu(a * main(x) + shortcut(x))` over the child modules `conv1 bn1 conv2 bn2 …`, or
    `out = a * main(x) + shortcut(x)` over `norm1 conv1 norm2 conv2 …`.

    The child modules may be replaced at any time. What the operator cannot stand for (another type, a hook, a
    parametrization, …) runs through the child modules themselves, after one warning; `fused_res.explain` tells the reason.
    """

    expansion: int
    depth: int

    def _set_shortcut(self, downsample: nn.Module | None, stride: int, residual_scale: float | None) -> None:
        # Comes last: optimizers number parameters in the order of their registration, which is torchvision's.
        self._set_downsample(downsample)
        self._set_scale(stride, residual_scale)

    def _set_downsample(self, downsample: nn.Module | None) -> None:
        if downsample is not None and not isinstance(downsample, nn.Module):
            raise TypeError(f"downsample: expected an nn.Module or None, got {type(downsample).__name__}")
        self.downsample = downsample

    def _set_scale(self, stride: int, residual_scale: float | None) -> None:
        self.stride = stride
        self._first_scale = None if residual_scale is None else float(residual_scale)
        scale = None if residual_scale is None else nn.Parameter(torch.tensor(self._first_scale))
        self.register_parameter("residual_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)

    def _unfused(self, x: Tensor) -> Tensor:
        form = self._anatomy.form
        return reference.run_modules(x, self._layers(), self.downsample, self.residual_scale, self.relu, form)

    def operands(self, x: Tensor) -> dict:
        """The arguments of `fused_res.functional.residual_block`, beside x, that this block stands for now."""
        shortcut = self._shortcut()
        parts = self._parts(shortcut)
        return {
            "main": parts.main,
            "shortcut": self.downsample(x) if parts.given else parts.projection,
            "pool": parts.pool,
            "residual_scale": self.residual_scale,
            "form": parts.form,
            "names": [*self._labels, shortcut.names],
        }

    def reset_parameters(self) -> None:
        """Give `residual_scale` its first value again; the child modules have `reset_parameters` of their own.

        For a model that was built on the meta device: `to_empty`, then this on every module that has it.
        """
        if self.residual_scale is not None:
            nn.init.constant_(self.residual_scale, self._first_scale)

    def zero_init_last(self) -> None:
        """Set the last BN's gamma to 0, so that the block starts as `relu(shortcut(x))` (https://arxiv.org/abs/1706.02677).

        A pre-activation block ends in a convolution: its weight becomes 0, and the bias if it has one.

        torchvision's `ResNet(..., zero_init_residual=True)` does this for its own classes only; for whole networks there is
        `fused_res.zero_init_residual`.

        Raises:
            RuntimeError: the last BN has no gamma.
        """
        for tensor in last_tensors(self, self._anatomy):
            nn.init.zeros_(tensor)

    def extra_repr(self) -> str:
        return "" if self.residual_scale is None else "residual_scale=True"


def _scripted(self, x: Tensor) -> Tensor:
    out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
    if hasattr(self, "conv3"):
        out = self.bn3(self.conv3(self.relu(out)))
    if self.residual_scale is not None:
        out = self.residual_scale * out
    if self.downsample is not None:
        x = self.downsample(x)
    return self.relu((out + x).to(out.dtype))


# TorchScript compiles the source of what a function wraps: here the child modules, as eager calls them.
ResidualBlock.forward.__wrapped__ = _scripted


class PreActBlock(ResidualBlock):
    """What the pre-activation blocks share."""

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)


def _scripted_preactivated(self, x: Tensor) -> Tensor:
    activated = self.relu(self.norm1(x))
    out = self.conv2(self.relu(self.norm2(self.conv1(activated))))
    if hasattr(self, "conv3"):
        out = self.conv3(self.relu(self.norm3(out)))
    if self.residual_scale is not None:
        out = self.residual_scale * out
    if self.downsample is not None:
        x = self.downsample(activated)
    return (out + x).to(out.dtype)


PreActBlock.forward.__wrapped__ = _scripted_preactivated


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions: `relu(a * bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))` (https://arxiv.org/abs/1512.03385).

    Args:
        inplanes: channels of x.
        planes: channels of both convolutions and of the output.
        stride: of conv1.
        downsample: the shortcut; None for the identity. `Sequential([AvgPool2d or Identity,] Conv2d, BatchNorm2d)` becomes
            part of the operator, anything else runs by itself and is added.
        groups, base_width, dilation: must be 1, 64 and 1, as in torchvision.
        norm_layer: makes the normalisation from a number of channels; nn.BatchNorm2d if None. Others run unfused.
        residual_scale: initial value of a learnable scalar a (0.0 starts as `relu(shortcut(x))`); None for none. A parameter
            `residual_scale` is in the state dict only if it is asked for.

    Shapes: x [N, inplanes, H, W] to [N, planes, ceil(H / stride), ceil(W / stride)], in x's dtype (autocast's under autocast).

    Raises:
        ValueError, NotImplementedError: groups, base_width or dilation that torchvision's refuses.
        TypeError: a downsample that is not a module.
    """

    expansion = 1
    depth = 2
    _anatomy = TORCHVISION[2]._replace(residual_scale="residual_scale")

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        residual_scale: float | None = None,
    ) -> None:
        _check_basic("BasicBlock", groups, base_width, dilation)
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self._set_shortcut(downsample, stride, residual_scale)


class Bottleneck(ResidualBlock):
    """1x1, 3x3, 1x1 with the stride on the 3x3 ("v1.5"): `relu(a * bn3(conv3(…)) + shortcut(x))` (https://arxiv.org/abs/1512.03385).

    Args:
        inplanes: channels of x.
        planes: a quarter of the output's channels; the inner width is `int(planes * base_width / 64) * groups`.
        stride, groups, dilation: of conv2.
        base_width: see planes.
        downsample, norm_layer, residual_scale: as for `BasicBlock`.

    Shapes: x [N, inplanes, H, W] to [N, 4 * planes, ceil(H / stride), ceil(W / stride)], in x's dtype (autocast's under
    autocast).

    Raises:
        TypeError: a downsample that is not a module.
    """

    expansion = 4
    depth = 3
    _anatomy = TORCHVISION[3]._replace(residual_scale="residual_scale")

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        residual_scale: float | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = _conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = _conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self._set_shortcut(downsample, stride, residual_scale)


class PreActBasicBlock(PreActBlock):
    """Pre-activation, two 3x3 convolutions (https://arxiv.org/abs/1603.05027): with `z = relu(norm1(x))`,
    `a * conv2(relu(norm2(conv1(z)))) + x`, or `… + downsample(z)`.

    Child names and state dict are those of timm's `resnetv2.PreActBasic` with BatchNorm.

    Args:
        inplanes: channels of x, and of norm1.
        planes: channels of both convolutions and of the output.
        stride: of conv1.
        downsample: the shortcut, of `relu(norm1(x))`; None for the identity, of x itself. A `Conv2d`, or
            `Sequential([AvgPool2d or Identity,] Conv2d)`, or timm's, become part of the operator; with anything else the block runs
            through its child modules.
        groups, base_width, dilation: must be 1, 64 and 1, as for `BasicBlock`.
        norm_layer: makes the normalisation from a number of channels; nn.BatchNorm2d if None. Others run unfused.
        residual_scale: initial value of a learnable scalar a (0.0 starts as the shortcut); None for none.

    Shapes: x [N, inplanes, H, W] to [N, planes, ceil(H / stride), ceil(W / stride)], in x's dtype. Under autocast x has to be in
    its dtype already: the BN of images in float32 would be in float32, and the block runs unfused.

    Raises:
        ValueError, NotImplementedError: groups, base_width or dilation that `BasicBlock` refuses.
        TypeError: a downsample that is not a module.
    """

    expansion = 1
    depth = 2
    _anatomy = PREACTIVATED[2]._replace(residual_scale="residual_scale")

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        residual_scale: float | None = None,
    ) -> None:
        _check_basic("PreActBasicBlock", groups, base_width, dilation)
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        self._set_downsample(downsample)  # first, as in timm
        self.norm1 = norm_layer(inplanes)
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.norm2 = norm_layer(planes)
        self.conv2 = _conv3x3(planes, planes)
        self.relu = nn.ReLU(inplace=True)
        self._set_scale(stride, residual_scale)


class PreActBottleneck(PreActBlock):
    """Pre-activation, 1x1, 3x3, 1x1 with the stride on the 3x3 (https://arxiv.org/abs/1603.05027): with `z = relu(norm1(x))`,
    `a * conv3(relu(norm3(conv2(relu(norm2(conv1(z))))))) + x`, or `… + downsample(z)`.

    Child names and state dict are those of timm's `resnetv2.PreActBottleneck` with BatchNorm.

    Args:
        inplanes: channels of x, and of norm1.
        planes: a quarter of the output's channels; the inner width is `int(planes * base_width / 64) * groups`.
        stride, groups, dilation: of conv2.
        base_width: see planes.
        downsample, norm_layer, residual_scale: as for `PreActBasicBlock`.

    Shapes: x [N, inplanes, H, W] to [N, 4 * planes, ceil(H / stride), ceil(W / stride)], in x's dtype, as for `PreActBasicBlock`.

    Raises:
        TypeError: a downsample that is not a module.
    """

    expansion = 4
    depth = 3
    _anatomy = PREACTIVATED[3]._replace(residual_scale="residual_scale")

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        residual_scale: float | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self._set_downsample(downsample)
        self.norm1 = norm_layer(inplanes)
        self.conv1 = _conv1x1(inplanes, width)
        self.norm2 = norm_layer(width)
        self.conv2 = _conv3x3(width, width, stride, groups, dilation)
        self.norm3 = norm_layer(width)
        self.conv3 = _conv1x1(width, planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self._set_scale(stride, residual_scale)
