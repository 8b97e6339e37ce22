"""The levels of fusion, and what each means for a block."""

from typing import NamedTuple

from fused_res.primitives.run import Run
from fused_res.spec import FORMS, POST_ACTIVATION, Block

LEVELS = ("bn_act", "epilogue", "prologue", "moment")
"""Levels of fusion, each with all of those before it.

bn_act: the library's convolutions, everything between them fused. epilogue: a convolution also reduces the statistics of what
it stores, its dgrad the sums of the BN below. prologue: a convolution also computes what it reads: BN and ReLU forward, BN's
gradient backward. moment: the output of a last 1x1 convolution, and of a projection beside it, is never stored.
"""


class Level(NamedTuple):
    """What a level means for one block: the moment form is that of a last 1x1 convolution with BN, shortcut and ReLU behind it."""

    name: str
    """The highest level that means something for the block, of this and those before it."""
    epilogues: bool
    prologues: bool
    moment_main: bool
    moment_projection: bool
    stores: tuple[bool, ...]
    """For each of `block.units()`: whether its convolution's output is kept for backward."""

    def convolutions(self, run: Run) -> Run:
        """Who carries out convolutions: below `epilogue` the library."""
        return run if self.epilogues else run.library()

    def keeps_moments(self, block: Block) -> tuple[bool, ...]:
        """For each of `block.units()`: whether it is in the moment form and under batch statistics."""
        if not self.moment_main:
            return (False,) * len(self.stores)
        return tuple(unit.training and not stored for unit, stored in zip(block.units(), self.stores, strict=True))

    @classmethod
    def of(cls, level: str, block: Block) -> "Level":
        """Raises ValueError for an unknown level."""
        if level not in LEVELS:
            raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
        rank = LEVELS.index(level)
        last, projection = block.main[-1], block.projection
        main = level == "moment" and block.form == POST_ACTIVATION and last.is_pointwise() and not last.is_strided()
        side = main and projection is not None and projection.is_pointwise()
        bare = FORMS[block.form].preactivated  # no BN behind the last convolution, nor behind the projection
        ends = [not (main or bare)] + ([not (side or bare)] if projection is not None else [])
        stores = [True] * (len(block.main) - 1) + ends
        name = level if main or level != "moment" else "prologue"
        return cls(name, rank >= LEVELS.index("epilogue"), rank >= LEVELS.index("prologue"), main, side, tuple(stores))
