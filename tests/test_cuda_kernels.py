"""The CUDA kernels' own sources, run on the CPU under AddressSanitizer and UBSan with shuffled threads, against float64."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from compare import every, same, within

from fused_res.primitives import bn_act as act
from fused_res.primitives import bn_act_backward as backward
from fused_res.primitives import bn_finalize as finalize


def beside(name):
    """A module of this folder, which is not on sys.path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda = beside("cuda_emulator")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The last two are wider than a block, in vectors of 16 bytes and, but for float32, without.
CHANNELS = (1, 3, 8, 20, 64, 100, 520, 300)
PIXELS = (1, 2, 17, 130, 601)
EPSILON = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return cuda.build(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def emulator(program):
    emulator = cuda.Emulator(program)
    yield emulator
    emulator.close()


def pixels_for(channels):
    return PIXELS if channels <= 100 else (2, 130)


def over_shapes(test):
    test = pytest.mark.parametrize("channels", CHANNELS)(test)
    return pytest.mark.parametrize("dtype", DTYPES, ids=str)(test)


def close(got, expected, magnitude, dtype=torch.float32, factor=1.0):
    """Within half an ulp of the result, plus `factor` float32 roundings of the terms' magnitude."""
    bound = EPSILON[dtype] * expected.abs() + factor * 2.0**-23 * magnitude
    if dtype == torch.float16:
        bound = bound + 2.0**-25
    same(got.isnan(), expected.isnan())
    wrong = ~((got.double() - expected).abs() <= bound) & ~expected.isnan()
    assert not wrong.any(), f"{wrong.sum()} wrong, the worst by {(got.double() - expected).abs().nan_to_num().max()}"


# bn_stats


@over_shapes
def test_bn_stats(emulator, dtype, channels):
    for pixels, rows in [(pixels, min(pixels, rows)) for pixels in pixels_for(channels) for rows in (40, 1000)]:
        y = cuda.random(pixels, channels, dtype=dtype)
        partials = cuda.run_stats(emulator, y, rows)
        for tile, (mean, squares) in zip(y.double().split(rows), partials, strict=True):
            expected = (tile - tile.mean(0)).square().sum(0)
            close(mean, tile.mean(0), tile.abs().mean(0), factor=8)
            # An error of the mean enters by its square.
            close(squares, expected, expected + len(tile) * 2.0**-23 * tile.abs().mean(0).square(), factor=8)


def test_bn_stats_keep_the_digits_of_a_far_mean(emulator):
    y = cuda.random(601, 20) + 4000
    mean, squares = cuda.run_stats(emulator, y, 601)[0]
    truth = y.double()
    close(mean, truth.mean(0), truth.mean(0))
    close(squares, (truth - truth.mean(0)).square().sum(0), (truth - truth.mean(0)).square().sum(0), factor=64)


def test_bn_stats_of_a_constant_are_exact(emulator):
    for dtype in DTYPES:
        y = torch.tensor([3.0, -1000.0, 0.0, 0.25], dtype=dtype).repeat(601, 2)
        mean, squares = cuda.run_stats(emulator, y, 601)[0]
        same(mean, y[0].float())
        assert not squares.any()


@pytest.mark.parametrize("row", [0, 550, 1099])
def test_bn_stats_do_not_count_from_an_outlier(emulator, row):
    """Of a tile's 1100 rows a thread sees nine: the digits it loses to the outlier's mean among them weigh nine rows."""
    y = cuda.random(1100, 3)
    y[row] = torch.tensor([1e4, -1e6, 0.0])
    mean, squares = cuda.run_stats(emulator, y, 1100)[0]
    truth = y.double()
    outlier = y[row].double().abs()
    # Welford's roundings in that thread, a few in the merge of its mean with the others', and those of values near 0.
    within(mean, truth.mean(0), 2.0**-24 * (16 / 1100 * outlier + 8))
    expected = (truth - truth.mean(0)).square().sum(0)
    within(squares, expected, 64 * 2.0**-24 * expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", [0, 129])
def test_bn_stats_not_finite_spoils_its_channel_only(emulator, poison, row):
    y = cuda.random(130, 20)
    clean = cuda.run_stats(emulator, y, 130)
    y[row, 7] = poison
    partials = cuda.run_stats(emulator, y, 130)
    assert not partials[0, 1, 7].isfinite()
    others = [c for c in range(20) if c != 7]
    same(partials[..., others], clean[..., others])


def test_tiles_cover_all_rows(emulator):
    to = torch.empty(2, dtype=torch.int64)
    for pixels in (0, 1, 17, 392, 100352, 2**31 + 1, 2**40):
        for channels in (1, 3, 64, 255, 256, 2048, 10**6, 2**31 - 1024):
            emulator.run("row_tiles", (pixels, channels), (to,), (to,))
            tiles, rows = to.tolist()
            assert 1 <= tiles <= 512
            assert rows * (tiles - 1) < max(pixels, 1) <= rows * tiles
    emulator.run("row_tiles", (802816, 64), (to,), (to,))
    assert to[0] > 450


# bn_finalize


@pytest.mark.parametrize("tiles", [1, 2, 31, 33, 100])
@pytest.mark.parametrize("channels", [1, 20, 64])
def test_bn_finalize(emulator, tiles, channels):
    rows, last = 7, 3
    pixels = rows * (tiles - 1) + last
    partials = cuda.random(tiles, 2, channels)
    partials[:, 1] = partials[:, 1].abs() * rows
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    for i, dtype in enumerate((None, *kinds)):
        gamma, beta, scale = (None if dtype is None else cuda.random(channels, dtype=kinds[(i + k) % 4], seed=3) for k in range(3))
        scale = None if scale is None else scale[0].clone()
        out = torch.empty(5, channels)
        parameters = [cuda.number(p) for p in (gamma, beta, scale)]
        buffers = (partials, gamma, beta, scale, out)
        emulator.run("bn_finalize", (*parameters, tiles, rows, last, pixels, channels), buffers, (out,))
        wide = [None if p is None else p.double() for p in (gamma, beta, scale)]
        expected = finalize.plain(partials.double(), rows, pixels, wide[0], wide[1], 1e-5, wide[2])
        size = partials.double().abs().amax((0, 1)) * 4
        within(out, expected, 2.0**-23 * 16 * (expected.abs() + size * (1 + expected[3].abs())))


def test_bn_finalize_passes_running_statistics_unchanged(emulator):
    partials, out = torch.tensor([[[1e20, float("inf"), 0.1], [1e-20, float("inf"), 0.3]]]), torch.empty(5, 3)
    emulator.run("bn_finalize", (0, 0, 0, 1, 1, 1, 1, 3), (partials, None, None, None, out), (out,))
    same(out[:2], partials[0])


# bn_act


@pytest.mark.parametrize("shortcut", cuda.SHORTCUTS)
@over_shapes
def test_bn_act(emulator, dtype, channels, shortcut):
    for pixels in pixels_for(channels):
        arguments = cuda.act_arguments(pixels, channels, dtype, shortcut)
        out, signs = cuda.run_act(emulator, *arguments)
        wide = [None if a is None else a.double() for a in arguments]
        expected, _ = act.plain(*wide, False)
        terms = [wide[0] * wide[1][3], wide[1][4].expand_as(wide[0])]
        terms += [] if wide[2] is None else [wide[2]]
        terms += [] if wide[3] is None else [wide[3] * wide[4][3], wide[4][4].expand_as(wide[0])]
        close(out, expected, sum(t.abs() for t in terms).nan_to_num(), dtype)
        same(signs, act.pack_signs(~(out <= 0)))
        without, _ = cuda.run_act(emulator, *arguments, signs=False)
        same(without.view(torch.uint8), out.view(torch.uint8))


def test_signs_are_of_the_rounded_output(emulator):
    y, v = torch.ones(2, 8, dtype=torch.float16), torch.zeros(5, 8)
    v[3] = 2.0 ** (-torch.arange(18.0, 26.0))
    out, signs = cuda.run_act(emulator, y, v)
    same(act.unpack_signs(signs, 8), out > 0)
    assert signs[0] == 0b01111111  # the smallest number is 2^-24, and half of it rounds to 0


def test_forward_and_backward_round_once(emulator):
    """What scale * y + shift leaves where the rounded product would cancel decides the sign, in both directions."""
    y, v = torch.full((3, 8), 1 + 2.0**-12), torch.zeros(5, 8)
    v[3] = y[0]
    v[4] = -(y[0] * y[0])
    out, signs = cuda.run_act(emulator, y, v)
    same(out, torch.full_like(y, 2.0**-24))
    every(signs.eq(255))
    _, _, masked = cuda.run_apply(emulator, y, y, v, cuda.random(7, 8), None, True, None, None, False, True)
    same(masked, y)
    same(cuda.run_reduce(emulator, y, y, v, None, None, None, 3)[0, 0], y.sum(0))


# bn_act_backward


def opened(y, v, signs):
    """Which elements the ReLU passes, by the rule that forward and backward share: one float32 rounding of scale * y + shift."""
    if signs is not None:
        return act.unpack_signs(signs, y.shape[1])
    return ~((y.double() * v[3].double() + v[4].double()).float() <= 0)


def as_signs(y, v, signs):
    return act.pack_signs(opened(y, v, signs))


def doubled(*tensors):
    return [None if t is None else t if t.dtype == torch.uint8 else t.double() for t in tensors]


@pytest.mark.parametrize("relu", cuda.RELUS)
@over_shapes
def test_reduce(emulator, dtype, channels, relu):
    for pixels in pixels_for(channels):
        dout, y, v, signs, y2, v2 = cuda.backward_arguments(pixels, channels, dtype, relu)
        rows = min(pixels, 150)
        partials = cuda.run_reduce(emulator, dout, y, v, signs, y2, v2, rows)
        g = torch.where(opened(y, v, signs), dout.double(), 0)
        factors = [torch.ones_like(g), y.double() - v[0].double()]
        factors += [] if y2 is None else [y2.double() - v2[0].double()]
        for row, factor in enumerate(factors):
            for tile, sums in zip((g * factor).split(rows), partials[:, row], strict=True):
                close(sums, tile.sum(0), tile.abs().sum(0) + (g.abs() * (y.double().abs() + 10)).amax(), factor=4)


def test_reduce_of_no_rows_is_zero(emulator):
    for relu in cuda.RELUS:
        partials = cuda.run_reduce(emulator, *cuda.backward_arguments(0, 20, torch.float32, relu), 64)
        assert partials.shape[0] == 1
        assert not partials.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("row", [1, 2])
@pytest.mark.parametrize("tiles", [1, 33, 100])
@pytest.mark.parametrize("channels", [1, 20, 64])
def test_backward_finalize(emulator, channels, tiles, row, training):
    partials, v, out = cuda.random(tiles, 1 + row, channels), cuda.vectors(channels), torch.empty(7, channels)
    pixels = 13 * tiles
    for given in (False, True):
        gamma, beta = (cuda.random(channels, seed=s).half() if given else None for s in (5, 6))
        scale = cuda.random(1, seed=7).double()[0].clone() if given else None
        parameters = [cuda.number(p) for p in (gamma, beta, scale)]
        integers = (*parameters, tiles, pixels, 1 + row, row, channels, training)
        emulator.run("bn_act_backward_finalize", integers, (partials, v, gamma, beta, scale, out), (out,))
        wide = doubled(partials, v, gamma, beta, scale)
        expected = backward.plain_finalize(wide[0], row, pixels, *wide[1:], training)
        sizes = partials.abs().sum(0).amax(0) * (1 + v.abs().amax(0)) ** 3 * 32
        within(out, expected, 2.0**-23 * (expected.abs() + sizes))


@pytest.mark.parametrize(("relu", "modes"), [("inner", "10"), ("inner", "00"), ("outer", "11"), ("two", "11"), ("two", "01")])
@over_shapes
def test_apply(emulator, dtype, channels, relu, modes):
    for pixels in pixels_for(channels):
        training = modes[0] == "1"
        training2 = keep_masked = modes[1] == "1"
        dout, y, v, signs, y2, _ = cuda.backward_arguments(pixels, channels, dtype, relu)
        c, c2 = cuda.random(7, channels, seed=8), None if y2 is None else cuda.random(7, channels, seed=9)
        got = cuda.run_apply(emulator, dout, y, v, c, signs, training, y2, c2, training2, keep_masked)
        signs = as_signs(y, v, signs)
        wide = doubled(dout, y, v, c, signs, y2, c2)
        expected = backward.plain_apply(*wide[:5], training, *wide[5:], training2, keep_masked)
        g = wide[0].abs()
        for result, truth, value, k in zip(got, expected, (wide[1], wide[5], None), (wide[3], wide[6], None), strict=True):
            assert (result is None) == (truth is None)
            if k is None:
                assert result is None or torch.equal(result.double(), truth)
            else:
                close(result, truth, g * k[0].abs() + (value * k[1]).abs().nan_to_num() + k[2].abs(), dtype)


def test_nan_passes_the_inner_relu(emulator):
    dout, y, v, *_ = cuda.backward_arguments(17, 8, torch.bfloat16, "inner")
    y[3, 5] = float("nan")
    _, _, masked = cuda.run_apply(emulator, dout, y, v, cuda.random(7, 8), None, False, None, None, False, True)
    assert masked[3, 5] == dout[3, 5] != 0


# masked_add


@pytest.mark.parametrize("masked", [False, True], ids=["all", "open"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)], ids=str)
@over_shapes
def test_masked_add(emulator, dtype, channels, stride, masked):
    """Rounded once; what the stride passes over keeps its bits, and what is shut out does not matter."""
    for n, h, w in ((0, 3, 4), (1, 1, 1), (2, 5, 7), (1, 2, 130)):
        dx, image, signs = cuda.add_arguments((n, h, w, channels), dtype, stride, masked)
        opened = torch.ones_like(image) if signs is None else act.unpack_signs(signs, channels).view_as(image)
        image = torch.where(opened != 0, image, float("nan"))
        expected = dx.double()
        expected[:, :: stride[0], :: stride[1]] += torch.where(opened != 0, image.double(), 0)
        same(cuda.run_add(emulator, dx, image, signs, stride), expected.to(dtype))


def test_masked_add_passes_nan(emulator):
    dx, image, signs = cuda.add_arguments((2, 5, 7, 20), torch.bfloat16, (2, 2))
    dx[0, 1, 1, 3] = float("nan")
    image.fill_(float("nan"))
    expected = dx.isnan()
    expected[:, ::2, ::2] |= act.unpack_signs(signs, 20).view_as(image)
    same(cuda.run_add(emulator, dx, image, signs, (2, 2)).isnan(), expected)


# What holds for all kernels


def all_kernels(emulator, dtype, channels, **options):
    """Name and results of every kernel that takes activations."""
    yield "bn_stats", cuda.run_stats(emulator, cuda.random(130, channels, dtype=dtype), 40, **options)
    for shortcut in cuda.SHORTCUTS:
        out, signs = cuda.run_act(emulator, *cuda.act_arguments(130, channels, dtype, shortcut), **options)
        yield f"bn_act {shortcut}", torch.cat([out.view(torch.uint8), signs], 1)
    for relu in cuda.RELUS:
        arguments = cuda.backward_arguments(130, channels, dtype, relu)
        yield f"reduce {relu}", cuda.run_reduce(emulator, *arguments, 40, **options)
        dout, y, v, signs, y2, _ = arguments
        c, two = cuda.random(7, channels), relu == "two"
        results = cuda.run_apply(emulator, dout, y, v, c, signs, True, y2, c if two else None, two, True, **options)
        yield f"apply {relu}", torch.cat([r for r in results if r is not None])
    for stride in ((1, 1), (2, 2)):
        dx, image, signs = cuda.add_arguments((2, 9, 10, channels), dtype, stride)
        yield f"masked_add {stride}", cuda.run_add(emulator, dx, image, signs, stride, **options)


@pytest.mark.parametrize("channels", [20, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_and_thread_order_change_no_bit(emulator, dtype, channels):
    runs = [dict(all_kernels(emulator, dtype, channels, shift=shift)) for shift in (0, 0, 1)]
    for name, first in runs[0].items():
        for other in runs[1:]:
            same(first.view(torch.uint8), other[name].view(torch.uint8), name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_number_formats(emulator, dtype):
    """The emulation's conversions, which the comparisons above rest on, against torch's."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    wide, back = torch.empty(2**16), torch.empty(2**16, dtype=torch.int16)
    kind = cuda.NUMBERS[dtype]
    emulator.run("widen", (kind, 2**16), (bits, wide, back), (wide, back))
    values = bits.view(dtype)
    same(wide.nan_to_num(1e38), values.float().nan_to_num(1e38))
    same(back[~values.isnan()], bits[~values.isnan()])
    every(back.view(dtype)[values.isnan()].isnan())
    finite = wide[wide.isfinite()].sort().values
    between = torch.cat([(finite[:-1].double() * (1 - w) + finite[1:].double() * w).float() for w in (0.25, 0.5, 0.75)])
    narrow = torch.empty(len(between), dtype=torch.int16)
    emulator.run("narrow", (kind, len(between)), (between, narrow), (narrow,))
    same(narrow.view(dtype), between.to(dtype))


# The harness catches what it is there for


def test_every_missing_barrier_shows(emulator):
    """Each barrier of the kernels that have any, left out in turn, changes a result or leaves memory of nobody's in it."""
    y, arguments = cuda.random(130, 20), cuda.backward_arguments(130, 20, torch.float32, "two")
    partials, v = cuda.random(100, 2, 20).abs(), cuda.vectors(20)

    def bn_finalize(**options):
        out = torch.empty(5, 20)
        emulator.run("bn_finalize", (0, 0, 0, 100, 7, 7, 700, 20), (partials, None, None, None, out), (out,), **options)
        return out

    def backward_finalize(**options):
        out = torch.empty(7, 20)
        integers = (0, 0, 0, 100, 700, 2, 1, 20, True)
        emulator.run("bn_act_backward_finalize", integers, (partials, v, None, None, None, out), (out,), **options)
        return out

    kernels = {
        "bn_stats": lambda **options: cuda.run_stats(emulator, y, 130, **options),
        "reduce": lambda **options: cuda.run_reduce(emulator, *arguments, 130, **options),
        "bn_finalize": bn_finalize,
        "backward_finalize": backward_finalize,
    }
    for name, kernel in kernels.items():
        right = kernel()
        for barrier in range(5):
            assert not all(torch.equal(kernel(skipped_barrier=barrier), right) for _ in range(3)), f"{name}, barrier {barrier}"
        same(kernel(skipped_barrier=100), right)


def test_a_thread_that_does_not_take_part_shows(emulator):
    y = cuda.random(130, 64)
    assert not torch.equal(cuda.run_stats(emulator, y, 130, absent_thread=77), cuda.run_stats(emulator, y, 130))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_overrun_of_a_real_kernel_shows(emulator, dtype, shift):
    y = cuda.random(130, 64, dtype=dtype)
    with pytest.raises(cuda.CrashError, match=r"AddressSanitizer: heap-buffer-overflow[\s\S]*READ of size"):
        cuda.run_stats(emulator, y, 130, short=1, shift=shift)
    with pytest.raises(cuda.CrashError, match="heap-buffer-overflow"):
        cuda.run_act(emulator, y, cuda.vectors(64), short=1, shift=shift)
    with pytest.raises(cuda.CrashError, match="heap-buffer-overflow"):
        cuda.run_reduce(emulator, *cuda.backward_arguments(130, 64, dtype, "two"), 130, short=1, shift=shift)
    dx, image, signs = cuda.add_arguments((2, 9, 10, 64), dtype, (2, 2))
    with pytest.raises(cuda.CrashError, match="heap-buffer-overflow"):
        cuda.run_add(emulator, dx, image, signs, (2, 2), short=1, shift=shift)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (1, cuda.CrashError, "heap-buffer-overflow"),  # past the end of shared memory
        (2, RuntimeError, "some threads wait where the others never come"),
        (3, cuda.CrashError, r"heap-buffer-overflow[\s\S]*WRITE of size 4"),
    ],
)
def test_planted_faults_show(emulator, fault, error, message):
    x, to = cuda.random(100), torch.empty(100)
    with pytest.raises(error, match=message):
        emulator.run("toy", (100, fault), (x, to), (to,))
    emulator.run("toy", (100, 0), (x, to), (to,))
    same(to, x.flip(0))
    emulator.run("toy", (100, 0), (x, to), (to,), skipped_barrier=0)
    assert not torch.equal(to, x.flip(0))
