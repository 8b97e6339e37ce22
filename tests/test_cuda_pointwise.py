"""The CUDA kernels of 1x1 convolutions, on the CPU under AddressSanitizer and UBSan with shuffled threads."""

import shutil

import cuda_emulator as cuda
import cuda_operators
import cuda_products as products
import emulated_backend
import pytest
import torch
from compare import every, same, within
from moment_steps import check_tail
from moment_steps import tail_arguments as tail_operands
from pointwise import Draw
from tuning_plants import Timings

from fused_res import Bottleneck, accuracy, backends, explain, use_backend
from fused_res.primitives import bn_finalize as finalize
from fused_res.primitives.choice import Call, Choice
from fused_res.primitives.conv_fprop import conv_fprop
from fused_res.primitives.operands import Activation, Output
from fused_res.primitives.run import PLAIN, Fixed
from fused_res.spec import ConvBN
from fused_res.tolerance import MARGIN, floor
from fused_res.tuning.convolutions import try_convolution

pytest_plugins = ("tuning_plants",)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed"),
    pytest.mark.slow,
]


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# float16 differs from bfloat16 in its conversions and its `mma` alone, which cheaper tests have as well.
over_dtypes = pytest.mark.parametrize("dtype", [BF16, F32, pytest.param(F16, marks=pytest.mark.long)], ids=str)
# Image, stride, input and output channels: whole tiles in none of them; what 16-byte copies cannot take; single ones.
SHAPES = [((1, 9, 10), (1, 1), 40, 72), ((2, 7, 5), (2, 3), 12, 21), ((1, 1, 3), (1, 2), 1, 1)]
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=["wide", "ragged", "single"])
SHORTCUTS = ("none", "skip", "second", "projection", "activated projection")


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    operators = cuda_operators.Pointwise(tmp_path_factory.mktemp("pointwise"))
    yield operators
    operators.close()


@pytest.fixture
def emulator(operators):
    return operators.emulator


@pytest.fixture
def backend(monkeypatch, operators):
    """`native` as on a GPU, of these kernels alone."""
    return emulated_backend.install(monkeypatch, operators, ("conv_fprop", "pointwise_tail"))


def fprop_arguments(shape, dtype, make, activated=True):
    size, stride, depth, channels = shape
    whole = make is products.integers
    x, weight = make(*size, depth, dtype=dtype), make(channels, depth, dtype=dtype, seed=1)
    weight = weight.clamp(-1, 1) if whole else weight / depth**0.5
    return x, weight.to(dtype), products.vectors(depth, whole=whole) if activated else None, stride


def tail_arguments(shape, dtype, make, shortcut):
    """The keywords of `run_tail` and `tail`; a projection has half as many channels, at the shape's stride."""
    (n, h, w), (down, right), depth, channels = shape
    whole = make is products.integers
    small = (n, -(-h // down), -(-w // right))

    def branch(size, depth, activated, seed):
        weight = make(channels, depth, dtype=dtype, seed=seed + 1)
        weight = (weight.clamp(-1, 1) if whole else weight / depth**0.5).to(dtype)
        inner = products.vectors(depth, seed=seed, whole=whole) if activated else None
        return make(*size, depth, dtype=dtype, seed=seed), inner, weight, products.vectors(channels, seed=seed + 2, whole=whole)

    arguments = {"main": branch(small, depth, True, 0)}
    other = make(small[0] * small[1] * small[2], channels, dtype=dtype, seed=7)
    if shortcut == "skip":
        arguments["skip"] = other
    if shortcut == "second":
        arguments |= {"y2": other, "vectors2": products.vectors(channels, seed=8, whole=whole)}
    if "projection" in shortcut:
        activated = shortcut.startswith("activated")
        arguments |= {"projection": branch((n, h, w), max(1, depth // 2), activated, 9), "stride": (down, right)}
    return arguments


# Whole numbers


@over_shapes
@over_dtypes
def test_fprop_of_whole_numbers_is_exact(emulator, dtype, shape):
    for activated in (True, False):
        x, weight, v, stride = fprop_arguments(shape, dtype, products.integers, activated)
        y, partials = products.run_fprop(emulator, x, weight, v, stride)
        expected = products.sampled(x, v, stride).double() @ weight.double().T
        same(y, expected.to(dtype))
        assert not emulator.conflicts
        for tile, (mean, squares) in zip(y.double().split(products.ROWS), partials.double(), strict=True):
            scale = tile.abs().amax(0) + 1
            within(mean, tile.mean(0), 4 * 2.0**-24 * scale)
            within(squares, (tile - tile.mean(0)).square().sum(0), 64 * 2.0**-23 * scale.square())


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@over_shapes
@over_dtypes
def test_tails_of_whole_numbers_are_exact(emulator, dtype, shape, shortcut):
    arguments = tail_arguments(shape, dtype, products.integers, shortcut)
    out, signs = products.run_tail(emulator, **arguments)
    same(out, products.tail(**arguments)[0].to(dtype))
    same(signs, products.signs_of(out))
    assert not emulator.conflicts


# Real numbers


def error(got, truth):
    return (got.double() - truth).norm() / truth.norm()


@over_dtypes
def test_fprop_is_within_the_rule(emulator, dtype):
    x, weight, v, stride = fprop_arguments(SHAPES[0], dtype, products.real)
    y, partials = products.run_fprop(emulator, x, weight, v, stride)
    total = torch.addcmul(v[4].double(), x.double(), v[3].double())
    truth = torch.where(total <= 0, 0, total).flatten(0, 2) @ weight.double().T
    # Eager rounds BN's output and the ReLU's input to the dtype, the convolution's operands to TF32 where it does, and y.
    rounded = torch.where(total.to(dtype) <= 0, 0, total.to(dtype)).flatten(0, 2)
    eager = (products.multiplied(rounded) @ products.multiplied(weight).T).to(dtype)
    assert error(y, truth) <= max(MARGIN * error(eager, truth), floor(dtype))
    vectors = finalize.plain(partials, products.ROWS, len(y), None, None, 1e-5, None)
    within(vectors[0], y.double().mean(0), 8 * 2.0**-24 * y.double().abs().mean(0))
    var = y.double().var(0, correction=0)
    within(vectors[1], var, 16 * 2.0**-24 * (var + y.double().square().mean(0) * 2.0**-10))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@over_dtypes
def test_tails_are_within_the_rule(emulator, dtype, shortcut):
    """And every element within half an ulp, plus what a product's sum in float32 may lose."""
    arguments = tail_arguments(SHAPES[0], dtype, products.real, shortcut)
    out, signs = products.run_tail(emulator, **arguments)
    expected, terms = products.tail(**arguments)
    half_ulp = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-24}[dtype]
    within(out, expected, half_ulp * expected.abs() + 16 * 2.0**-23 * terms + (2.0**-25 if dtype == F16 else 0))
    same(signs, products.signs_of(out))

    def eager(branch, stride=(1, 1)):
        z, v, weight, after = branch
        y = (products.multiplied(products.sampled(z, v, stride)) @ products.multiplied(weight).T).to(dtype)
        return (y.double() * after[3].double() + after[4].double()).to(dtype)

    total = eager(arguments["main"])
    if shortcut == "skip":
        total = total + arguments["skip"]
    if shortcut == "second":
        v = arguments["vectors2"].double()
        total = total + (arguments["y2"].double() * v[3] + v[4]).to(dtype)
    if shortcut == "projection":
        total = total + eager(arguments["projection"], arguments["stride"])
    truth = products.tail(**arguments)[0]
    assert error(out, truth) <= max(MARGIN * error(total.relu(), truth), floor(dtype))


# Statistics


def test_statistics_keep_the_digits_of_a_far_mean(emulator):
    """y is a channel of x beside a constant of up to 4096. What is lost is what rounding a tile's mean may cost, and not its
    square.
    """
    x, weight = torch.ones(1, 13, 10, 8), torch.zeros(8, 8)
    x[..., 0] = products.real(1, 13, 10, dtype=F32)
    weight[:, 0], weight[:, 1] = 1, torch.linspace(0, 4096, 8)
    y, partials = products.run_fprop(emulator, x, weight)
    vectors = finalize.plain(partials.double(), products.ROWS, len(y), None, None, 1e-5, None)
    var, mean = torch.var_mean(y.double(), 0, correction=0)
    within(vectors[1], var, 2.0**-24 * mean.abs() * var.sqrt() + 2.0**-20 * var)


def test_statistics_of_a_constant_are_exact(emulator):
    x, weight = torch.full((1, 10, 10, 8), 3, dtype=BF16), products.integers(24, 8)
    y, partials = products.run_fprop(emulator, x, weight)
    same(partials[:, 0], y[:2].float())
    every(partials[:, 1] == 0)


# What is not finite


def test_nan_spoils_its_pixel_and_passes_the_relu(emulator):
    arguments = tail_arguments(SHAPES[0], BF16, products.integers, "skip")
    arguments["main"][0].view(-1, 40)[5, 3] = float("nan")
    arguments["skip"][70, 11] = float("nan")
    out, signs = products.run_tail(emulator, **arguments)
    spoilt = torch.zeros(out.shape, dtype=torch.bool)
    spoilt[5], spoilt[70, 11] = True, True
    same(out.isnan(), spoilt)
    same(signs, products.signs_of(out))
    x, weight, v, stride = fprop_arguments(SHAPES[0], BF16, products.integers)
    x.view(-1, 40)[66, 0] = float("nan")
    y, partials = products.run_fprop(emulator, x, weight, v, stride)
    every(y[66].isnan())
    every(y[:66].isfinite())
    every(partials[1].isnan())
    every(partials[0].isfinite())


# What holds for all


def all_kernels(emulator, dtype, shape, **options):
    x, weight, v, stride = fprop_arguments(shape, dtype, products.real)
    y, partials = products.run_fprop(emulator, x, weight, v, stride, **options)
    yield "y", y
    yield "partials", partials
    assert not emulator.conflicts
    for shortcut in ("second", "projection"):
        out, signs = products.run_tail(emulator, **tail_arguments(shape, dtype, products.real, shortcut), **options)
        assert not emulator.conflicts
        yield f"{shortcut}, out", out
        yield f"{shortcut}, signs", signs


# Several tiles of both kinds, the last ones of them cut off.
TILED = ((1, 13, 17), (1, 1), 40, 136)


@over_dtypes
@pytest.mark.parametrize("shape", [SHAPES[0], pytest.param(TILED, marks=pytest.mark.long)], ids=["one", "tiles"])
def test_alignment_tile_and_thread_order_change_no_bit(emulator, dtype, shape):
    runs = [dict(all_kernels(emulator, dtype, shape, **o)) for o in ({}, {"tile": "large"}, {"tile": "tall"}, {"shift": 1})]
    for name, first in runs[0].items():
        for other in runs[1:]:
            same(first.view(torch.uint8), other[name].view(torch.uint8), name)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_a_projections_tall_tile_goes_over_several_steps_of_either_product(emulator, dtype):
    """Its two stages in turn, over 72 and 36 channels; NaN and infinities, which TF32's rounding is to leave alone."""
    arguments = tail_arguments(((1, 10, 13), (1, 1), 72, 136), dtype, products.real, "projection")
    for row, value in ((3, float("nan")), (64, -float("nan")), (77, float("inf"))):
        arguments["main"][0].view(-1, 72)[row, 5] = value
        arguments["projection"][0].view(-1, 36)[row + 1, 7] = value
    small, tall = (products.run_tail(emulator, **arguments, tile=tile) for tile in ("small", "tall"))
    assert not emulator.conflicts
    for one, other in zip(small, tall, strict=True):
        same(one.view(torch.uint8), other.view(torch.uint8))


def test_a_projection_has_the_tall_tile_where_two_blocks_fit_and_there_are_enough(emulator):
    def tile(pixels, channels, projects, shared):
        found = torch.empty(1, dtype=torch.int64)
        emulator.run("tail tile", (pixels, channels, projects, shared << 10), (found,), (found,))
        return products.TILES[found.item()]

    assert tile(256 * 28 * 28, 512, True, 228) == tile(256 * 28 * 28, 512, True, 164) == "tall"
    assert tile(256 * 28 * 28, 512, True, 100) == tile(256 * 28 * 28, 512, False, 228) == "large"
    assert tile(128 * 144, 128, True, 228) == "large"
    assert tile(128 * 288, 128, True, 228) == "tall"
    assert tile(256 * 28 * 28, 64, True, 228) == "small"


@pytest.mark.parametrize("buffer", range(10))
def test_one_operand_out_of_line_changes_no_bit(emulator, buffer):
    """Of the tail of a projection: its two branches of four, the output and the signs."""
    arguments = tail_arguments(((1, 5, 7), (1, 1), 16, 24), BF16, products.real, "projection")
    order = [*range(8), 10, 11]
    right, moved = (products.run_tail(emulator, **arguments, shift=shift) for shift in (0, {order[buffer]: 1}))
    for one, other in zip(right, moved, strict=True):
        same(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("shift", [0, 1])
def test_an_overrun_shows(emulator, shift):
    x, weight, v, stride = fprop_arguments(SHAPES[0], BF16, products.integers)
    with pytest.raises(cuda.CrashError, match=r"AddressSanitizer: heap-buffer-overflow[\s\S]*READ of size"):
        products.run_fprop(emulator, x, weight, v, stride, short=1, shift=shift)
    with pytest.raises(cuda.CrashError, match="heap-buffer-overflow"):
        products.run_tail(emulator, **tail_arguments(SHAPES[0], BF16, products.integers, "skip"), short=1, shift=shift)


# Broken on purpose. Each step of 32 channels takes a wait and a barrier, and each product a barrier more.


def breaks(run, right, tries=10, **fault):
    """Whether a fault shows in some order of threads."""
    for _ in range(tries):
        try:
            if not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(run(**fault), right, strict=True)):
                return True
        except (RuntimeError, cuda.CrashError):
            return True
    return False


def test_every_missing_barrier_and_wait_of_fprop_shows(emulator):
    x, weight, v, stride = fprop_arguments(((1, 8, 8), (1, 1), 136, 64), BF16, products.real)

    def run(**fault):
        return products.run_fprop(emulator, x, weight, v, stride, **fault)

    right, steps = run(), 5
    assert not breaks(run, right, tries=2, skipped_barrier=steps + 3, skipped_wait=steps)
    for barrier in range(steps + 3):  # of the loop, after it, and around the statistics
        assert breaks(run, right, skipped_barrier=barrier), barrier
    for wait in range(steps):
        assert breaks(run, right, skipped_wait=wait), wait


@pytest.mark.parametrize(("tile", "shape"), [("small", ((1, 8, 8), (1, 1), 32, 64)), ("tall", ((1, 8, 16), (1, 1), 32, 128))])
def test_every_missing_barrier_and_wait_of_a_projections_tail_shows(emulator, tile, shape):
    """All warps have results that count; of the tall tile's last barrier two runs in five show that it is missing."""
    arguments = tail_arguments(shape, BF16, products.real, "projection")

    def run(**fault):
        return products.run_tail(emulator, **arguments, tile=tile, **fault)

    right, steps = run(), 1 + 1
    assert not breaks(run, right, tries=2, skipped_barrier=steps + 2, skipped_wait=steps)
    for barrier in range(steps + 2):
        assert breaks(run, right, tries=20, skipped_barrier=barrier), barrier
    for wait in range(steps):
        assert breaks(run, right, skipped_wait=wait), wait


@pytest.mark.parametrize("fault", [{"early": True}, {"displaced": 8192}, {"swapped": True}, {"unswizzled": 1}, {"unswizzled": 2}])
def test_other_faults_show_in_both_kernels(emulator, fault):
    x, weight, v, stride = fprop_arguments(((1, 8, 8), (1, 1), 200, 64), BF16, products.real)
    right = products.run_fprop(emulator, x, weight, v, stride)
    assert breaks(lambda **f: products.run_fprop(emulator, x, weight, v, stride, **f), right, **fault)
    arguments = tail_arguments(((1, 8, 8), (1, 1), 200, 64), BF16, products.real, "skip")
    right = products.run_tail(emulator, **arguments)
    assert breaks(lambda **f: products.run_tail(emulator, **arguments, **f), right, **fault)


# As the primitives and blocks call them


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_the_primitive_of_the_tail_runs_on_its_kernel(backend, dtype):
    for shortcut in ("skip", "second", "strided projection"):
        check_tail(*tail_operands(Draw(33, "cpu"), (2, 5, 7), 33, 20, dtype, shortcut), backend)


@pytest.mark.parametrize("activated", [True, False])
def test_the_primitive_of_the_convolution_runs_on_its_kernels(backend, activated):
    """With statistics, and with each of the ends that a block has in evaluation; strided."""
    draw, shape = Draw(5, "cpu"), (2, 24, 5, 9)
    x = Activation(draw.integers(*shape, dtype=BF16), draw.vectors(24) if activated else None)
    unit = ConvBN(draw.integers(16, 24, 1, 1, low=-1, high=2, dtype=BF16), stride=(2, 2))
    skip, vectors = draw.integers(2, 16, 3, 5, dtype=BF16), draw.vectors(16)
    outputs = [Output(vectors), Output(vectors, skip), Output(vectors, y2=skip, vectors2=vectors), Output(vectors, relu=False)]
    for output in [*outputs, Output(None, skip, relu=False), None]:
        keywords = {"statistics": output is None, "output": output}
        got = conv_fprop(x, unit, **keywords, run=Fixed(backend, Choice(True)))
        expected = conv_fprop(x, unit, **keywords, run=PLAIN)
        same(got.image, expected.image)
        assert got.image.is_contiguous(memory_format=torch.channels_last)
        if output is None:
            means = [finalize.plain(found.partials, found.rows, 30, None, None, 1e-5, None) for found in (got, expected)]
            within(means[0][:2], means[1][:2].double(), 2.0**-20 * (1 + means[1][:2].double().abs()))


def test_tuning_finds_the_kernels_right_beside_another_backends(planted, backend, emulator):
    """On all draws of the data, the one with a NaN and an infinity, too, for a block in training and its end in evaluation."""
    draw, fastest = Draw(5, "cpu"), Timings(**{backend: 0.1})
    x, v = draw.integers(2, 24, 5, 9, dtype=BF16), draw.vectors(24)
    unit = ConvBN(draw.integers(16, 24, 1, 1, dtype=BF16), stride=(2, 2))
    for operands in ((Activation(x, v), True, None), (Activation(x), False, Output(draw.vectors(16)))):
        before = next(emulator.seeds)
        choice, verdict = try_convolution(Call("conv_fprop", "planted", unit, operands), x.device, fastest)
        assert choice == Choice(True, None, "measured", backend), verdict
        assert verdict.rejected == {}
        assert next(emulator.seeds) > before + 5


def small_block(seed):
    generator = torch.Generator().manual_seed(seed)
    block = accuracy.random_block(Bottleneck(32, 8), seed)
    return block, *(torch.randn(2, 32, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("level", ["prologue", "moment"])
def test_a_block_on_these_kernels_is_as_accurate_as_eager(emulator, backend, level, monkeypatch):
    monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", "own")
    before = next(emulator.seeds)
    verdicts = accuracy.judge(small_block, BF16, backend, level, seeds=range(2), sign_tolerance=0.1)
    failed = [v for v in verdicts if not v.passed]
    assert not failed, failed
    assert next(emulator.seeds) > before + 2  # they have run


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_in_evaluation_a_1x1_convolution_is_one_launch_with_all_behind_it(emulator, backend, dtype, shortcut, monkeypatch):
    """BN, ReLU and shortcut: nobody asks for `conv_bn_act` on a GPU, and `explain` names who runs each."""
    monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", "own")
    side = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 1, 2, bias=False), torch.nn.BatchNorm2d(32))
    block = Bottleneck(32, 8) if shortcut == "identity" else Bottleneck(16, 8, 2, side)
    block = accuracy.random_block(block, 0).eval()
    x = torch.randn(2, block.conv1.in_channels, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        with use_backend("eager"):
            true = block(x)
        block, x = block.to(dtype), x.to(dtype)
        with use_backend(backend, "epilogue"):
            before = next(emulator.seeds)
            out = block(x)
            assert next(emulator.seeds) == before + 3
            row = explain(block, x).rows[0]
    # Three roundings on the way, of values of which each is a sum of few others.
    within(out.double(), true, 8 * torch.finfo(dtype).eps * true.abs().amax())
    assert {c.primitive for c in row.convolutions} == {"conv_fprop"}
    who = {c.unit: (c.own, c.why) for c in row.convolutions}
    assert who.pop("downsample.0", (False, "nothing fused")) == (False, "nothing fused")
    assert who == {"conv1": (True, ""), "conv2": (False, "no kernel"), "conv3": (True, "")}
    assert backends.load(backend).find("conv_bn_act", x.device) is None


@pytest.fixture
def precision():
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    yield conv
    conv.fp32_precision = before


def test_in_float32_without_tf32_convolutions_are_declined_by_name(backend, precision):
    block = Bottleneck(16, 4).eval()
    x = torch.randn(1, 16, 6, 6)
    for setting, why in (("ieee", "no kernel for float32 without TF32"), ("tf32", "")):
        precision.fp32_precision = setting
        with use_backend(backend, "epilogue"):
            found = explain(block, x).rows[0].convolutions
        assert found[2].why == why
        assert found[2].own == (not why)
    assert backends.load(backend).declined("conv_dgrad", block.parts().main[2], 100) == "no kernel"


def test_in_float32_without_tf32_the_tail_is_the_plain_formula(backend, emulator, precision):
    precision.fp32_precision = "ieee"
    arguments = tail_operands(Draw(33, "cpu"), (2, 5, 7), 33, 20, F32, "skip")
    before = next(emulator.seeds)
    check_tail(*arguments, backend)
    assert next(emulator.seeds) == before + 1
