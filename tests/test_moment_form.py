"""The moment form's primitives chained: forward and backward of a block's tail against float64, and beside eager.

Truth starts from the operands as they are stored; `fused_res/accuracy.py` states the rule.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from compare import every, same

from fused_res.layout import to_image
from fused_res.primitives.bn_act import unpack_signs
from fused_res.primitives.moments import moments, moments_finalize
from fused_res.primitives.operands import Activation, multiplied
from fused_res.primitives.pointwise_tail import Joined, Pointwise, pointwise_tail
from fused_res.primitives.pointwise_tail_backward import (
    pointwise_tail_backward_apply,
    pointwise_tail_backward_finalize,
    pointwise_tail_backward_reduce,
    scaled_weight,
)
from fused_res.primitives.run import of
from fused_res.spec import ConvBN
from fused_res.tolerance import MARGIN, floor, scatter

# numpy, under the interpreter, warns of NaN that is on its way on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

EPS = 1e-5


class Tail:
    """`relu(a * BN(W z) + shortcut)`, the shortcut x itself or a strided BN(V x), with operands in one dtype."""

    def __init__(self, dtype, device, *, n=2, size=(12, 12), inner=32, outer=64, projection=False, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        h, w = size
        stride = (2, 2) if projection else (1, 1)
        self.dtype, self.device, self.stride = dtype, device, stride
        self.z = (draw(n, inner, h, w) + 0.5 * draw(inner, 1, 1)).relu()
        self.x = (draw(n, 2 * inner, 2 * h - 1, 2 * w) if projection else draw(n, outer, h, w)).relu()
        self.weights = [draw(outer, inner, 1, 1) / inner**0.5]
        if projection:
            self.weights.append(draw(outer, 2 * inner, 1, 1) / (2 * inner) ** 0.5)
        self.gammas = [torch.rand(outer, generator=generator) + 0.5 for _ in self.weights]
        self.betas = [0.3 * draw(outer).float() for _ in self.weights]
        self.a, self.dout = torch.tensor(0.7), draw(n, outer, h, w)

    def stored(self, device):
        """Every tensor as the block would be given it."""

        def image(t):
            return t.to(device, self.dtype).contiguous(memory_format=torch.channels_last)

        images = [image(t) for t in (self.z, self.x, self.dout)]
        vectors = [(gamma.to(device), beta.to(device)) for gamma, beta in zip(self.gammas, self.betas, strict=True)]
        return *images, [w.to(device, self.dtype) for w in self.weights], vectors, self.a.to(device)

    def of_constant_outputs(self):
        """The squared error of `out` that is due to one float32 rounding of the products in the channels where W z is constant.

        Eager stores W z, and a rounding that is the same in every pixel leaves with the mean. The moment form takes the exact mean
        off: what the products lose to rounding is multiplied by the scale, and without a variance that is 1 / sqrt(eps).
        """
        z, _, _, weights, vectors, a = self.stored("cpu")
        z, weight = z.double().movedim(1, -1).flatten(0, 2), weights[0].double().flatten(1)
        constant = (z @ weight.T).var(0, correction=0) < 1e-20
        scale = (a * vectors[0][0]).double().abs() / EPS**0.5
        return (2.0**-24 * scale * (z.abs() @ weight.abs().T))[:, constant].square().sum().item()

    def through_autograd(self, dtype, signs=None):
        """Outputs and gradients by torch's own operators in a dtype; `signs` are imposed on the ReLU. float64 is the CPU's."""
        z, x, dout, weights, vectors, a = self.stored(self.device if dtype != torch.float64 else "cpu")
        signs = None if signs is None else signs.to(z.device)
        z, x, *weights = leaves = [t.to(dtype).requires_grad_() for t in (z, x, *weights)]
        vectors = [[t.double() if dtype == torch.float64 else t.clone() for t in pair] for pair in vectors]
        a = a.to(torch.float64 if dtype == torch.float64 else torch.float32)
        flat = [a.requires_grad_(), *(t.requires_grad_() for pair in vectors for t in pair)]

        def branch(t, weight, pair, stride):
            return F.batch_norm(F.conv2d(t, weight, stride=stride), None, None, *pair, training=True, eps=EPS)

        total = (a * branch(z, weights[0], vectors[0], 1)).to(dtype)
        total = total + (x if len(weights) == 1 else branch(x, weights[1], vectors[1], self.stride))
        out = total.relu() if signs is None else torch.where(signs, total, 0)
        gradients = torch.autograd.grad(out, [*leaves, *flat], dout.to(dtype))
        found = self._named(out.detach(), gradients)
        return {name: value.to(self.device) for name, value in found.items()}

    def _named(self, out, gradients):
        names = ["dz", "dx", *(f"dw{i}" for i in range(len(self.weights))), "da"]
        names += [f"d{name}{i}" for i in range(len(self.weights)) for name in ("gamma", "beta")]
        return {"out": out} | dict(zip(names, gradients, strict=True))

    def through_moments(self, backend):
        """The same by the primitives, and the signs that the ReLU took."""
        z, x, dout, weights, vectors, a = self.stored(self.device)
        inputs = [Activation(z), Activation(x, stride=self.stride)][: len(weights)]
        scales, branches, found = [a, None], [], []
        for i, (operand, weight) in enumerate(zip(inputs, weights, strict=True)):
            unit = ConvBN(multiplied(weight, of(backend)), gamma=vectors[i][0], beta=vectors[i][1], eps=EPS)
            found.append(moments(operand, run=of(backend)))
            tail = moments_finalize(found[i], operand, unit, scales[i], run=of(backend))
            branches.append(Pointwise(operand, unit.weight, tail.vectors))
        shortcut = Joined(skip=x) if len(branches) == 1 else Joined(projection=branches[1])
        out, signs = pointwise_tail(branches[0], shortcut, keep_signs=True, run=of(backend))

        opened = to_image(unpack_signs(signs, dout.shape[1]), dout.shape[0], *dout.shape[2:])
        images, dweights, rows = [], [], []
        for i, branch in enumerate(branches):
            scaled = scaled_weight(branch, run=of(backend))
            sums = pointwise_tail_backward_reduce(dout, signs, branch.z, found[i].mean, scaled, run=of(backend))
            gamma, beta = vectors[i]
            got = pointwise_tail_backward_finalize(
                sums, found[i], branch, scaled, gamma, beta, scales[i], dout, signs, run=of(backend)
            )
            inflow = pointwise_tail_backward_apply(dout, signs, branch.z, scaled, sums.through, got, inner=False, run=of(backend))
            images.append(inflow.image)
            dweights.append(got.dweight)
            rows.append(got)
        dx = torch.where(opened, dout, 0)
        if len(branches) == 2:
            dx = torch.zeros_like(x)
            dx[:, :, :: self.stride[0], :: self.stride[1]] = images[1]
        gradients = [images[0], dx, *dweights, rows[0].dscale.sum()]
        gradients += [t for row in rows for t in (row.dgamma, row.dbeta)]
        return self._named(out, gradients), opened


def relative(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("projection", [False, True], ids=["identity", "projection"])
def test_bfloat16_gradients_have_a_third_of_eagers_error(backend, device, projection):
    """Scale and shift on the accumulator leave out one rounding that flips ReLU signs: design, not luck of a seed."""
    tail = Tail(torch.bfloat16, device, n=4, size=(14, 14), projection=projection)
    truth, eager = tail.through_autograd(torch.float64), tail.through_autograd(torch.bfloat16)
    ours, _ = tail.through_moments(backend)
    errors = {name: (relative(ours[name], want), relative(eager[name], want)) for name, want in truth.items()}
    assert errors["out"][0] <= errors["out"][1]
    assert all(error <= 0.3 * its for name, (error, its) in errors.items() if name != "out"), errors


def far_from_zero(tail):
    """Means a thousand deviations away, of z and of what it is multiplied to."""
    tail.z += 1000 * torch.arange(1, 3).repeat(tail.z.shape[1] // 2)[:, None, None]


def dead_channels(tail):
    tail.z[:, :5] = 0


def duplicate_channels(tail):
    tail.z[:, 1::2] = tail.z[:, ::2]


def constant_channels(tail):
    tail.z[:, :5] = 3.3
    tail.weights[0][0, 5:] = 0  # and an output that is constant with them


def orthogonal_row(tail):
    """A row of the weight that is orthogonal to everything but a trace of the data."""
    tail.z[:, 1] = tail.z[:, 0] * (1 + 1e-4 * tail.z[:, 2])
    tail.weights[0][0] = 0
    tail.weights[0][0, 0, 0, 0], tail.weights[0][0, 1, 0, 0] = 1, -1


def few_pixels(tail):
    for name in ("z", "x", "dout"):
        setattr(tail, name, getattr(tail, name)[:1, :, :2, :2])


def scales_of_every_sign(tail):
    tail.gammas[0][:20], tail.gammas[0][20:40] = 0, -tail.gammas[0][20:40]


EDITS = [
    far_from_zero,
    dead_channels,
    duplicate_channels,
    constant_channels,
    orthogonal_row,
    few_pixels,
    scales_of_every_sign,
]


def check_adversity(backend, device, dtype, edit, seeds):
    """By the rule of accuracy, pooled over seeds, with the candidate's signs imposed on the truth of its gradients."""
    pooled = SimpleNamespace(ours={}, eager={}, size={}, constant=0)
    for seed in range(seeds):
        tail = Tail(dtype, device, size=(9, 10), seed=seed)
        edit(tail)
        pooled.constant += tail.of_constant_outputs()
        plain = tail.through_autograd(torch.float64)
        ours, opened = tail.through_moments(backend)
        eager = tail.through_autograd(dtype)
        for errors, run, signs in ((pooled.ours, ours, opened), (pooled.eager, eager, ~(eager["out"] <= 0))):
            truth = plain
            if not torch.equal(signs, ~(plain["out"] <= 0)):
                truth = tail.through_autograd(torch.float64, signs) | {"out": plain["out"]}
            for name, want in truth.items():
                every(run[name].isfinite())
                errors[name] = errors.get(name, 0) + (run[name].double() - want).square().sum().item()
                pooled.size[name] = pooled.size.get(name, 0) + want.square().sum().item() / 2
    for name, size in pooled.size.items():
        ours, eager = ((errors[name] / size) ** 0.5 for errors in (pooled.ours, pooled.eager))
        stored = dtype if name == "out" or name.startswith(("dz", "dx", "dw")) else torch.float32
        constant = pooled.constant / size if name == "out" else 0
        margin = MARGIN * (scatter(plain[name].numel()) if seeds == 1 else 1)
        assert ours <= (max(margin * eager, floor(stored)) ** 2 + constant) ** 0.5, (name, ours, eager, constant)


every_edit = pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
in_two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@in_two_dtypes
@every_edit
def test_adversity(backend, device, dtype, edit):
    """One seed where the kernels are interpreted; a few values are known by many seeds only, which cost little then."""
    seeds = 8 if edit is few_pixels else 1 if backend == "triton" and device == "cpu" else 4
    check_adversity(backend, device, dtype, edit, seeds)


@pytest.mark.long
@in_two_dtypes
@every_edit
def test_adversity_of_many_seeds_on_triton(device, dtype, edit, proven_interpreter, poisoned_memory):
    pytest.importorskip("triton")
    check_adversity("triton", device, dtype, edit, 8 if edit is few_pixels else 4)


@pytest.fixture
def tf32():
    """float32 products round to TF32, and with them what is derived for them."""
    pytest.importorskip("triton")
    library = torch.backends.cudnn if torch.cuda.is_available() else torch.backends.mkldnn
    before = library.conv.fp32_precision
    library.conv.fp32_precision = "tf32"
    yield
    library.conv.fp32_precision = before


def rounded(values):
    """To 10 bits of fraction, by way of float64's own rounding."""
    mantissa, exponent = torch.frexp(values.double())
    return torch.ldexp((mantissa * 2**11).round(), exponent - 11).float()


def test_tf32_rounds_to_nearest_even(device, tf32, proven_interpreter):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, generator=generator) * torch.randn(5000, generator=generator).exp()
    ties = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-11 + 2.0**-23, 0.0, -0.0, 2.0**-126])
    special = torch.tensor([float("inf"), float("-inf"), torch.finfo(torch.float32).max])
    values = torch.cat((values, ties, special)).to(device)
    got = multiplied(values, of("triton"))
    same(got[:-1], torch.cat((rounded(values[:-3]), special[:2].to(device))))
    assert got[-1] == float("inf")
    same(got.signbit(), values.signbit())
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32, device=device).view(torch.float32)
    every(multiplied(nan, of("triton")).isnan())


@pytest.mark.parametrize("projection", [False, True], ids=["identity", "projection"])
def test_tf32_is_exact_where_operands_are(device, tf32, proven_interpreter, projection):
    """Operands that TF32 holds lose nothing; where it cannot hold what follows from them, A and B, dz has that error alone."""
    tail = Tail(torch.float32, device, size=(9, 10), projection=projection)
    for name in ("z", "x", "dout"):
        setattr(tail, name, rounded(getattr(tail, name)).double())
    tail.weights = [rounded(w).double() for w in tail.weights]
    ours, opened = tail.through_moments("triton")
    limit = 2e-6 if device == "cpu" else 8e-6  # tensor cores cut off what their accumulators cannot hold
    for name, want in tail.through_autograd(torch.float64, opened).items():
        assert relative(ours[name], want) <= (2.0**-11 if name in ("dz", "dx") else limit), name


def test_tf32_takes_the_moments_of_what_is_multiplied(device, tf32, proven_interpreter):
    """The BN of a constant is beta, whatever the operands were before their rounding."""
    tail = Tail(torch.float32, device, size=(9, 10))
    constant_channels(tail)
    ours, _ = tail.through_moments("triton")
    want = (tail.a * tail.betas[0][0] + tail.x[:, 0]).relu()
    assert (ours["out"][:, 0].cpu() - want).abs().max() <= 2e-3
