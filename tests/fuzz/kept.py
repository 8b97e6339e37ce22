"""Failures that were found once, as hypothesis shrank them: they are held for ever."""

from fused_res.spec import AvgPool
from fuzz.block_cases import Unit, Whole

_POINTWISE = Unit(2, (1, 1), (1, 1), (0, 0), (1, 1), 1, True, (False, True, True, True), 0.1)
_FILTER = _POINTWISE._replace(kernel=(3, 3), padding=(1, 1))
_SLICED = Whole(
    dtype="f32",
    precision="pure",
    n=2,
    channels=1,
    size=(1, 1),
    main=(_POINTWISE, _FILTER, _POINTWISE._replace(out=1)),
    shortcut="identity",
    projection=None,
    pool=None,
    scaled=False,
    x_layout="contiguous",
    dout_layout="contiguous",
    weight_layout="sliced",
    frozen=0,
    level="moment",
    own=False,
    seed=0,
)

_POOLED = _SLICED._replace(
    n=1,
    channels=2,
    size=(1, 2),
    main=(_POINTWISE._replace(out=1), _FILTER._replace(out=1), _POINTWISE._replace(out=1)),
    shortcut="pooled",
    projection=_POINTWISE._replace(out=1),
    pool=AvgPool((1, 1), (1, 1), ceil_mode=True, count_include_pad=False),
    x_layout="outside in",
    weight_layout="contiguous",
)

KEPT: list[tuple[str, str, tuple]] = [
    # The kernels of the moment form read a 1x1 weight as if it were dense.
    ("blocks", "triton", _SLICED),
    # BN's parameters were refused unless they were dense.
    ("blocks", "reference", _SLICED),
    ("blocks", "native", _SLICED._replace(size=(3, 5), level="bn_act")),
    # An image of one line came out of the pooling in NCHW, and the backward refused it.
    ("blocks", "reference", _POOLED),
    ("blocks", "native", _POOLED),
]
"""Name of the target, backend, case."""
