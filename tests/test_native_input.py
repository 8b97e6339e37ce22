"""Bad arguments straight into `torch.ops.fused_res.*`: an exception that names the argument, never a crash."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import all_same

from fused_res import backends
from fused_res.backends import native

WHY = backends.supports("native", torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(WHY is not None, reason=str(WHY))

P, C, K, X = 6, 12, 10, 9


def calls():
    """A right call of every operator."""
    native.load()
    y, dout, y2, skip = (torch.randn(P, C) for _ in range(4))
    v, v2 = torch.rand(5, C), torch.rand(5, C)
    c, c2 = torch.rand(7, C), torch.rand(7, C)
    signs = torch.randint(0, 256, (P, 2), dtype=torch.uint8)
    gamma, beta, scale = torch.rand(C), torch.rand(C), torch.tensor(0.5)
    return {
        "bn_stats": [y],
        "bn_finalize": [torch.rand(3, 2, C), 2, P, gamma, beta, 1e-5, scale],
        "bn_act": [y, v, None, y2, v2, True],
        "bn_act_backward_reduce": [dout, y, v, signs, y2, v2],
        "bn_act_backward_finalize": [torch.rand(3, 3, C), 2, P, v, gamma, beta, scale, True],
        "bn_act_backward_apply": [dout, y, v, c, signs, True, y2, c2, True, True],
        "bn_act with a skip": [y, v, skip, None, None, True],
        "bn_stats_finalize": [y, gamma, beta, 1e-5, scale],
        "bn_stats_act": [y, gamma, beta, 1e-5, scale, None, y2, v2, True, True],
        "bn_stats_act with a skip": [y, gamma, beta, 1e-5, scale, skip, None, None, True, True],
        "bn_act_backward": [dout, y, v, gamma, beta, scale, signs, True],
        "move_statistics": [*statistics(C, v), *statistics(K, torch.rand(5, K)), P, 2, 0.1, 0.5],
    } | products()


def statistics(channels, vectors):
    return torch.rand(channels), torch.rand(channels), torch.tensor(3), vectors


def products():
    """Right calls of the operators that multiply matrices, and of `masked_add`: images [N, H, W, K], x sampled."""
    z, x, dz = torch.randn(2, 1, 3, K), torch.randn(2, 2, 5, X), torch.randn(P, K)
    dout, skip, y2, through = torch.randn(P, C), torch.randn(P, C), torch.randn(P, C), torch.randn(P, K)
    z_vectors, x_vectors, v, v2 = torch.rand(5, K), torch.rand(5, X), torch.rand(5, C), torch.rand(5, C)
    weight, weight2, signs = torch.randn(C, K), torch.randn(C, X), torch.randint(0, 256, (P, 2), dtype=torch.uint8)
    mean, quadratic, constant = torch.rand(K).double(), torch.randn(K, K), torch.randn(K)
    images, y, c = torch.randn(2, 1, 3, C), torch.randn(2, 1, 3, C), torch.rand(7, C)
    gamma, beta, scale, covariance = torch.rand(C), torch.rand(C), torch.tensor(0.5), torch.eye(K).double()
    finalize = [torch.randn(C).double(), torch.randn(C, K).double(), P, covariance, weight, v, torch.randn(C, K)]
    small, its_signs = torch.randn(2, 1, 2, K), torch.randint(0, 256, (4, 2), dtype=torch.uint8)
    gradient, step = [images, y, v, c, signs, True], [dz, through, dout, signs]
    strided = [torch.randn(2, 1, 6, K), None, 1, 2, weight, mean, quadratic, constant]
    return (
        {
            "masked_add": [torch.randn(2, 1, 3, K), small, its_signs, 2, 2],
            "moments": [z, z_vectors, 1, 2],
            "moments_finalize": [mean, covariance, weight, gamma, beta, 1e-5, scale, 2.0**-11, torch.randn(2, C).double()],
            "pointwise_tail": [z, z_vectors, 1, 1, weight, v, None, None, x, x_vectors, 2, 2, weight2, v2, True],
            "pointwise_tail with a skip": [z, z_vectors, 1, 1, weight, v, skip, None, None, None, 1, 1, None, None, True],
            "pointwise_tail with y2": [z, z_vectors, 1, 1, weight, v, None, y2, None, None, 1, 1, None, v2, False],
            "pointwise_tail_backward_reduce": [dout, signs, z, z_vectors, 1, 1, mean, weight],
            "pointwise_tail_backward_finalize": [*finalize, gamma, beta, scale, 2.0**-11, mean.new_ones(C)],
            "pointwise_tail_backward_apply": [*step, z, z_vectors, 1, 1, weight, mean, quadratic, constant, True, False],
            "pointwise_tail_backward_apply that joins": [torch.randn(2, 1, 6, K), *step[1:], *strided, False, True],
            "pointwise_fprop": [x, x_vectors, 2, 2, weight2, True],
            "pointwise_dgrad": [*gradient, weight, z, z_vectors, None, None, 1, 1],
            "pointwise_dgrad with an addend": [*gradient, weight, None, None, small, its_signs, 2, 2],
            "pointwise_wgrad": [*gradient, x, x_vectors, 2, 2],
            "pointwise_prepare": [weight],
            "pointwise_bn_act": [z, torch.ops.fused_res.pointwise_prepare(weight), len(weight), 1, 1, v, None, False],
            "pointwise_bn_act with a skip": [z, torch.ops.fused_res.pointwise_prepare(weight), len(weight), 1, 1, v, skip],
        }
        | filtered()
        | unfolded()
    )


def unfolded():
    """Right calls of what takes the windows of a convolution: images of 4 x 5 pixels, K channels to C, kernels of 3 x 2."""
    x, dy, weight = (
        torch.randn(shape).contiguous(memory_format=torch.channels_last) for shape in ((2, K, 4, 5), (2, C, 2, 6), (C, K, 3, 2))
    )
    steps, panels = [2, 1, 1, 1, 1, 1], torch.ops.fused_res.pointwise_prepare(torch.randn(C, 6 * K))
    return {
        "im2col": [torch.randn(2, 4, 5, K), 3, 2, *steps],
        "col2im": [torch.randn(24, 6 * K), 4, 5, 3, 2, *steps],
        "unfolded_fprop": [x, weight, *steps],
        "folded_dgrad": [dy, weight, 4, 5, *steps],
        "unfolded_wgrad": [dy, x, 3, 2, *steps, 1],
        "unfolded_bn_act": [x, panels, C, 3, 2, *steps, torch.rand(5, C), torch.randn(24, C), True],
    }


def filtered():
    """Right calls of the 3x3 convolutions: images of 4 x 5 pixels, K channels to C, padded by a line above and below."""
    x, x_vectors, weight = torch.randn(2, 4, 5, K), torch.rand(5, K), torch.randn(C, 3, 3, K)
    images, y, v, c = torch.randn(2, 4, 3, C), torch.randn(2, 4, 3, C), torch.rand(5, C), torch.rand(7, C)
    rows, v2, signs = torch.randn(24, C), torch.rand(5, C), torch.randint(0, 256, (24, 2), dtype=torch.uint8)
    small, its_signs = torch.randn(2, 2, 3, K), torch.randint(0, 256, (12, 2), dtype=torch.uint8)
    gradient, padding = [images, y, v, c, signs, True], [1, 0]
    return {
        "winograd_fprop": [x, x_vectors, weight, *padding, True, None, None, None, None],
        "winograd_fprop with a skip": [x, x_vectors, weight, *padding, False, v, rows, None, None],
        "winograd_fprop with y2": [x, None, weight, *padding, False, v, None, rows, v2],
        "winograd_dgrad": [*gradient, weight, *padding, x, x_vectors, None, None, 1, 1],
        "winograd_dgrad with an addend": [*gradient, weight, *padding, None, None, small, its_signs, 2, 2],
        "winograd_wgrad": [*gradient, x, x_vectors, *padding],
        "winograd_prepare": [weight],
        "winograd_bn_act": [x, torch.ops.fused_res.winograd_prepare(weight), C, *padding, v, None],
        "winograd_bn_act with a skip": [x, torch.ops.fused_res.winograd_prepare(weight), C, *padding, v, rows],
    }


def call(name, arguments):
    if name == "move_statistics":  # lists of the two units'
        arguments = [*map(list, zip(arguments[:4], arguments[4:8], strict=True)), arguments[8:10], arguments[10:]]
    return getattr(torch.ops.fused_res, name.split()[0]).default(*arguments)


def empty_storage(tensor):
    """Of the right shape, over memory that is gone."""
    view = tensor.clone()
    view.untyped_storage().resize_(0)
    return view


def short_storage(tensor):
    view = tensor.clone()
    view.untyped_storage().resize_(max(1, view.untyped_storage().nbytes() - 1))
    return view


MUTATIONS = {
    "one row more": lambda t: torch.cat([t, t[:1]]) if t.dim() else t.expand(1).clone(),
    "one row less": lambda t: t[1:] if t.dim() else t.expand(2).clone(),
    "one column more": lambda t: torch.cat([t, t[..., :1]], -1) if t.dim() else t.expand(3).clone(),
    "one column less": lambda t: t[..., 1:].contiguous() if t.dim() else t.reshape(1),
    "one dimension more": lambda t: t.unsqueeze(0),
    "flat": lambda t: t.flatten() if t.dim() != 1 else t.view(1, -1),
    "no elements": lambda t: t[:0] if t.dim() else torch.empty(0),
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else torch.stack([t, t], -1)[..., 0] if t.dim() else t.expand(2),
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() else t.expand(2),
    "every other": lambda t: torch.stack([t, t], -1)[..., 0] if t.dim() else t.expand(2),
    "integers": lambda t: t.to(torch.int32),
    "complex": lambda t: t.to(torch.complex64),
    "booleans": lambda t: t.bool(),
    "bytes": lambda t: t.to(torch.uint8) if t.dtype != torch.uint8 else t.float(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "no storage": empty_storage,
    "too little storage": short_storage,
}

# Sizes that no other argument has.
FREE = {
    ("bn_stats", 0): ("row", "column"),
    ("bn_act_backward_finalize", 0): ("row",),
    ("moments", 0): ("row",),
    ("pointwise_fprop", 0): ("row",),
    ("pointwise_fprop", 4): ("row",),
    ("winograd_fprop", 0): ("row",),
    ("winograd_fprop", 2): ("row",),
    ("winograd_prepare", 0): ("row", "column"),
    ("pointwise_prepare", 0): ("row", "column"),
    ("winograd_bn_act", 0): ("row",),
    ("pointwise_bn_act", 0): ("row", "no elements"),
    ("bn_stats_finalize", 0): ("row",),
    ("im2col", 0): ("row", "column", "no elements"),
    ("col2im", 0): ("no elements",),
    ("unfolded_fprop", 0): ("row", "column more", "no elements"),
    ("unfolded_fprop", 1): ("row", "column more"),
    ("folded_dgrad", 0): ("row", "no elements"),
}
# Parameters of a BN: of any floating-point dtype, whatever the others are.
PARAMETERS = {
    "bn_finalize": (3, 4, 6),
    "bn_act_backward_finalize": (4, 5, 6),
    "moments_finalize": (3, 4, 6),
    "pointwise_tail_backward_finalize": (7, 8, 9),
    "bn_stats_finalize": (1, 2, 4),
    "bn_stats_act": (1, 2, 4),
    "bn_stats_act with a skip": (1, 2, 4),
    "bn_act_backward": (3, 4, 5),
}
# Tensors whose dtype no other argument sets.
ALONE = {"bn_stats": 0, "bn_stats_finalize": 0, "moments_finalize": 2, "pointwise_prepare": 0, "im2col": 0}
# What the first argument in 16 bits goes with in float32.
WIDER = ("moments", "pointwise_bn_act")
# Arguments that are written to.
OUTPUTS = {
    "masked_add": {0},
    "pointwise_tail_backward_apply": {0},
    "pointwise_tail_backward_apply that joins": {0},
    "move_statistics": {0, 1, 2, 4, 5, 6},
}


@pytest.mark.parametrize("name", list(calls()) if WHY is None else [])
def test_the_call_itself_is_right(name):
    call(name, calls()[name])


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", list(calls()) if WHY is None else [])
def test_one_wrong_tensor(name, mutation):
    for position, argument in enumerate(calls()[name]):
        if not isinstance(argument, torch.Tensor):
            continue
        arguments = calls()[name]
        wrong = MUTATIONS[mutation](argument)
        arguments[position] = wrong
        if any(size in mutation for size in FREE.get((name, position), ())):
            call(name, arguments)
            continue
        with pytest.raises((RuntimeError, NotImplementedError)):
            call(name, arguments)


@pytest.mark.parametrize("name", list(calls()) if WHY is None else [])
def test_other_dtypes_do_not_mix(name):
    for position, argument in enumerate(calls()[name]):
        if not isinstance(argument, torch.Tensor) or argument.dtype == torch.uint8:
            continue
        for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
            if dtype == argument.dtype:
                continue
            arguments = calls()[name]
            arguments[position] = argument.to(dtype)
            if name in WIDER and position == 0 and dtype in (torch.float16, torch.bfloat16):
                call(name, arguments)
                continue
            if name in ("winograd_prepare", "col2im") and dtype == torch.float64:
                call(name, arguments)
                continue
            alone = argument.dim() == 1 or (argument.dim() == 2 and dtype == torch.float64)
            if name == "move_statistics" and alone and dtype != torch.float8_e4m3fn:
                call(name, arguments)
                continue
            free = position in PARAMETERS.get(name, ()) or ALONE.get(name) == position
            if free and dtype != torch.float8_e4m3fn:
                call(name, arguments)
                continue
            if position == 0 and name in ("bn_finalize", "bn_act_backward_finalize"):
                continue
            with pytest.raises(RuntimeError):
                call(name, arguments)


def test_optional_arguments_that_belong_together():
    y, v, _, y2, v2, _ = calls()["bn_act"]
    signs = calls()["bn_act_backward_reduce"][3]
    for arguments in ((y, v, y2, y2, v2, True), (y, v, None, y2, None, True), (y, v, None, None, v2, True)):
        with pytest.raises(RuntimeError, match=r"skip: expected|vectors2: expected together"):
            call("bn_act", arguments)
    for arguments in ((y, y, v, None, y2, v2), (y, y, v, signs, y2, None), (y, y, v, signs, None, v2)):
        with pytest.raises(RuntimeError, match=r"signs: expected with y2|vectors2: expected together"):
            call("bn_act_backward_reduce", arguments)
    _, _, _, c, _, _, _, c2, _, _ = calls()["bn_act_backward_apply"]
    for signs_, second, coefficients2 in ((None, y2, c2), (signs, y2, None), (signs, None, c2)):
        with pytest.raises(RuntimeError, match=r"signs: expected with y2|coefficients2: expected together"):
            call("bn_act_backward_apply", (y, y, v, c, signs_, True, second, coefficients2, True, False))


@pytest.mark.parametrize("steps", [(0, 1), (1, 0), (-1, 1), (1, -(2**62))])
def test_strides_that_do_not_exist(steps):
    places = {
        "masked_add": 3,
        "moments": 2,
        "pointwise_tail": 2,
        "pointwise_tail_backward_reduce": 4,
        "pointwise_tail_backward_apply": 6,
        "pointwise_fprop": 2,
        "pointwise_dgrad with an addend": 11,
        "pointwise_wgrad": 8,
        "winograd_dgrad with an addend": 13,
    }
    for name, place in places.items():
        arguments = calls()[name]
        arguments[place : place + 2] = steps
        with pytest.raises(RuntimeError, match="expected strides of at least 1"):
            call(name, arguments)


@pytest.mark.parametrize("steps", [(2**62, 1), (2**63 - 1, 2**63 - 1)])
def test_strides_past_the_image(steps):
    image = torch.randn(2, 4, 3, 5)
    mean, _ = call("moments", [image, None, *steps])
    torch.testing.assert_close(mean.float(), image[:, :1, :: min(steps[1], 9)].mean((0, 1, 2)))


def test_operands_that_belong_together():
    for name, positions, message in (
        ("pointwise_tail", (12, 13), "weight2: expected together|vectors2: expected together"),
        ("pointwise_tail", (8,), "vectors2: expected together|weight2: expected together"),
        ("pointwise_tail with y2", (13,), "vectors2: expected together"),
        ("pointwise_tail_backward_apply", (9, 10, 11), "expected mean, quadratic and constant together"),
        ("pointwise_tail_backward_apply", (5,), "inner: expected z_vectors"),
        ("pointwise_tail_backward_finalize", (3,), "direct: expected together with covariance"),
        ("pointwise_dgrad", (1, 2, 3), "coefficients: expected y, vectors and coefficients together"),
        ("pointwise_dgrad", (7, 8), "inner_vectors: expected together"),
        ("pointwise_wgrad", (1, 2, 3), "coefficients: expected y, vectors and coefficients together"),
        ("winograd_fprop with a skip", (6,), "vectors: expected together with skip or y2"),
        ("winograd_fprop with y2", (6, 8, 9), "vectors: expected together|vectors2: expected together"),
        ("winograd_dgrad", (1, 2, 3), "coefficients: expected y, vectors and coefficients together"),
        ("winograd_dgrad", (9, 10), "inner_vectors: expected together"),
        ("winograd_wgrad", (1, 2, 3), "coefficients: expected y, vectors and coefficients together"),
    ):
        for position in positions:
            arguments = calls()[name]
            arguments[position] = None
            with pytest.raises(RuntimeError, match=message):
                call(name, arguments)
    arguments = calls()["pointwise_tail_backward_apply that joins"]
    arguments[-2] = True
    with pytest.raises(RuntimeError, match="inner: expected"):
        call("pointwise_tail_backward_apply", arguments)
    arguments = calls()["pointwise_tail"]
    arguments[6] = calls()["pointwise_tail with a skip"][6]
    with pytest.raises(RuntimeError, match="skip: expected at most one of skip, y2 and x"):
        call("pointwise_tail", arguments)
    arguments = calls()["pointwise_dgrad"]
    arguments[9] = calls()["pointwise_dgrad with an addend"][9]
    with pytest.raises(RuntimeError, match="inner: expected either inner or addend, got both"):
        call("pointwise_dgrad", arguments)
    arguments = calls()["winograd_dgrad"]
    arguments[11] = calls()["winograd_dgrad with an addend"][11]
    with pytest.raises(RuntimeError, match="inner: expected either inner or addend, got both"):
        call("winograd_dgrad", arguments)
    arguments = calls()["winograd_fprop with a skip"]
    for place, value, message in ((5, True, "none together with statistics"), (8, arguments[7], "at most one of skip and y2")):
        wrong = list(arguments)
        wrong[place] = value
        with pytest.raises(RuntimeError, match=message):
            call("winograd_fprop", wrong)


@pytest.mark.parametrize("padding", [(3, 0), (1, 3), (-1, 0), (1, -1), (2**62, 0), (-(2**63), 1)])
@pytest.mark.parametrize(("name", "place"), [("winograd_fprop", 3), ("winograd_dgrad", 7), ("winograd_wgrad", 8)])
def test_padding_that_the_filters_do_not_take(name, place, padding):
    arguments = calls()[name]
    arguments[place : place + 2] = padding
    with pytest.raises(RuntimeError, match="expected a padding of 0, 1 or 2"):
        call(name, arguments)


def test_filters_need_three_lines():
    image, weight = torch.randn(2, 2, 5, K), torch.randn(C, 3, 3, K)
    with pytest.raises(RuntimeError, match="x: expected at least 3 lines and pixels"):
        call("winograd_fprop", [image, None, weight, 0, 0, False, None, None, None, None])
    with pytest.raises(RuntimeError, match="dy: expected the gradient of at least one line"):
        call("winograd_dgrad", [torch.randn(2, 0, 5, C), *[None] * 4, True, weight, 1, 1, *[None] * 4, 1, 1])


@pytest.mark.parametrize(
    "numbers", [(0, 6), (2, 0), (2, 4), (2, 7), (-2, 6), (2, -6), (2**62, 2**62), (2**63 - 1, 6), (1, 2**63 - 1)]
)
def test_rows_and_pixels_that_do_not_fit(numbers):
    arguments = calls()["bn_finalize"]
    arguments[1:3] = numbers
    with pytest.raises(RuntimeError, match="pixels: 3 tiles of"):
        call("bn_finalize", arguments)


@pytest.mark.parametrize(("row", "pixels"), [(0, 6), (3, 6), (-1, 6), (2**62, 6), (1, 0), (1, -1)])
def test_sums_that_do_not_exist(row, pixels):
    arguments = calls()["bn_act_backward_finalize"]
    arguments[1:3] = row, pixels
    with pytest.raises(RuntimeError, match=r"row: expected|pixels: expected"):
        call("bn_act_backward_finalize", arguments)


@pytest.mark.parametrize("position", [8, 9])
@pytest.mark.parametrize("pixels", [1, 0, -(2**62)])
def test_statistics_move_all_or_none(position, pixels):
    arguments = calls()["move_statistics"]
    arguments[position] = pixels
    before = [a.clone() for a in arguments[:8]]
    with pytest.raises(RuntimeError, match="pixels: expected at least 2"):
        call("move_statistics", arguments)
    all_same(arguments[:8], before)


def test_lists_of_statistics_that_do_not_match():
    means, variances, counts, vectors = ([statistics(C, torch.rand(5, C))[i]] for i in range(4))
    lists = means, variances, counts, vectors, [P], [0.1]
    for shorter in (0, 1, 3, 4, 5):
        arguments = [value[:0] if i == shorter else value for i, value in enumerate(lists)]
        with pytest.raises(RuntimeError, match="vectors: expected as many as"):
            torch.ops.fused_res.move_statistics(*arguments)


@pytest.mark.parametrize("pixels", [0, -1, -(2**62)])
def test_pixels_that_do_not_exist(pixels):
    arguments = calls()["pointwise_tail_backward_finalize"]
    arguments[2] = pixels
    with pytest.raises(RuntimeError, match="pixels: expected at least 1"):
        call("pointwise_tail_backward_finalize", arguments)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_a_weight_without_elements(shape):
    (channels, depth), weight = shape, torch.empty(shape)
    wide = {"dtype": torch.float64}
    mean, covariance, total = (torch.empty(s, **wide) for s in ((depth,), (depth, depth), (channels,)))
    vectors = torch.empty(5, channels)
    for name, arguments in (
        ("moments_finalize", [mean, covariance, weight, None, None, 1e-5, None, 0.0, None]),
        ("pointwise_tail_backward_finalize", [total, weight.double(), 1, None, weight, vectors, *[None] * 4, 0.0, None]),
    ):
        with pytest.raises(RuntimeError, match="weight: expected at least one row and column"):
            call(name, arguments)


def test_no_elements_are_no_crash():
    v, c = torch.rand(5, 4), torch.rand(7, 4)
    y, signs = torch.empty(0, 4), torch.empty(0, 1, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="y: expected at least one row"):
        call("bn_stats", [y])
    out, got = call("bn_act", [y, v, None, None, None, True])
    assert out.shape == (0, 4)
    assert got.shape == (0, 1)
    assert not call("bn_act_backward_reduce", [y, y, v, signs, None, None]).any()
    assert call("bn_act_backward_apply", [y, y, v, c, signs, True, None, None, False, True])[0].shape == (0, 4)
    assert call("bn_stats", [torch.empty(3, 0)])[0].numel() == 0
    assert call("bn_act", [torch.empty(3, 0), torch.empty(5, 0), None, None, None, True])[0].shape == (3, 0)


def test_inputs_are_left_alone():
    for name, arguments in calls().items():
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        call(name, arguments)
        for position, (a, b) in enumerate(zip(arguments, before, strict=True)):
            if isinstance(a, torch.Tensor) and position not in OUTPUTS.get(name, ()):
                # Bit for bit: prepared weights end in what was in the memory, NaN perhaps, which nobody reads.
                assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), (name, position)


def test_gradients_do_not_get_lost():
    for name, arguments in calls().items():
        if name in OUTPUTS:
            continue
        tensors = [a for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point()]
        tensors[0].requires_grad_()
        out = call(name, arguments)
        out = out[0] if isinstance(out, tuple) else out
        with pytest.raises(NotImplementedError, match="have no gradient of their own"):
            out.sum().backward()


FUZZ = """
import random, sys
sys.path.insert(0, {folder!r})
import torch
import test_native_input as t
generator = random.Random({seed})
torch.manual_seed({seed})
survived = 0
for _ in range(1500):
    name = generator.choice(list(t.calls()))
    arguments = t.calls()[name]
    for i in generator.sample(range(len(arguments)), min(len(arguments), generator.choice((1, 1, 2, 3)))):
        if isinstance(arguments[i], torch.Tensor):
            # A list with None is refused by torch, which prints its tensors, whatever memory they have.
            absent = [] if name == "move_statistics" else [lambda _: None]
            change = generator.choice(list(t.MUTATIONS.values()) + absent)
            arguments[i] = change(arguments[i])
        elif isinstance(arguments[i], int):
            arguments[i] = generator.choice((0, 1, -1, 2, 7, 2**31, 2**62, -2**62))
        elif arguments[i] is None:
            arguments[i] = torch.rand(generator.choice(((5, 12), (6, 12), (7, 12), (12,), (), (6, 2))))
    try:
        t.call(name, arguments)
        survived += 1
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        pass
print("survived", survived)
"""


@pytest.mark.parametrize("seed", range(2))
def test_fuzz(seed):
    """In a process of its own, so that a crash is a failure of this test alone."""
    code = FUZZ.format(folder=str(Path(__file__).parent), seed=seed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/", timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "survived" in done.stdout
