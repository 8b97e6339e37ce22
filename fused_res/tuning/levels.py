"""The levels of a block on trial: forward and backward together where a BN takes the batch's statistics, forward otherwise."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_res import backends
from fused_res.block.backward import Gradients, backward
from fused_res.block.forward import Saved, conv_bn, forward
from fused_res.block.levels import LEVELS, Level
from fused_res.block.packing import pack, unpack
from fused_res.geometry import Geometry
from fused_res.layout import to_image, to_rows
from fused_res.primitives.common import statistics_dtype
from fused_res.primitives.operands import Activation
from fused_res.primitives.run import of
from fused_res.reference import pooled
from fused_res.spec import FORMS, Block
from fused_res.tuning import synthetic
from fused_res.tuning.trials import ADVERSE, INPUTS, Candidate, Measure, Verdict, hold


@dataclass
class Problem:
    """A block with what flows into it on both ways. training: whether there is a backward."""

    block: Block
    x: Tensor
    skip: Tensor | None
    dout: Tensor
    training: bool

    def wide(self) -> "Problem":
        """The same in float64."""
        tensors, spec, eps = pack(self.block)
        skip = None if self.skip is None else self.skip.double()
        return Problem(unpack([t.double() for t in tensors], spec, eps), self.x.double(), skip, self.dout.double(), self.training)

    def forward(self, level: str, backend: str) -> tuple[Tensor, list[Tensor]]:
        return forward(self.x, self.skip, None, self.block, level, self.training, of(backend))

    def backward(self, saved: Saved, level: str, backend: str) -> list[Tensor]:
        """The gradients of x, the skip and every tensor of the block."""
        tensors, spec, eps = pack(self.block)
        needs = Gradients(True, self.skip is not None, False, unpack([True] * len(tensors), spec, eps))
        found = backward(self.dout, self.x, None, self.block, saved, needs, level, of(backend))
        units = [getattr(unit, name) for unit in found.block.units() for name in ("weight", "gamma", "beta")]
        return [gradient for gradient in (found.x, found.skip, *units) if gradient is not None]

    def state(self, backend: str, inner: Saved | None = None) -> Saved | None:
        """What a backward at the first level starts from: as a forward saves it, less inner pre-activations near 0.

        `inner`: where the inner units' part and the signs come from; otherwise from a forward of this problem. The outer units
        follow from it, as the moment form takes for granted. Of a pre-activation block all BNs are inner ones, x's too.
        """
        if not self.training:
            return None
        count, preactivated = len(self.block.main) - 1, FORMS[self.block.form].preactivated
        if inner is None:
            inner = Saved.from_list(self.forward(LEVELS[0], backend)[1], self.block, LEVELS[0])
            if preactivated:
                self.x.copy_(synthetic.clear(self.x, inner.vectors[0]))
            for y, vectors in zip(inner.ys[:count], inner.vectors[preactivated:], strict=False):
                y.copy_(to_rows(synthetic.clear(to_image(y, 1, 1, len(y)), vectors)))
        vectors = [v.to(statistics_dtype(self.x.dtype)) for v in inner.vectors[: count + preactivated]]
        if preactivated:
            return Saved(vectors, [None if y is None else y.to(self.x.dtype) for y in inner.ys], None)
        ys = [y.to(self.x.dtype) for y in inner.ys[:count]]
        level, run = Level.of(LEVELS[0], self.block), of(backend)
        z = Activation(self.x)
        if count:
            size = self.block.sizes(*self.x.shape[2:])[count - 1]
            z = Activation(to_image(ys[-1], self.x.shape[0], *size), vectors[-1])
        found = [conv_bn(Activation(z.values(run)), self.block.main[-1], None, level, run)]
        if self.block.projection is not None:
            found.append(conv_bn(Activation(pooled(self.x, self.block.pool)), self.block.projection, None, level, run))
        return Saved([*vectors, *(v for _, _, v in found)], [*ys, *(rows for _, rows, _ in found)], inner.signs)

    def step(self, level: str, backend: str) -> None:
        _, saved = self.forward(level, backend)
        if self.training:
            self.backward(Saved.from_list(saved, self.block, level), level, backend)

    def results(self, level: str, backend: str, state: Saved | None) -> list[Tensor]:
        """Output, batch statistics and gradients, the latter from this state.

        From a state of its own every level would differ by single signs of its ReLUs, which would drown all else.
        """
        out, saved = self.forward(level, backend)
        if not self.training:
            return [out]
        batch = [row for vectors, unit in zip(saved, self.block.norms(), strict=False) if unit.training for row in vectors[:2]]
        return [out, *batch, *self.backward(_stored(state, level, self.block), level, backend)]

    def keeps(self, level: str, backend: str, state: Saved | None) -> list[Tensor]:
        """The output where x has a NaN and an infinity in it, and the gradients, from this state, where dout has."""
        out, _ = replace(self, x=synthetic.adverse(self.x)).forward(level, backend)
        if not self.training:
            return [out]
        return [out, *replace(self, dout=synthetic.adverse(self.dout)).backward(_stored(state, level, self.block), level, backend)]


def _stored(state: Saved, level: str, block: Block) -> Saved:
    """What a backward at this level starts from."""
    ys = [y if stored else None for y, stored in zip(state.ys, Level.of(level, block).stores, strict=True)]
    return Saved(state.vectors, ys, state.signs)


def draw(geometry: Geometry, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    """A random block of a geometry."""
    block, x = synthetic.block(geometry, dtype, device, seed)
    random, shape = synthetic.Draw(seed + INPUTS, device), block.output_shape(x)
    skip = random.image(shape, dtype) if geometry.given else None
    return Problem(block, x, skip, random.image(shape, dtype), geometry.training)


def distinct(block: Block) -> list[str]:
    """The levels that mean something for the block."""
    return list(dict.fromkeys(Level.of(level, block).name for level in LEVELS))


def try_levels(geometry: Geometry, backend: str, dtype: torch.dtype, device: torch.device, measure: Measure) -> tuple[str, Verdict]:
    """The level of a block, tried on random data."""
    problems = [draw(geometry, dtype, device, seed) for seed in range(INPUTS)]
    states = [problem.state(backend) for problem in problems]

    def truth(i: int) -> list[Tensor]:
        wide = problems[i % INPUTS].wide()
        state = wide.state(backends.LIBRARY, states[i % INPUTS])
        return (wide.keeps if i == ADVERSE else wide.results)(LEVELS[0], backends.LIBRARY, state)

    def results(level: str, i: int) -> list[Tensor]:
        problem = problems[i % INPUTS]
        return (problem.keeps if i == ADVERSE else problem.results)(level, backend, states[i % INPUTS])

    def candidate(level: str) -> Candidate:
        return Candidate(lambda i: problems[i].step(level, backend), functools.partial(results, level))

    candidates = {level: candidate(level) for level in distinct(problems[0].block)}
    verdict = hold(candidates, LEVELS[0], truth, device, measure, queued=False)
    return verdict.winner, verdict
