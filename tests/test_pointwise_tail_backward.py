"""`pointwise_tail_backward`: all three steps together against autograd in float64, and each step's own promises."""

from types import SimpleNamespace

import pytest
import torch
from compare import every, same, within
from convolutions import assert_same_sums, every_dtype, misaligned
from moment_steps import backward_case as case
from moment_steps import check_backward as check
from moment_steps import run_backward as run
from pointwise import Draw, exact_rows, run_with_threads, statistics

from fused_res.layout import to_image, to_rows
from fused_res.primitives.bn_act import pack_signs, unpack_signs
from fused_res.primitives.moments import Moments, moments
from fused_res.primitives.operands import Activation
from fused_res.primitives.pointwise_tail import Pointwise
from fused_res.primitives.pointwise_tail_backward import (
    TailGradients,
    pointwise_tail_backward_apply,
    pointwise_tail_backward_finalize,
    pointwise_tail_backward_reduce,
    scaled_weight,
)
from fused_res.primitives.run import of

# numpy, under the interpreter, warns of NaN that is on its way on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

# Images, inner and outer channels; the last has several tiles of both. test_native.py has wider ones.
SHAPES = [((1, 3, 6), 3, 5), ((3, 5, 7), 33, 70), ((2, 9, 8), 64, 140)]


@every_dtype
@pytest.mark.parametrize(
    ("training", "reread"), [(True, False), (True, True), (False, True)], ids=["live-through", "live-reread", "running-reread"]
)
@pytest.mark.parametrize(("shape", "inner", "outer"), SHAPES, ids=str)
def test_matches_autograd(backend, device, dtype, shape, inner, outer, training, reread):
    check(case(Draw(0, device), backend, shape, inner, outer, dtype, training=training), backend, 8e-6, reread=reread)


@pytest.mark.parametrize("training", [True, False], ids=["live", "running"])
def test_float64_stays_float64(cpu_backend, training):
    check(case(Draw(1, "cpu"), cpu_backend, (3, 5, 7), 33, 70, torch.float64, training=training), cpu_backend, 1e-12)


@pytest.mark.parametrize("stride", [(2, 2), (1, 3)], ids=str)
def test_every_stride(backend, device, stride):
    check(case(Draw(2, device), backend, (3, 5, 7), 20, 33, torch.float32, prologue=False, stride=stride), backend, 8e-6)


@pytest.mark.parametrize("residual_scale", [0.0, -1.0])
def test_residual_scale(backend, device, residual_scale):
    check(case(Draw(3, device), backend, (3, 5, 7), 20, 33, torch.float32, residual_scale=residual_scale), backend, 8e-6)


@pytest.mark.parametrize("reread", [False, True], ids=["through", "reread"])
def test_mean_far_above_deviation(backend, device, reread):
    """Centred in float32, with what float32 leaves of the mean made good for."""
    check(case(Draw(4, device), backend, (3, 9, 7), 20, 33, torch.float32, prologue=False, mean=1e3), backend, 2e-5, reread=reread)


@every_dtype
def test_sums_of_the_bn_below(backend, device, dtype):
    """Of the values as they are stored, by the signs of the BN below."""
    c = case(Draw(5, device), backend, (3, 9, 12), 70, 33, dtype)
    inflow = check(c, backend, 8e-6, inner=True)
    y, v = to_rows(c.branch.z.image).double(), c.branch.z.vectors.double()
    opened = exact_rows(c.branch.z, backend) > 0
    near = (y * v[3] + v[4]).abs() < 1e-5  # where the rounded activation may be 0 though the sign is open
    g = torch.where(opened, to_rows(inflow.image).double(), 0)
    sums = inflow.partials.double().sum(0)
    assert inflow.partials.dtype == statistics(dtype)
    unsure = (near * to_rows(inflow.image).double().abs()).sum(0)
    size = g.abs().sum(0) + 1
    within(sums[0], g.sum(0), 4e-6 * size + unsure)
    size = (g * (y - v[0])).abs().sum(0) + 1
    within(sums[1], (g * (y - v[0])).sum(0), 4e-6 * size + unsure * (y - v[0]).abs().amax(0))
    if inflow.masked:
        assert not to_rows(inflow.image)[~(opened | near)].any()


def test_products_are_exact_on_integers(backend, device):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randint(-4, 5, shape, generator=generator).to(device, torch.float32)

    image, dout = (draw(3, c, 9, 12).contiguous(memory_format=torch.channels_last) for c in (33, 70))
    opened, scaled = draw(324, 70) > 0, draw(70, 33)
    mean = draw(33).double()
    z, g = Activation(image), torch.where(opened, to_rows(dout), 0).double()
    for centre in (mean, None):
        total, product, through = pointwise_tail_backward_reduce(dout, pack_signs(opened), z, centre, scaled, run=of(backend))
        same(total, g.sum(0))
        same(product, g.T @ (to_rows(image).double() - (0 if centre is None else centre)))
        assert through is None or torch.equal(through.double(), g @ scaled.double())
        quadratic, constant = draw(33, 33), draw(33)
        steps = [t for t in (None, through) if t is not None or through is None]
        for start in {id(t): t for t in (None, *steps)}.values():
            nothing = torch.zeros(0)
            gradients = TailGradients(nothing, nothing, nothing, nothing, nothing, centre, quadratic, constant)
            if centre is None:
                gradients = gradients._replace(quadratic=None, constant=None)
            given = None if start is None else start.clone()
            signs = pack_signs(opened)
            dz = pointwise_tail_backward_apply(dout, signs, z, scaled, given, gradients, inner=False, run=of(backend)).image
            want = g @ scaled.double()
            if centre is not None:
                want = want - (to_rows(image).double() - centre) @ quadratic.double() - constant.double()
            same(to_rows(dz).double(), want)


@every_dtype
@pytest.mark.parametrize("training", [True, False], ids=["live", "running"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("shape", [(3, 9, 12), (2, 2, 3)], ids=str)
def test_joins_an_image_with_one_rounding(backend, device, dtype, shape, stride, training):
    """On integers, exactly; what the stride passes over keeps its bits."""
    draw, (n, h, w) = Draw(11, device), shape
    size = (h - 1) * stride[0] + 1, w * stride[1]
    z, into = Activation(draw.integers(n, 33, *size, dtype=dtype), stride=stride), draw.integers(n, 33, *size, dtype=dtype)
    dout, opened, scaled = draw.integers(n, 70, h, w, dtype=dtype), draw.opened(n * h * w, 70), draw.integers(70, 33, dtype=dtype)
    mean, quadratic, constant = None, None, None
    rows = torch.where(opened, to_rows(dout), 0).double() @ scaled.double()
    if training:
        mean, quadratic, constant = (draw.integers(*shape) for shape in ((33,), (33, 33), (33,)))
        rows -= (z.rows(of(backend)).double() - mean) @ quadratic.double() + constant
    wanted = into.double()
    wanted[:, :, :: stride[0], :: stride[1]] += to_image(rows, n, h, w)
    if training:
        mean, quadratic = mean.double(), quadratic.to(dtype)
    gradients = TailGradients(*[torch.zeros(0)] * 5, mean, quadratic, constant)
    before = z.image.clone()
    found = pointwise_tail_backward_apply(dout, pack_signs(opened), z, scaled, None, gradients, into=into, run=of(backend))
    assert found.image is into
    assert found.partials is None
    same(into, wanted.to(dtype))
    same(z.image, before)


def test_an_image_that_cannot_be_joined(backend, device):
    c = case(Draw(12, device), backend, (3, 5, 7), 20, 33, torch.float32)
    sums, gradients, _ = run(c, backend)
    z, scaled, image = c.branch.z, scaled_weight(c.branch, run=of(backend)), c.branch.z.image
    for into, inner, error, message in (
        (image.clone(), True, ValueError, "into: expected None together with inner"),
        (image[:, :, 1:], False, ValueError, "into: expected shape"),
        (image.double(), False, TypeError, r"into: expected torch\.float32"),
        (image.contiguous(), False, ValueError, "into: expected a channels_last image"),
        (image.flatten(2).unflatten(2, (7, 5)).contiguous(memory_format=torch.channels_last), False, ValueError, "into: expected"),
    ):
        with pytest.raises(error, match=message):
            pointwise_tail_backward_apply(
                c.dout, c.signs, z, scaled, sums.through, gradients, inner=inner, into=into, run=of(backend)
            )


@every_dtype
def test_values_at_the_end_of_float16(backend, device, dtype):
    """They differ by more than float16 holds from one another and from their mean."""
    draw, pixels = Draw(13, device), 3 * 9 * 12
    image = 60000 + 32 * draw.integers(3, 33, 9, 12, dtype=torch.float32)
    image = (image * torch.where(draw.normal(3, 33, 9, 12, dtype=torch.float32) > 2, -1, 1)).to(dtype)
    z, dout = Activation(image), draw.integers(3, 70, 9, 12, dtype=dtype)
    opened, scaled = draw.opened(pixels, 70), draw.integers(70, 33, dtype=dtype)
    g, rows = torch.where(opened, to_rows(dout), 0).double(), to_rows(image).double()
    mean, signs = rows.mean(0), pack_signs(opened)
    total, product, _ = pointwise_tail_backward_reduce(dout, signs, z, mean, None, run=of(backend))
    same(total, g.sum(0))
    terms = g.abs().T @ (rows - mean).abs()
    half = torch.finfo(dtype).eps / 2
    within(product, g.T @ (rows - mean), (half + 2.0**-20) * terms)

    quadratic, constant = draw.integers(33, 33, dtype=dtype) * 2.0**-12, draw.integers(33, dtype=torch.float32)
    gradients = TailGradients(*[torch.zeros(0)] * 5, mean, quadratic, constant)
    dz = to_rows(pointwise_tail_backward_apply(dout, signs, z, scaled, None, gradients, run=of(backend)).image)
    want = g @ scaled.double() - (rows - mean) @ quadratic.double() - constant
    terms = g.abs() @ scaled.double().abs() + (rows - mean).abs() @ quadratic.double().abs()
    within(dz.double(), want, half * want.abs() + (half + 2.0**-20) * terms)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_shut_out_does_not_matter(backend, device, poison):
    c = case(Draw(6, device), backend, (3, 5, 7), 20, 33, torch.float32)
    clean = run(c, backend)
    n, outer, h, w = c.dout.shape
    opened = unpack_signs(c.signs, outer).view(n, h, w, outer).permute(0, 3, 1, 2)
    c.dout[~opened] = poison
    z = Activation(c.branch.z.image, c.branch.z.vectors)
    sums = pointwise_tail_backward_reduce(c.dout, c.signs, z, None, scaled_weight(c.branch, run=of(backend)), run=of(backend))
    same(sums.total, clean[0].total)
    c.dout[1, 4, 2, 3] = float("nan")
    c.signs[1 * h * w + 2 * w + 3, 0] |= 1 << 4
    sums = pointwise_tail_backward_reduce(c.dout, c.signs, z, None, scaled_weight(c.branch, run=of(backend)), run=of(backend))
    assert sums.total.isnan().nonzero().flatten().tolist() == [4]
    assert sums.product.isnan().any(1).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "outer"), [((1, 9, 13), 96), ((2, 8, 8), 128)], ids=["ragged", "even"])
def test_same_bits_masked_in_pairs(device, proven_interpreter, shape, outer, dtype):
    """As on compute capability 9.0, beside one by one, as on 8.0."""
    pytest.importorskip("triton")
    from fused_res.kernels.pointwise_tail_backward import pointwise_tail_backward_apply as apply
    from fused_res.kernels.tiling import compiling_for

    draw, inner = Draw(12, device), 32
    z = draw.activation(shape[0], inner, *shape[1:], dtype, prologue=False)
    dout, scaled = draw.normal(shape[0], outer, *shape[1:], dtype=dtype), draw.normal(outer, inner, dtype=dtype)
    opened = draw.normal(z.pixels, outer) > 0
    rows = to_rows(dout)
    rows[~opened] = float("nan")
    rows[5, 33], opened[5, 33] = float("inf"), True
    rows[7, 64], opened[7, 64] = float("nan"), True
    frozen = SimpleNamespace(mean=None, quadratic=None, constant=None)
    found = []
    for capability in (80, 90):
        with compiling_for(capability, 99 * 1024):
            image = to_image(rows, shape[0], *shape[1:])
            found.append(apply(image, pack_signs(opened), z, scaled, None, frozen, False, tile=(64, 32, 64, 4, 3))[0])
    same(*found, nan=True)
    finite = to_rows(found[0]).isfinite().all(1)
    assert (~finite).nonzero().flatten().tolist() == [5, 7]
    want = torch.where(opened, rows, 0).double() @ scaled.double()
    bound = torch.where(opened, rows, 0).double().abs() @ scaled.double().abs() * 2.0 ** -(8 if dtype == torch.bfloat16 else 11)
    within(to_rows(found[0])[finite].double(), want[finite], bound[finite])


def test_bits_past_the_last_channel_do_not_matter(backend, device):
    c = case(Draw(7, device), backend, (3, 5, 7), 20, 33, torch.float32)
    clean = run(c, backend)
    c.signs[:, 4] |= 0xFE
    again = run(c, backend)
    same(clean[0].product, again[0].product)
    same(clean[2].image, again[2].image)


@every_dtype
@pytest.mark.parametrize("reread", [False, True], ids=["through", "reread"])
def test_misaligned_and_repeated(backend, device, dtype, reread):
    c = case(Draw(8, device), backend, (3, 5, 7), 64, 64, dtype)

    def results():
        sums, gradients, inflow = run(c, backend, inner=True, reread=reread)
        return sums.product, gradients.dweight, inflow.image, inflow.partials

    first, second = results(), results()
    z = Activation(misaligned(c.branch.z.image), c.branch.z.vectors)
    c.branch, c.dout = c.branch._replace(z=z, weight=misaligned(c.branch.weight)), misaligned(c.dout)
    for once, again, moved in zip(first, second, results(), strict=True):
        same(once, again)
        assert_same_sums(moved, once)


@pytest.mark.parametrize("reread", [False, True], ids=["through", "reread"])
def test_same_bits_whatever_the_threads(cpu_backend, reread):
    if cpu_backend == "reference":
        pytest.skip("the library's own products")
    draw = Draw(9, "cpu")
    z, weight = draw.activation(2, 40, 30, 40, torch.float32), draw.normal(300, 40, 1, 1, dtype=torch.float32)
    dout, signs = draw.normal(2, 300, 30, 40), pack_signs(draw.opened(2400, 300))
    branch = Pointwise(z, weight, draw.normal(5, 300, dtype=torch.float32))
    c = SimpleNamespace(branch=branch, gamma=None, beta=None, scale=None, dout=dout, signs=signs, training=True)
    first, *others = run_with_threads(lambda: run(c, cpu_backend, inner=True, reread=reread))
    for other in others:
        same(first[0].total, other[0].total)
        same(first[0].product, other[0].product)
        same(first[2].image, other[2].image)
        same(first[2].partials, other[2].partials)


def test_row_orthogonal_to_the_data(backend, device):
    """Where the quadratic form cancels, so does D: the direct pass gives it."""
    draw = Draw(10, device)
    c = case(draw, backend, (3, 9, 7), 20, 9, torch.float32, prologue=False, mean=1.0)
    image, weight = c.branch.z.image, c.branch.weight
    image[:, 1], weight[4] = image[:, 0], 0
    weight[4, 0], weight[4, 1] = 1, -1
    c.branch.vectors[0, 4] = 0
    found = moments(c.branch.z, run=of(backend))
    sums = pointwise_tail_backward_reduce(c.dout, c.signs, c.branch.z, found.mean, None, run=of(backend))
    gradients = pointwise_tail_backward_finalize(
        sums, Moments(*found), c.branch, None, None, None, None, c.dout, c.signs, run=of(backend)
    )
    assert gradients.dgamma[4] == 0
    every(gradients.dgamma[[0, 1, 2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize("training", [True, False], ids=["live", "running"])
@pytest.mark.parametrize(("inner", "outer"), [(1, 3), (130, 9), (257, 66)], ids=str)
def test_finalize_of_every_width(backend, device, inner, outer, training):
    """Rows longer than what a program holds at once, and channels that fill no block; bits repeat, and NaN spoils what it must."""
    c = case(Draw(15, device), backend, (2, 5, 6), inner, outer, torch.float32, training=training, prologue=False)
    check(c, backend, 1e-5)
    found = moments(c.branch.z, run=of("reference")) if training else None
    scaled = scaled_weight(c.branch, run=of(backend))
    mean = None if found is None else found.mean
    sums = pointwise_tail_backward_reduce(c.dout, c.signs, c.branch.z, mean, None, run=of("reference"))

    def finalize(suspect=None):
        given = c.branch, scaled, c.gamma, c.beta, c.scale, c.dout, c.signs, suspect
        return pointwise_tail_backward_finalize(sums, found, *given, run=of(backend))

    first, suspect = finalize(), torch.zeros(outer, dtype=torch.bool, device=device)
    for again in (finalize(), finalize(suspect if training else None)):
        assert all(a is None or torch.equal(a, b) for a, b in zip(first, again, strict=True))
    sums.product[1, 0] = float("nan")
    spoilt, others = finalize(), [0, *range(2, outer)]
    assert spoilt.dweight[1].isnan().any()
    assert spoilt.dgamma[1].isnan()
    same(spoilt.dweight[others], first.dweight[others])
    same(spoilt.dgamma[others], first.dgamma[others])
    assert training == (spoilt.quadratic is not None and bool(spoilt.quadratic.isnan().all()))
