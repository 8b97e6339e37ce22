"""`pointwise_tail` against its formula in float64."""

import pytest
import torch
from compare import all_same, every, same
from convolutions import DTYPES, assert_same_sums, every_dtype, misaligned
from moment_steps import SHORTCUTS
from moment_steps import check_tail as check
from moment_steps import tail_arguments as arguments
from pointwise import Draw, run_with_threads

from fused_res.layout import to_rows
from fused_res.primitives.bn_act import unpack_signs
from fused_res.primitives.operands import Activation
from fused_res.primitives.pointwise_tail import Joined, Pointwise, pointwise_tail
from fused_res.primitives.run import of

# numpy, under the interpreter, warns of NaN that is on its way on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

# Images, inner and outer channels; the last has several blocks of rows and stretches of columns in every backend.
SHAPES = [((1, 1, 1), 3, 5), ((2, 1, 3), 20, 64), ((3, 5, 7), 33, 70), ((2, 9, 12), 64, 300)]


@every_dtype
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize(("shape", "inner", "outer"), SHAPES, ids=str)
def test_matches_float64(backend, device, dtype, shape, inner, outer, shortcut):
    check(*arguments(Draw(0, device), shape, inner, outer, dtype, shortcut), backend)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_float64_stays_float64(cpu_backend, shortcut):
    check(*arguments(Draw(1, "cpu"), (3, 5, 7), 33, 70, torch.float64, shortcut), cpu_backend)


def test_deep_products(backend, device):
    """Sums that are longer than any part a kernel takes at once."""
    check(*arguments(Draw(2, device), (1, 2, 3), 300, 20, torch.float32, "strided projection", prologue=False), backend)


def test_without_signs(backend, device):
    main, shortcut = arguments(Draw(3, device), (2, 3, 3), 20, 12, torch.float32, "skip")
    out, signs = pointwise_tail(main, shortcut, run=of(backend))
    assert signs is None
    same(out, pointwise_tail(main, shortcut, keep_signs=True, run=of(backend))[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_acts_on_the_accumulator(backend, device, dtype):
    """A scale that would overflow the weights' dtype, or vanish in it, is as good as any other."""
    main, shortcut = arguments(Draw(4, device), (2, 3, 3), 20, 12, dtype, "skip")
    main.vectors[3, :6], main.vectors[3, 6:] = 3e5, 3e-12
    main.weight[:6] *= 2.0**-13
    check(main, shortcut, backend)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_not_finite_passes(backend, device, shortcut, poison):
    main, shortcut = arguments(Draw(5, device), (2, 5, 7), 20, 30, torch.float32, shortcut)
    main.z.vectors[3:] = torch.tensor([[1.0], [10.0]], device=device)
    clean, _ = pointwise_tail(main, shortcut, keep_signs=True, run=of(backend))
    main.z.image[1, 3, 2, 4] = poison
    poisoned = main._replace(z=Activation(main.z.image, main.z.vectors))
    out, signs = pointwise_tail(poisoned, shortcut, keep_signs=True, run=of(backend))
    bad = out[1, :, 2, 4]
    every(~bad.isfinite() | (bad == 0))
    assert bad.isnan().all() or poison == float("inf")
    assert not bad.isfinite().all()
    same(unpack_signs(signs, 30), ~(to_rows(out) <= 0))
    out[1, :, 2, 4] = clean[1, :, 2, 4]
    same(out, clean)


@every_dtype
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_misaligned_and_repeated(backend, device, dtype, shortcut):
    main, shortcut = arguments(Draw(6, device), (2, 5, 7), 64, 64, dtype, shortcut)

    def moved(part):
        z = Activation(misaligned(part.z.image), part.z.vectors, part.z.stride)
        return Pointwise(z, misaligned(part.weight), part.vectors)

    images = {name: misaligned(getattr(shortcut, name)) for name in ("skip", "y2") if getattr(shortcut, name) is not None}
    if shortcut.projection is not None:
        images["projection"] = moved(shortcut.projection)
    first, second = (pointwise_tail(main, shortcut, keep_signs=True, run=of(backend)) for _ in range(2))
    third = pointwise_tail(moved(main), shortcut._replace(**images), keep_signs=True, run=of(backend))
    for a, b, c in zip(first, second, third, strict=True):
        same(a, b)
        assert_same_sums(c, a)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_same_bits_whatever_the_threads(cpu_backend, shortcut):
    if cpu_backend == "reference":
        pytest.skip("the library's own products")
    main, shortcut = arguments(Draw(7, "cpu"), (2, 30, 40), 40, 270, torch.float32, shortcut)
    first, *others = run_with_threads(lambda: pointwise_tail(main, shortcut, keep_signs=True, run=of(cpu_backend)))
    for other in others:
        all_same(first, other)


def test_past_the_caches(cpu_backend):
    """Large results are written with other instructions: the same bits as image by image."""
    main, shortcut = arguments(Draw(8, "cpu"), (2, 60, 50), 16, 256, torch.float32, "skip")
    whole, signs = pointwise_tail(main, shortcut, keep_signs=True, run=of(cpu_backend))
    for i, part in enumerate(signs.chunk(2)):
        z = Activation(main.z.image[i : i + 1], main.z.vectors)
        out, its = pointwise_tail(main._replace(z=z), Joined(skip=shortcut.skip[i : i + 1]), keep_signs=True, run=of(cpu_backend))
        if cpu_backend == "native":
            same(out, whole[i : i + 1])
            same(its, part)
        torch.testing.assert_close(out, whole[i : i + 1])


def test_no_images(backend, device):
    main, shortcut = arguments(Draw(9, device), (2, 3, 3), 20, 12, torch.float32, "skip")
    z = Activation(main.z.image[:0], main.z.vectors)
    out, signs = pointwise_tail(main._replace(z=z), Joined(skip=shortcut.skip[:0]), keep_signs=True, run=of(backend))
    assert out.shape == (0, 12, 3, 3)
    assert signs.shape == (0, 2)


def test_bad_arguments(backend, device):
    main, shortcut = arguments(Draw(10, device), (2, 3, 3), 20, 12, torch.float32, "skip")
    _, other = arguments(Draw(10, device), (2, 3, 4), 20, 12, torch.float32, "projection")

    def run(main=main, shortcut=shortcut):
        pointwise_tail(main, shortcut, run=of(backend))

    with pytest.raises(ValueError, match="shortcut: expected exactly one of skip, y2 and projection"):
        run(shortcut=Joined())
    with pytest.raises(ValueError, match=r"vectors: expected shape \(5, 12\), got \(4, 12\)"):
        run(main._replace(vectors=main.vectors[1:]))
    with pytest.raises(ValueError, match=r"skip: expected \(2, 12, 3, 3\) of torch\.float32, got .* of torch\.float16"):
        run(shortcut=Joined(skip=shortcut.skip.half()))
    with pytest.raises(ValueError, match="projection: expected 18 pixels, got 24"):
        run(shortcut=other)
