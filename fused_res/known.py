"""Classes of other libraries that blocks are made of, known by their full names, so that none of those libraries is imported."""

from collections.abc import Callable

from fused_res.internals import constant_result

FROZEN, ACTIVATED = "frozen", "activated"

NORMS = {
    "torchvision.ops.misc.FrozenBatchNorm2d": (FROZEN,),
    "timm.layers.norm_act.BatchNormAct2d": (ACTIVATED,),
    "timm.layers.norm_act.FrozenBatchNormAct2d": (FROZEN, ACTIVATED),
}
"""Normalisations over batch and pixels whose tensors are named as those of `nn.BatchNorm2d`.

FROZEN: whatever its mode it takes the running statistics, and weight and bias are buffers. ACTIVATED: it goes on to its children
`drop` and `act`.
"""
DROPS = {"timm.layers.drop.DropPath": (), "timm.layers.drop.DropBlock2d": ()}
"""Layers that do nothing in evaluation mode, or where `drop_prob` is 0."""
SHORTCUTS = {
    "transformers.models.resnet.modeling_resnet.ResNetShortCut": ("convolution", "normalization"),
    "timm.models.resnetv2.DownsampleConv": ("conv", "norm"),
    "timm.models.resnetv2.DownsampleAvg": ("pool", "conv", "norm"),
}
"""Shortcuts, and the children that they call one after the other."""
CONTAINERS = {
    "transformers.models.resnet.modeling_resnet.ResNetConvLayer": (),
    "torchvision.ops.misc.Conv2dNormActivation": (),
    "fused_res.chains.Chain": (),
}
"""Layers that call all their children one after the other, as `nn.Sequential` does."""

_TABLES = {"norms": NORMS, "drops": DROPS, "shortcuts": SHORTCUTS, "containers": CONTAINERS}
_forwards: dict[type, Callable] = {}


@constant_result  # torch.compile is to ask, not to follow it
def about(kind: type, table: str) -> tuple[str, ...] | None:
    """What a table says of this class; None where it is not in there, or its `forward` is not its library's own any more.

    Args:
        table: "norms", "drops", "shortcuts" or "containers".
    """
    found = _TABLES[table].get(f"{kind.__module__}.{kind.__qualname__}")
    if found is None:
        return None
    forward = kind.forward
    if kind not in _forwards:
        written_in = getattr(forward, "__globals__", {}).get("__name__", "").partition(".")[0]
        if written_in in (kind.__module__.partition(".")[0], "torch"):
            _forwards[kind] = forward
    return found if _forwards.get(kind) is forward else None


def is_known(kind: type) -> bool:
    """Whether any table has something to say of this class."""
    return any(about(kind, table) is not None for table in _TABLES)
