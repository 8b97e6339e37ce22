"""Modules that a network calls one after the other, in evaluation as one call of the compiled library.

Each block has its program (`fused_res.block.program`), and what it prepared of its weights. Asked one by one whether those still
hold, a network's blocks take longer than some of their convolutions; asked together, once a call, they do not.
"""

from collections.abc import Callable, Hashable, Sequence
from itertools import chain

from torch import Tensor, nn

from fused_res import again, folds, internals, standing
from fused_res.block import lowered
from fused_res.eligibility import observed
from fused_res.fusible import Fusible

_FIRST = 3
"""The call, of those that look alike, at which their programs are put together: by then each block has its own."""
_MOST = 4
"""Sizes of images, or layouts, for which that is kept."""
_MOST_SEEN = 64


class _Together:
    """The programs of modules that are called one after the other, for calls that look like that of x.

    Args:
        modules: as `Serial` has them.
        blocks: those among them that are fused, and called.
        programs: each with the tensors that it takes beside what the one before returned.
    """

    def __init__(
        self, modules: Sequence[nn.Module], blocks: Sequence[Fusible], x: Tensor, programs: Sequence[tuple[Callable, tuple]]
    ) -> None:
        looks = [tensor for block in blocks for tensor in standing.last(block).looks]
        self._looks = list({id(tensor): tensor for tensor in looks}.values())
        self._standing = standing.Kept(modules, None, lambda _: None)
        self._ways, self._alike = again.ways(x, None), internals.alike([x, *self._looks])
        self._sources = folds.Sources(self._looks)
        self._kinds = list({type(block): block for block in blocks}.values())
        self.owners = set(map(id, blocks))
        self._programs, self._counts = [program for program, _ in programs], [len(tensors) for _, tensors in programs]
        self._tensors = list(chain.from_iterable(tensors for _, tensors in programs))

    def run(self, x: Tensor) -> Tensor | None:
        """What they make of x; None where this is another call, or something has changed."""
        if not self._alike(x, *self._looks) or self._ways != again.ways(x, None) or internals.is_profiled():
            return None
        if not (self._standing.holds() and self._sources.are_unchanged() and self._are_as_they_were()):
            return None
        with internals.below_autograd():
            return lowered.run_programs(self._programs, self._counts, x, self._tensors)

    def _are_as_they_were(self) -> bool:
        for block in self._kinds:
            if not block._is_as_it_was():
                return False
        return True


class Serial:
    """Calls modules one after the other: a network's stem, its pooling, and sequences of blocks.

    Args:
        parts: what is called, in order: blocks, what has a `program`, and plain `nn.Sequential`s of blocks.
        modules: all modules that a call goes by, the network that has them first; asked when programs are put together.
    """

    def __init__(self, parts: Sequence[Callable[[Tensor], Tensor]], modules: Callable[[], list[nn.Module]]) -> None:
        self._parts, self._modules = parts, modules
        self._together: list[_Together] = []
        self._seen: dict[Hashable, int] = {}
        folds.tell(self)

    def forget(self, owner: int) -> None:
        """Let go of what follows from the weights of a block, given by its identity."""
        kept = [together for together in self._together if owner not in together.owners]
        if len(kept) < len(self._together):
            self._together = kept
            self._seen.clear()

    def __call__(self, x: Tensor) -> Tensor:
        for together in self._together:
            out = together.run(x)
            if out is not None:
                return out
        if type(x) is not Tensor or not x.is_cpu:
            return self._one_by_one(x)
        key = x.shape, x.dtype, x.stride()
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()
        self._seen[key] = count = self._seen.get(key, 0) + 1
        return self._put_together(x) if count % _MOST_SEEN == _FIRST else self._one_by_one(x)

    def _one_by_one(self, x: Tensor) -> Tensor:
        for part in self._parts:
            x = part(x)
        return x

    def _put_together(self, x: Tensor) -> Tensor:
        """Called one by one, with a look at each one's program."""
        first, found, blocks = x, [], []
        for part in self._parts:
            plain = type(part) is nn.Sequential and observed("", part) is None
            for module in part if plain else (part,):
                if isinstance(module, Fusible):
                    blocks.append(module)
                    found.append(_program_of(module, x))
                else:
                    found.append(module.program(x) if hasattr(module, "program") else None)
                x = module(x)
        modules = self._modules()
        edited = any(isinstance(value, list) for module in modules[1:] for value in vars(module).values())
        if not edited and all(one is not None and lowered.number_of(one[0]) is not None for one in found):
            self._together = [*self._together[1 - _MOST :], _Together(modules, blocks, first, found)]
        return x


def _program_of(block: Fusible, x: Tensor) -> tuple[Callable, tuple[Tensor, ...]] | None:
    """What was recorded of an evaluation of this block like that of x, and the tensors that it takes beside x."""
    read = standing.last(block)
    known = None if read is None else again.find(read.seen, (x, *read.looks), block._fused_res_level)
    beside = None if known is None else folds.beside(block)
    return None if beside is None else beside.get(known)
