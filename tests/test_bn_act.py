"""`bn_act` against float64, with every bit of the signs."""

import pytest
import torch
from compare import all_same, same, within

from fused_res.primitives.bn_act import bn_act, pack_signs, unpack_signs
from fused_res.primitives.run import of

# numpy, under the interpreter, warns of NaN that is on its way on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHORTCUTS = ["none", "skip", "second"]


def arguments(pixels, channels, dtype, device, shortcut, integers=False):
    """y, vectors and the shortcut's arguments; with integers every sum is exact in every dtype."""
    generator = torch.Generator().manual_seed(pixels + channels)

    def draw(*shape):
        if integers:
            return torch.randint(-8, 9, shape, generator=generator).double()
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y, other = draw(pixels, channels).to(device, dtype), draw(pixels, channels).to(device, dtype)
    vectors, vectors2 = draw(5, channels).to(device, wide), draw(5, channels).to(device, wide)
    more = {"none": {}, "skip": {"skip": other}, "second": {"y2": other, "vectors2": vectors2}}[shortcut]
    return y, vectors, more


def terms(y, vectors, skip=None, y2=None, vectors2=None):
    """What `out` is the ReLU of the sum of, in float64."""
    v = vectors.double()
    yield from (v[3] * y.double(), v[4].expand(y.shape))
    if skip is not None:
        yield skip.double()
    if y2 is not None:
        yield from terms(y2, vectors2)


def check_signs(signs, out):
    """Bit j of byte i is channel 8 * i + j, set where not (out <= 0); bits past the last channel are 0."""
    pixels, channels = out.shape
    assert signs.dtype == torch.uint8
    assert signs.shape == (pixels, (channels + 7) // 8)
    expected = torch.zeros(pixels, signs.shape[1], dtype=torch.int64)
    for c in range(channels):
        expected[:, c // 8] += (~(out[:, c].cpu() <= 0)).long() << (c % 8)
    same(signs.cpu().long(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize(("pixels", "channels"), [(1, 1), (2, 3), (5, 20), (17, 8), (130, 100), (300, 64)])
def test_rounds_once(backend, device, dtype, shortcut, pixels, channels):
    y, vectors, more = arguments(pixels, channels, dtype, device, shortcut)
    before = [t.clone() for t in (y, vectors, *more.values())]
    out, signs = bn_act(y, vectors, **more, keep_signs=True, run=of(backend))
    all_same(before, (y, vectors, *more.values()))
    assert out.dtype == dtype
    parts = list(terms(y, vectors, **more))
    expected = sum(parts).relu()
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    rounding = torch.finfo(dtype).eps / 2 * expected + tiny
    float32 = 3 * 2.0**-24 * sum(part.abs() for part in parts)
    within(out.double(), expected, rounding + float32)
    check_signs(signs, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_exact_on_integers(backend, device, dtype, shortcut):
    y, vectors, more = arguments(70, 20, dtype, device, shortcut, integers=True)
    out, signs = bn_act(y, vectors, **more, keep_signs=True, run=of(backend))
    same(out.double(), sum(terms(y, vectors, **more)).relu())
    check_signs(signs, out)
    without, none = bn_act(y, vectors, **more, run=of(backend))
    same(without, out)
    assert none is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_without_the_relu_it_is_the_sum(backend, device, dtype, shortcut):
    y, vectors, more = arguments(70, 20, dtype, device, shortcut, integers=True)
    y[3, 5] = float("nan")
    out, signs = bn_act(y, vectors, **more, relu=False, run=of(backend))
    expected = sum(terms(y, vectors, **more))
    assert (expected < 0).any()
    same(out.double(), expected, nan=True)
    assert signs is None
    with pytest.raises(ValueError, match="keep_signs: expected False without a ReLU"):
        bn_act(y, vectors, **more, relu=False, keep_signs=True, run=of(backend))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_float64(device, shortcut):
    y, vectors, more = arguments(17, 20, torch.float64, device, shortcut)
    out, signs = bn_act(y, vectors, **more, keep_signs=True, run=of("reference"))
    torch.testing.assert_close(out, sum(terms(y, vectors, **more)).relu(), rtol=1e-14, atol=1e-14)
    check_signs(signs, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_not_finite(backend, device, dtype, shortcut):
    y, vectors, more = arguments(9, 20, dtype, device, shortcut)
    vectors[3] = vectors[3].abs() + 1
    clean, _ = bn_act(y, vectors, **more, run=of(backend))
    y[0, 3], y[1, 4], y[2, 5] = float("nan"), float("inf"), float("-inf")
    out, signs = bn_act(y, vectors, **more, keep_signs=True, run=of(backend))
    assert out[0, 3].isnan()
    assert out[1, 4] == float("inf")
    assert out[2, 5] == 0
    check_signs(signs, out)
    clean[0, 3], clean[1, 4], clean[2, 5] = out[0, 3], out[1, 4], out[2, 5]
    same(out.nan_to_num(-1.0), clean.nan_to_num(-1.0))
    if more:
        y, vectors, more = arguments(9, 20, dtype, device, shortcut)
        next(iter(more.values()))[8, 19] = float("nan")
        out, signs = bn_act(y, vectors, **more, keep_signs=True, run=of(backend))
        assert out.isnan().nonzero().tolist() == [[8, 19]]
        check_signs(signs, out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_signs_are_those_of_the_rounded_output(backend, device, dtype):
    """A positive value that rounds to 0 is closed."""
    y = torch.tensor([[1.0, 1.0, -1.0, 0.0]], device=device, dtype=dtype)
    vectors = torch.zeros(5, 4, device=device)
    vectors[3] = torch.tensor([1.0, 1e-45, 1e-45, 1.0])
    out, signs = bn_act(y, vectors, keep_signs=True, run=of(backend))
    assert out.tolist() == [[1, 0, 0, 0]]
    assert signs.tolist() == [[1]]


def test_zero_scale_shuts_out_nothing_but_itself(backend, device):
    """With a residual scale of 0 the output is the shortcut's ReLU, exactly."""
    y, vectors, more = arguments(70, 20, torch.bfloat16, device, "skip")
    vectors[3:] = 0
    out, _ = bn_act(y, vectors, **more, run=of(backend))
    same(out, more["skip"].relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shortcut", ["skip", "second"])
def test_repeats_bit_for_bit_and_misaligned(backend, device, dtype, shortcut):
    y, vectors, more = arguments(70, 64, dtype, device, shortcut)

    def shift(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)

    first = bn_act(y, vectors, **more, keep_signs=True, run=of(backend))
    moved = bn_act(shift(y), shift(vectors), **{k: shift(t) for k, t in more.items()}, keep_signs=True, run=of(backend))
    same(first[0], moved[0])
    same(first[1], moved[1])


def test_no_rows(backend, device):
    out, signs = bn_act(torch.zeros(0, 20, device=device), torch.zeros(5, 20, device=device), keep_signs=True, run=of(backend))
    assert out.shape == (0, 20)
    assert signs.shape == (0, 3)


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 20])
def test_signs_pack_and_unpack(channels):
    opened = torch.rand(6, channels, generator=torch.Generator().manual_seed(channels)) < 0.5
    check_signs(pack_signs(opened), opened.float())
    same(unpack_signs(pack_signs(opened), channels), opened)


def test_bad_arguments(backend, device):
    y, vectors = torch.zeros(4, 6, device=device), torch.zeros(5, 6, device=device)

    def call(**more):
        return bn_act(y, vectors, **more, run=of(backend))

    with pytest.raises(ValueError, match="skip: expected either skip or y2, got both"):
        call(skip=y, y2=y, vectors2=vectors)
    with pytest.raises(ValueError, match="vectors2: expected together with y2"):
        call(y2=y)
    with pytest.raises(ValueError, match="vectors2: expected together with y2"):
        call(vectors2=vectors)
    with pytest.raises(ValueError, match=r"skip: expected shape \(4, 6\), got \(3, 6\)"):
        call(skip=y[:3])
    with pytest.raises(TypeError, match=r"skip: expected torch\.float32, got torch\.float16"):
        call(skip=y.half())
    with pytest.raises(TypeError, match=r"vectors: expected torch\.float32, got torch\.float64"):
        bn_act(y, vectors.double(), run=of(backend))
    with pytest.raises(ValueError, match=r"vectors: expected shape \(5, 6\), got \(7, 6\)"):
        bn_act(y, torch.zeros(7, 6, device=device), run=of(backend))
