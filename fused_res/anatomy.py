"""Which child modules of a residual block are what, by their names: what `fused_res.fuse` knows of other people's blocks."""

from typing import NamedTuple

from torch import nn

from fused_res.spec import FORMS, POST_ACTIVATION, PRE_ACTIVATION

PROTOCOL = "fused_res_anatomy"
"""The attribute by which a class of blocks says what its anatomy is."""


class Anatomy(NamedTuple):
    """The children of a block `out = relu(a * main(x) + shortcut(x))`, main being `conv-BN-ReLU-…-conv-BN`, or of another form.

    A class whose `forward` computes that gets fused by `fused_res.fuse` if it has one of these as its attribute
    `fused_res_anatomy`, set in its body or afterwards::

        class Block(nn.Module):
            fused_res_anatomy = fused_res.Anatomy(
                units=(("conv1", "bn1"), ("conv2", "bn2")), shortcut="shortcut", activations=("relu",)
            )

    `fuse` traces `forward` and compares, so that an anatomy that is not the truth is refused.

    Names are those of children, such as "conv1", or of theirs, such as "layer.0.conv", where what lies between is an
    `nn.Sequential` and has no other children than those that are named.

    units: convolution and BN, first to last. shortcut: a child that may be None (the identity), or None where there is never one.
    activations: the children that are called as ReLUs; none where `forward` calls a function. idle: children that may be there for
    other blocks of the class and must do nothing in one that is fused: None, `nn.Identity`, or a layer that drops nothing now.
    activated_norms: whether all BNs of `units` that a ReLU follows go on to one of their own, the ReLU behind a sum apart.
    residual_scale: the name of the parameter a. form: what `forward` computes, as `fused_res.residual_block` says; in a
    "pre-activation" block the BN of each unit is called before its convolution.
    """

    units: tuple[tuple[str, str], ...]
    shortcut: str | None = "downsample"
    activations: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    activated_norms: bool = False
    residual_scale: str | None = None
    form: str = POST_ACTIVATION

    def names(self) -> list[str]:
        """Of all children, the shortcut's last."""
        found = [name for unit in self.units for name in unit]
        return [*found, *self.activations, *self.idle, *([] if self.shortcut is None else [self.shortcut])]


def containers(anatomy: Anatomy) -> tuple[tuple[str, int], ...]:
    """What lies between a block and the children that are named by a path: its name, and how many children it has."""
    inside: dict[str, set[str]] = {}
    for name in anatomy.names():
        parts = name.split(".")
        for depth in range(1, len(parts)):
            inside.setdefault(".".join(parts[:depth]), set()).add(parts[depth])
    return tuple((name, len(children)) for name, children in inside.items())


def _units(depth: int, conv: str = "conv{}", bn: str = "bn{}", first: int = 1) -> tuple[tuple[str, str], ...]:
    return tuple((conv.format(i), bn.format(i)) for i in range(first, first + depth))


def _timm(depth: int) -> Anatomy:
    acts = tuple(f"act{i}" for i in range(1, depth + 1))
    return Anatomy(_units(depth), activations=acts, idle=("drop_block", "aa", "se", "drop_path"))


def _hugging_face(depth: int) -> Anatomy:
    units = _units(depth, "layer.{}.convolution", "layer.{}.normalization", 0)
    acts = (*(f"layer.{i}.activation" for i in range(depth - 1)), "activation")
    return Anatomy(units, "shortcut", acts, idle=(f"layer.{depth - 1}.activation",))


def _timm_v2(depth: int, **options: object) -> Anatomy:
    return Anatomy(_units(depth, bn="norm{}"), idle=("drop_path",), activated_norms=True, **options)


TORCHVISION = {depth: Anatomy(_units(depth), activations=("relu",)) for depth in (2, 3)}
"""That of torchvision's BasicBlock and Bottleneck, and of ours, by their number of convolutions."""
PREACTIVATED = {depth: Anatomy(_units(depth, bn="norm{}"), activations=("relu",), form=PRE_ACTIVATION) for depth in (2, 3)}
"""That of our pre-activation blocks, by their number of convolutions; the names are those of timm's resnetv2."""

_KNOWN = {
    "torchvision.models.resnet.BasicBlock": TORCHVISION[2],
    "torchvision.models.resnet.Bottleneck": TORCHVISION[3],
    "timm.models.resnet.BasicBlock": _timm(2),
    "timm.models.resnet.Bottleneck": _timm(3),
    "timm.models.resnetv2.Bottleneck": _timm_v2(3, activations=("act3",)),
    "timm.models.resnetv2.PreActBasic": _timm_v2(2, form=PRE_ACTIVATION),
    "timm.models.resnetv2.PreActBottleneck": _timm_v2(3, form=PRE_ACTIVATION),
    "transformers.models.resnet.modeling_resnet.ResNetBasicLayer": _hugging_face(2),
    "transformers.models.resnet.modeling_resnet.ResNetBottleNeckLayer": _hugging_face(3),
}
_REFUSED = {
    "torchvision.models.quantization.resnet.QuantizableBasicBlock": "it is made for quantisation",
    "torchvision.models.quantization.resnet.QuantizableBottleneck": "it is made for quantisation",
    **dict.fromkeys(
        (
            "timm.models.resnest.ResNestBottleneck",
            "timm.models.sknet.SelectiveKernelBasic",
            "timm.models.sknet.SelectiveKernelBottleneck",
        ),
        "its convolutions are weighted by attention",
    ),
    "timm.models.res2net.Bottle2neck": "its 3x3 convolution is a hierarchy of them",
}


def recognise(module: nn.Module) -> tuple[Anatomy | None, str | None]:
    """The anatomy of a block of a known class, or of one that says its own, and what is wrong with it by its class alone.

    Both are None for a module that is no residual block as far as we know.
    """
    if isinstance(module, nn.Module) and getattr(type(module), PROTOCOL, None) is not None:
        anatomy = getattr(module, PROTOCOL)
        if not isinstance(anatomy, Anatomy):
            return None, f"{PROTOCOL} is a {type(anatomy).__name__}, not a fused_res.Anatomy"
        if anatomy.form not in FORMS:
            return None, f"{PROTOCOL} has the form {anatomy.form!r}, not one of {', '.join(FORMS)}"
        return anatomy, _overridden(module, type(module))
    for kind in type(module).__mro__:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in _REFUSED:
            return None, _REFUSED[name]
        if name in _KNOWN:
            return _KNOWN[name], _overridden(module, kind)
    return None, None


def _overridden(module: nn.Module, kind: type) -> str | None:
    if "forward" in vars(module):
        return "its forward is overridden on the instance"
    if type(module).forward is not kind.forward:
        return f"{type(module).__name__} has a forward of its own, not {kind.__name__}'s"
    return None
