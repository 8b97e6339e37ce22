"""The instructions and the core of the CUDA kernels that multiply, on the CPU: against whole numbers, and broken on purpose."""

import shutil

import cuda_emulator as cuda
import cuda_products as products
import pytest
import torch
from compare import every, same, within

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed"),
]


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MAJORS = [(False, False), (False, True), (True, False), (True, True)]
LANES, GROUP, MEMBER = torch.arange(32), torch.arange(32) // 4, torch.arange(32) % 4


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    program = cuda.build(tmp_path_factory.mktemp("products"), "cuda_products", "-O0")
    emulator = cuda.Emulator(program, products.CORE)
    yield emulator
    emulator.close()


# Instructions: elements are laid out here by the formulas of the PTX manual, and there by their emulation.


def words(elements):
    """[32, registers, elements of a register] as words."""
    return elements.contiguous().view(32, -1).view(torch.int32)


def fragment_a(a):
    """A [16, 16] of 16 bits or [16, 8] of 32: `row = group or group + 8`, `col = member * 2 + (i & 1)`, + 8 of the last four."""
    if a.dtype == F32:  # a0 to a3
        return words(torch.stack([a[GROUP + 8 * (i in (1, 3)), MEMBER + 4 * (i >= 2)] for i in range(4)], 1))
    i = range(8)
    return words(torch.stack([a[GROUP + 8 * (k in (2, 3, 6, 7)), MEMBER * 2 + (k & 1) + 8 * (k >= 4)] for k in i], 1))


def fragment_b(b):
    """B [16, 8] of 16 bits or [8, 8] of 32: `row = member * 2 + (i & 1)`, + 8 of the last two, `col = group`."""
    if b.dtype == F32:
        return words(torch.stack([b[MEMBER + 4 * i, GROUP] for i in range(2)], 1))
    return words(torch.stack([b[MEMBER * 2 + (i & 1) + 8 * (i >= 2), GROUP] for i in range(4)], 1))


def fragment_c(c):
    """C [16, 8]: `row = group or group + 8`, `col = member * 2 + (i & 1)`."""
    return torch.stack([c[GROUP + 8 * (i >= 2), MEMBER * 2 + (i & 1)] for i in range(4)], 1).contiguous()


@pytest.mark.parametrize(("kind", "dtype", "depth"), [("mma bf16", BF16, 16), ("mma f16", F16, 16), ("mma f32", F32, 8)])
def test_a_product_of_a_warp_is_that_of_whole_numbers(emulator, kind, dtype, depth):
    for seed in range(3):
        a, b = (products.integers(*shape, low=-99, high=100, dtype=dtype, seed=seed) for shape in ((16, depth), (depth, 8)))
        c = products.integers(16, 8, low=-999, high=1000, dtype=F32, seed=seed)
        to = products.run_instruction(emulator, kind, fragment_a(a), fragment_b(b), fragment_c(c), to=torch.empty(32, 4))
        same(to, fragment_c((c.double() + a.double() @ b.double()).float()))
        assert not torch.equal(to, fragment_c((c.double() + a.double() @ b.flip(0).double()).float()))


def test_a_product_cuts_float32_off_to_tf32_and_its_sum_to_float32(emulator):
    a, b, c = torch.zeros(16, 8), torch.zeros(8, 8), torch.zeros(16, 8)
    a[0, 0], a[1, 0], b[0, 0], b[0, 1], c[1, 1] = 1 + 2.0**-10 + 2.0**-11, 1.0, 1.0, -(2.0**-30), 1.0
    to = products.run_instruction(emulator, "mma f32", fragment_a(a), fragment_b(b), fragment_c(c), to=torch.empty(32, 4))
    assert to[0, 0] == 1 + 2.0**-10
    assert to[4, 1] == 1 - 2.0**-24


@pytest.mark.parametrize("by", [1, 2, 3, 7, 49, 641, 3136, 2**16 - 1, 2**16, 2**16 + 1, 2**30 - 1, 2**30 + 1, 2**31 - 1])
def test_a_divider_divides_all_that_it_may_be_given(emulator, by):
    """Numbers below 2^31, at and next to multiples above all."""
    generator = torch.Generator().manual_seed(by)
    quotients = torch.randint(0, (2**31 - 1) // by + 1, (42,), generator=generator)
    numbers = torch.cat([(quotients * by + step).clamp(0, 2**31 - 1) for step in (-1, 0, 1)])
    numbers = torch.cat((numbers, torch.tensor([0, 2**31 - 1])))
    got = products.run_instruction(emulator, "divide", numbers.int(), to=torch.empty(128, dtype=torch.int32), mode=by)
    same(got.long(), numbers // by)


def test_tf32_is_rounded_to_the_nearest_and_away_from_zero_between_two(emulator):
    half = 2.0**-11
    values = torch.tensor([1 + half, -1 - half, 1 + half - 2.0**-23, 3.4028235e38, float("inf"), -0.0, float("nan")])
    got = products.run_instruction(emulator, "tf32", values, to=torch.empty(7), mode=7)
    same(got[:6], torch.tensor([1 + 2 * half, -1 - 2 * half, 1.0, float("inf"), float("inf"), -0.0]))
    every(got[6:].isnan())
    same(products.to_tf32(values)[:6], got[:6])


def test_halves_are_what_the_manual_says_of_prmt(emulator):
    """Of a selector's digit the lower three bits name a byte, and the fourth one puts its top bit into all eight."""
    words = torch.randint(-(2**31), 2**31, (32,), generator=torch.Generator().manual_seed(0)).int()
    got = products.run_instruction(emulator, "halves", words, to=torch.empty(32, dtype=torch.int32), mode=0)
    named = words.view(torch.uint8).view(32, 4)[:, [0x9988 >> 4 * digit & 7 for digit in range(4)]]
    assert all(0x9988 >> 4 * digit & 8 for digit in range(4))
    same(got.view(torch.uint8).view(32, 4), torch.where(named >= 128, 255, 0).to(torch.uint8))


@pytest.mark.parametrize("backwards", [0, 2])
def test_matrices_reach_the_lanes_of_the_manual(emulator, backwards):
    """Lane l gets of matrix i the l % 4-th word of line l / 4; transposed, element l / 4 of the lines 2 * (l % 4) and the next."""
    lines = torch.randint(-(2**15), 2**15, (32, 8), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    named = lines.flip(0) if backwards else lines
    to = products.run_instruction(emulator, "matrices", lines, to=torch.empty(32, 4, dtype=torch.int32), mode=backwards)
    same(to, torch.stack([named.view(torch.int32)[8 * i + GROUP, MEMBER] for i in range(4)], 1))
    assert not emulator.conflicts
    mode = 1 + backwards
    to = products.run_instruction(emulator, "matrices", lines, to=torch.empty(32, 4, dtype=torch.int32), mode=mode)
    halves = [torch.stack([named[8 * i + 2 * MEMBER + k, GROUP] for k in (0, 1)], 1) for i in range(4)]
    same(to, torch.stack(halves, 1).view(32, 8).view(torch.int32))


def test_a_copy_is_made_by_the_wait_that_covers_it_and_full_of_nan_until_then(emulator):
    source = torch.arange(1, 129, dtype=torch.int32)
    to = products.run_instruction(emulator, "copies", source, to=torch.empty(4, 8, 3, dtype=torch.int32))
    first = source[:96:4].view(3, 8)
    for after in range(4):
        for group in range(3):
            there = torch.zeros(8, dtype=torch.int32) if group == 2 else first[group]
            same(to[after, :, group], there if group < after else torch.full((8,), -1, dtype=torch.int32), f"{group} {after}")


@pytest.mark.parametrize(
    ("bytes_", "apart", "turns"),
    [(4, 1, 0), (4, 0, 0), (4, 2, 1), (4, 32, 31), (4, 33, 0), (8, 2, 0), (8, 4, 2), (16, 4, 0), (16, 8, 4), (16, 32, 28)],
)
def test_bank_conflicts_are_counted(emulator, bytes_, apart, turns):
    """Accesses of 8 bytes come in two turns and those of 16 in four, of consecutive lanes; these are the turns beyond."""
    kind = f"banks {bytes_}"
    products.run_instruction(emulator, kind, None, to=torch.empty(32, dtype=torch.int32), mode=apart)
    assert sum(emulator.conflicts.values()) == turns


# The core


def expected(first, second, v=None, depth=None, again=False):
    begin, end = depth or (0, first.shape[1])
    a, b = products.multiplied(products.activated(first, v)), products.multiplied(second)
    return (a[:, begin:end] @ b[:, begin:end].T) * (2 if again else 1)


@pytest.mark.parametrize(("dtype", "majors"), [*((BF16, m) for m in MAJORS), (F32, MAJORS[0]), (F32, MAJORS[3])], ids=str)
def test_products_of_whole_numbers_are_exact(emulator, majors, dtype):
    """Whichever way the operands lie in memory, over all of the depth or a part of it, added up twice; no bank conflict."""
    for rows, columns, full, depth, again in ((72, 80, 136, None, False), (8, 16, 8, None, True), (64, 64, 144, (32, 112), False)):
        first, second = (products.integers(n, full, dtype=dtype, seed=n) for n in (rows, columns))
        got = products.run_plain(emulator, first, second, majors, depth=depth, again=again)
        same(got.double(), expected(first, second, depth=depth, again=again))
        assert not emulator.conflicts


@pytest.mark.parametrize("majors", [MAJORS[0], MAJORS[3]], ids=str)
def test_ragged_operands_are_multiplied_exactly(emulator, majors):
    for rows, columns, full in ((1, 1, 1), (67, 35, 45)):
        first, second = (products.integers(n, full, seed=n + 1) for n in (rows, columns))
        same(products.run_plain(emulator, first, second, majors, wide=False).double(), expected(first, second))
        assert not emulator.conflicts


@pytest.mark.parametrize("wide", [True, False])
def test_a_prologue_is_applied_once_and_leaves_zeros_outside(emulator, wide):
    first, second = products.integers(72, 40), products.integers(16, 40, seed=1)
    v = products.vectors(40, whole=True)
    v[4] += 1  # relu(shift) is not 0: what is outside must not count
    got = products.run_plain(emulator, first, second, v=v, wide=wide)
    same(got.double(), expected(first, second, v))
    assert not emulator.conflicts
    # Along the depth, rows of the depth that are not there would count if they were not 0.
    lie = products.run_plain(emulator, first.T.contiguous(), products.integers(16, 72, seed=2), (True, True), wide=wide, v=v)
    a = products.activated(first, v)
    same(lie.double(), a.double().T @ products.integers(16, 72, seed=2).double().T)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_products_of_real_numbers_are_within_float32(emulator, dtype):
    """Products are exact and each of a sum's additions cuts off less than an ulp of float32."""
    first, second = (products.real(n, 200, dtype=dtype, seed=n) for n in (24, 40))
    got, exact = products.run_plain(emulator, first, second), expected(first, second)
    size = products.multiplied(first).abs() @ products.multiplied(second).abs().T
    within(got, exact, 200 / 8 * 2.0**-23 * size)


def test_thread_order_changes_no_bit(emulator):
    first, second, v = products.real(40, 136), products.real(24, 136, seed=1), products.vectors(136)
    runs = [products.run_plain(emulator, first, second, v=v) for _ in range(3)]
    same(runs[0], runs[1])
    same(runs[0], runs[2])


# Broken on purpose


STEPS = 5
"""Of the loop over a depth of 136: as many waits for copies, and one barrier more. The last one reads the first stage, where the
way of the result to memory begins.
"""
STAGE = (64 + 64) * 64
"""Bytes of a stage."""


def breaks(emulator, tries=10, **fault):
    """Whether a fault shows, in an error or in a result, in some order of threads."""
    first, second = products.integers(64, 136), products.integers(64, 136, seed=1)
    right = expected(first, second)
    for _ in range(tries):
        try:
            if not torch.equal(products.run_plain(emulator, first, second, **fault).double(), right):
                return True
        except (RuntimeError, cuda.CrashError):
            return True
    return False


def test_without_a_fault_nothing_breaks(emulator):
    assert not breaks(emulator, tries=2)
    assert not breaks(emulator, tries=2, skipped_wait=STEPS)  # there is no such wait
    assert not breaks(emulator, tries=2, skipped_barrier=STEPS + 1)


@pytest.mark.parametrize("wait", range(STEPS))
def test_every_missing_wait_shows(emulator, wait):
    assert breaks(emulator, skipped_wait=wait)


@pytest.mark.parametrize("barrier", range(STEPS + 1))
def test_every_missing_barrier_shows(emulator, barrier):
    assert breaks(emulator, skipped_barrier=barrier)


def test_reading_early_shows(emulator):
    assert breaks(emulator, early=True)


def test_a_wrong_stage_shows(emulator):
    assert breaks(emulator, displaced=STAGE)


def test_a_swapped_fragment_shows(emulator):
    assert breaks(emulator, swapped=True)


@pytest.mark.parametrize("who", [1, 2], ids=["reader", "writer"])
def test_different_swizzles_of_reader_and_writer_show(emulator, who):
    assert breaks(emulator, unswizzled=who)


def test_without_the_swizzle_banks_conflict(emulator):
    """The counter, held against the core: both without the swizzle multiply rightly, and read the same banks."""
    assert not breaks(emulator, tries=2, unswizzled=3)
    assert any("panel.cuh" in place for place in emulator.conflicts)
