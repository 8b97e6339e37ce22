"""Instructions of a compiled kernel: what its loops and the rest of it issue, from the machine code alone."""

import re
from typing import Any, NamedTuple

_BRANCH = re.compile(r"\bBRA\b.*`\((\.L\w+)\)")
_END = re.compile(r"(?:BRA\s+`|EXIT\b|RET\.)")
_PREDICATE = re.compile(r"^@!?U?P(?:T|\d+)\s+")
_MATRIX = re.compile(r"(?:U?HGMMA|HMMA|UTCHMMA|UTCQMMA|UTCMMA)\b")


class Code(NamedTuple):
    """Instructions of a kernel in their order, without predicates; at which of them each label stands, and those that never go on
    to the next one.
    """

    instructions: list[str]
    labels: dict[str, int]
    ends: set[int]


def disassembled(sass: str) -> Code:
    """From what `nvdisasm` prints."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    ends: set[int] = set()
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.+);", line):
            if _END.match(found[1].strip()):
                ends.add(len(instructions))
            instructions.append(_PREDICATE.sub("", found[1].strip()))
    return Code(instructions, labels, ends)


def _passes(code: Code, header: int, end: int) -> bool:
    """Whether all ways from the first instruction to the one at `end` pass the one at `header`."""
    seen, left = {header}, [0]
    while left:
        at = left.pop()
        if at in seen or at >= len(code.instructions):
            continue
        seen.add(at)
        if at not in code.ends:
            left.append(at + 1)
        branch = _BRANCH.search(code.instructions[at])
        if branch and branch[1] in code.labels:
            left.append(code.labels[branch[1]])
    return end == header or end not in seen


def spans(code: Code) -> list[tuple[int, int]]:
    """Where the loops that multiply matrices begin and end, in the order of their ends, none inside another.

    A branch that goes back closes a loop only where nothing comes to it but through the loop's first instruction: compilers move
    the rare rest of a wait behind the end of a kernel, from where it goes back into the middle.
    """
    found: list[tuple[int, int]] = []
    for end, instruction in enumerate(code.instructions):
        branch = _BRANCH.search(instruction)
        if branch and code.labels.get(branch[1], end + 1) <= end and _passes(code, code.labels[branch[1]], end):
            found.append((code.labels[branch[1]], end + 1))
    bodies = [(a, b) for a, b in found if any(map(_MATRIX.match, code.instructions[a:b]))]
    return [(a, b) for a, b in bodies if not any((a <= c and d <= b) and (a, b) != (c, d) for c, d in bodies)]


def loops(code: Code) -> list[list[str]]:
    """The bodies of `spans`."""
    return [code.instructions[a:b] for a, b in spans(code)]


def skipped(code: Code, span: tuple[int, int], others: list[tuple[int, int]]) -> int:
    """How many instructions the shortest branch passes over that leaves a loop out, and none of the others; 0 without one."""
    found = []
    for at, instruction in enumerate(code.instructions):
        branch = _BRANCH.search(instruction)
        to = code.labels.get(branch[1], 0) if branch else 0
        if at < span[0] and to >= span[1] and not any(at < a and to >= b for a, b in others):
            found.append(to - at - 1)
    return min(found, default=0)


def _trips(name: str, found: dict, constants: dict) -> list[int]:
    """How often a program runs each of its loops, in their order."""

    def steps(size: int, block: str) -> int:
        return -(-size // constants[block])

    if name in ("conv_fprop", "conv_dgrad"):
        depth = steps(found["C"], "BLOCK_C") if name == "conv_fprop" else steps(found["K"], "BLOCK_K")
        phases = 1 if name == "conv_fprop" else found["g"].stride_h * found["g"].stride_w
        return [max(1, round(depth * constants["R"] * constants["S"] / phases))]
    if name == "pointwise_tail":
        second = [] if found["weight2"] is None else [steps(found["K2"], "BLOCK_K")]
        return [steps(found["K"], "BLOCK_K"), *second]
    if name == "pointwise_tail_backward_apply":
        through = [steps(found["C"], "BLOCK_C")] if found["through"] is None else []
        return [*through, *([steps(found["K"], "BLOCK_C")] if found["quadratic"] is not None else [])]
    return [steps(min(found["rows"], found["P"]), "BLOCK_P")]


class Count(NamedTuple):
    """programs: those that have something to do. rest: instructions outside of the loops with a matrix product; bodies: those of
    each loop; trips: how often a program runs it.
    """

    programs: float
    rest: int
    bodies: list[int]
    trips: list[int]

    @property
    def program(self) -> int:
        """Instructions that each warp of a program issues."""
        return self.rest + sum(body * trips for body, trips in zip(self.bodies, self.trips, strict=True))


def count(launch: Any, code: Code) -> Count:
    """Of a launch and its machine code. Both branches of a condition count as if they ran, but in `moments` and in the first pass
    of the tail's backward, which have a loop for channels near 0, counted here, and another for those far from it. `moments` needs
    no program below the diagonal.
    """
    name = launch.kernel.__name__.removesuffix("_kernel")
    found = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    bodies, trips = [len(body) for body in loops(code)], _trips(name, found, launch.constants)
    rest, programs = len(code.instructions) - sum(bodies), float(launch.programs)
    if name in ("moments", "pointwise_tail_backward_reduce"):
        rest //= len(bodies)
    if name == "moments":
        across = -(-found["K"] // launch.constants["BLOCK_K"])
        programs *= (across + 1) / (2 * across)
    return Count(programs, rest, bodies[: len(trips)], trips)
