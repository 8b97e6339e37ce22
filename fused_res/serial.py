"""Modules that a network calls one after the other, in evaluation as one call of the compiled library.

Each block has its program (`fused_res.block.program`), and what it prepared of its weights. Whether those still hold is asked of
all of a network's blocks together, once a call, instead of between their convolutions.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from fused_res import again, folds, internals, standing
from fused_res.block import lowered
from fused_res.eligibility import observed
from fused_res.fusible import Fusible
from fused_res.layout import in_layout, is_channels_last, nhwc

_FIRST = 4
"""The call, of those that look alike, at which their programs are put together: by then each block has its own."""
_TRIES = 4
"""Calls at which that is tried, since other threads may be making these calls as well."""
_AGAIN = 64
"""Calls after which it is tried once more, where it could not be done."""
_MOST = 4
"""Sizes of images, or layouts, for which that is kept."""
_MOST_SEEN = 64


class Programmed(nn.Module):
    """A module beside blocks whose calls are recorded, too."""

    def program(self, x: Tensor) -> tuple[Callable, tuple[Tensor, ...]] | None:
        """What is recorded of a call with an image like x, and the tensors that it takes beside; None where nothing is."""
        raise NotImplementedError


class _Together:
    """The programs of modules that are called one after the other, for calls that look like that of x.

    Args:
        modules: as `Serial` has them.
        blocks: those among them that are fused, and called.
        x: [N, C, H, W].
        channels_last: the layout of what they make of it.
    """

    def __init__(self, modules: Sequence[nn.Module], blocks: Sequence[Fusible], x: Tensor, channels_last: bool) -> None:
        read = [standing.last(block) for block in blocks]
        looks = [] if None in read else [tensor for found in read for tensor in found.looks]
        self._is_known = bool(looks)
        self._looks = list({id(tensor): tensor for tensor in looks}.values())
        self._standing, self._sources = standing.Kept(modules, None, lambda _: None), folds.Sources(self._looks)
        self._ways, self._alike = again.ways(x, None), internals.alike([x, *self._looks])
        self._kinds, self._channels_last = list({type(block): block for block in blocks}.values()), channels_last

    def take(self, programs: Sequence[tuple[Callable, tuple[Tensor, ...]] | None]) -> bool:
        """Whether these, which were found since, are all there and of the modules as they were."""
        if not self._is_known or any(found is None or lowered.number_of(found[0]) is None for found in programs):
            return False
        self._programs, self._counts = [program for program, _ in programs], [len(tensors) for _, tensors in programs]
        self._tensors = list(chain.from_iterable(tensors for _, tensors in programs))
        return self.holds()

    def follows_from(self, tensors: set[int]) -> bool:
        """Whether it does from one of these tensors, given by their identities."""
        return any(id(tensor) in tensors for tensor in self._looks)

    def fits(self, x: Tensor) -> bool:
        return self._alike(x, *self._looks) and self._ways == again.ways(x, None)

    def holds(self) -> bool:
        """Whether nothing has changed."""
        if not self._standing.holds() or not self._sources.are_unchanged():
            return False
        return all(block._is_as_it_was() for block in self._kinds)

    def run(self, x: Tensor) -> Tensor | None:
        """What they make of x; None where Python is to call them, for an error's words."""
        with internals.below_autograd():
            out = lowered.run_programs(self._programs, self._counts, nhwc(x), self._tensors)
            return None if out is None else in_layout(out, self._channels_last)


class Serial(nn.Module):
    """Calls modules one after the other: a network's stem, its pooling, and sequences of blocks.

    Args:
        parts: what is called, in order: blocks, `Programmed` modules, and plain `nn.Sequential`s of blocks.
        modules: all modules that a call goes by, the network that has them first; asked when programs are put together.
    """

    def __init__(self, parts: Sequence[nn.Module], modules: Callable[[], list[nn.Module]]) -> None:
        super().__init__()
        self._parts, self._list_modules = tuple(parts), modules
        self._together: tuple[_Together, ...] = ()
        self._seen: dict[Hashable, tuple[int, bool | None]] = {}
        """By looks: how often, and whether what was made of the first was channels_last; None as long as that is not known."""
        self._lock, self._forgotten = threading.Lock(), 0
        folds.tell(self)

    def forget(self, tensors: set[int] | None = None) -> None:
        """Let go of what follows from one of these tensors, given by their identities, or of all."""
        with self._lock:
            self._forgotten += 1
            kept = () if tensors is None else tuple([t for t in self._together if not t.follows_from(tensors)])
            if len(kept) < len(self._together):
                self._together, self._seen = kept, {}

    def forward(self, x: Tensor) -> Tensor:
        for together in self._together:
            if together.fits(x) and not internals.is_profiled():
                out = together.run(x) if together.holds() else None
                if out is not None:
                    return out
                self._drop(together)
                break
        if type(x) is not Tensor or not x.is_cpu or x.dim() != 4 or torch.is_grad_enabled():
            return self._one_by_one(x)
        key = x.shape, x.dtype, x.stride()
        with self._lock:
            count, channels_last = self._seen.get(key, (0, None))
            if len(self._seen) >= _MOST_SEEN:
                self._seen = {}
            self._seen[key] = count + 1, channels_last
        if channels_last is None:  # other threads may be here, too
            out = self._one_by_one(x)
            with self._lock:
                self._seen[key] = count + 1, is_channels_last(out)
            return out
        # Between blocks other layouts would only cost copies.
        after = count + 1 - _FIRST
        put_together = self._put_together if 0 <= after < _TRIES or after % _AGAIN == 0 else self._one_by_one
        return in_layout(put_together(nhwc(x), x, channels_last), channels_last)

    def _drop(self, together: _Together) -> None:
        with self._lock:
            self._together = tuple([other for other in self._together if other is not together])
            self._seen = {}

    def _one_by_one(self, x: Tensor, *_: object) -> Tensor:
        for part in self._parts:
            x = part(x)
        return x

    def _put_together(self, x: Tensor, given: Tensor, channels_last: bool) -> Tensor:
        """Called one by one, with a look at each one's program. given: x as it came."""
        forgotten, modules, parts = self._forgotten, self._list_modules(), []
        for part in self._parts:
            plain = type(part) is nn.Sequential and observed("", part) is None
            parts += part if plain else (part,)
        together = _Together(modules, [part for part in parts if isinstance(part, Fusible)], given, channels_last)
        found = []
        for part in parts:
            found.append(_program_of(part, x))
            x = part(x)
        edited = any(isinstance(value, list) for module in modules[1:] for value in vars(module).values())
        if not edited and together.take(found):
            with self._lock:
                if forgotten == self._forgotten:
                    self._together = (*self._together[1 - _MOST :], together)
        return x


def _program_of(part: nn.Module, x: Tensor) -> tuple[Callable, tuple[Tensor, ...]] | None:
    """What was recorded of a call with an image like x, and the tensors that it takes beside."""
    if isinstance(part, Programmed):
        return part.program(x)
    read = standing.last(part) if isinstance(part, Fusible) else None
    known = None if read is None else again.find(read.seen, (x, *read.looks), part._fused_res_level)
    beside = None if known is None else folds.beside(part)
    return None if beside is None else beside.get(known)
