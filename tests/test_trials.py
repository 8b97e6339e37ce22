"""Trials: who wins, by planted results and planted timings; and the real clock on a CPU."""

import itertools
import math

import pytest
import torch

from fused_res.tuning import trials
from fused_res.tuning.trials import (
    ADVERSE,
    INPUTS,
    LARGEST,
    Candidate,
    Errors,
    UnusableDeviceError,
    Verdict,
    errors,
    hold,
    limits,
    measure,
)

CPU = torch.device("cpu")
TRUTH = [torch.linspace(1, 2, 1000, dtype=torch.float64), torch.ones(7, 5, dtype=torch.float64)]


def right(scale=1e-6):
    return [(t * (1 + scale)).float() for t in TRUTH]


def candidate(results=None, run=None):
    return Candidate(run or (lambda i: None), lambda i: (results or right)())


def raising():
    raise RuntimeError("no such instruction\nand more")


def race(count):
    """Right the first `count` times."""
    calls = itertools.count()
    return lambda: right(1e-6 if next(calls) < count else 1e-2)


def even(runs, *_):
    return dict.fromkeys(runs, 1.0)


def held(candidates, measure=even, truth=lambda i: TRUTH):
    return hold(candidates, "library", truth, CPU, measure, queued=True)


def contest(candidates, seconds):
    asked = []

    def planted(runs, device, queued):
        asked.append(set(runs))
        return {name: seconds[name] for name in runs}

    return held({"library": candidate()} | candidates, planted), asked


@pytest.mark.parametrize(
    ("seconds", "winner"),
    [
        ({"library": 1.0, "a": 0.9, "b": 0.8}, "b"),
        ({"library": 1.0, "a": 0.8, "b": 0.9}, "a"),
        ({"library": 1.0, "a": 0.98, "b": 1.5}, "library"),
        ({"library": 1.0, "a": 1.0, "b": 1.0}, "library"),
        ({"library": 1.0, "a": math.nan, "b": 0.5}, "b"),
    ],
)
def test_the_fastest_wins_if_it_beats_the_incumbent_by_more_than_noise(seconds, winner):
    verdict, asked = contest({"a": candidate(), "b": candidate()}, seconds)
    assert verdict.winner == winner
    assert asked == [{"library", "a", "b"}]
    assert verdict.rejected == {}


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        (lambda: right(1e-4), "wrong: result 0 has a relative error of 1.0e-04"),
        (lambda: [right()[0], right()[1] * 1.001], "wrong: result 1"),
        (lambda: [right()[0].index_fill(0, torch.tensor(3), math.nan), right()[1]], "relative error of inf"),
        (lambda: [right()[0].index_fill(0, torch.tensor(3), math.inf), right()[1]], "relative error of inf"),
        (lambda: [right()[0][1:], right()[1]], "relative error of inf"),
        (lambda: right()[:1], "gives 1 results, not 2"),
        (raising, "RuntimeError: no such instruction"),
    ],
)
def test_the_wrong_and_the_crashing_never_win_nor_are_timed(results, reason):
    verdict, asked = contest({"fast": candidate(results), "b": candidate()}, {"library": 1.0, "fast": 0.1, "b": 0.5})
    assert verdict.winner == "b"
    assert asked == [{"library", "b"}]
    assert reason in verdict.rejected["fast"]
    assert "\n" not in verdict.rejected["fast"]


def test_one_that_is_right_once_does_not_win():
    verdict, _ = contest({"racy": candidate(race(1)), "b": candidate()}, {"library": 1.0, "racy": 0.1, "b": 0.5})
    assert verdict.winner == "b"
    assert "wrong" in verdict.rejected["racy"]
    assert contest({"steady": candidate(race(3))}, {"library": 1.0, "steady": 0.1})[0].winner == "steady"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_that_loses_a_nan_or_an_infinity_never_wins(value):
    def hit(tensors, i):
        return [tensors[0].index_fill(0, torch.tensor(3), value), tensors[1]] if i == ADVERSE else tensors

    def truth(i):
        return hit(TRUTH, i)

    keeps = Candidate(lambda i: None, lambda i: hit(right(), i))
    spreads = Candidate(lambda i: None, lambda i: [found + 0 * found.sum() for found in hit(right(), i)])
    verdict = held({"library": keeps, "keeps": keeps, "spreads": spreads, "loses": candidate()}, truth=truth)
    assert verdict.rejected == {"loses": "wrong: result 0 has lost a NaN or an infinity"}
    assert set(verdict.seconds) == {"library", "keeps", "spreads"}


def test_right_is_measured_by_the_incumbents_errors_and_the_floor_of_the_dtype():
    near, far = candidate(lambda: right(1.2e-3)), candidate(lambda: right(2.5e-3))
    assert set(held({"library": candidate(lambda: right(1e-3)), "near": near, "far": far}).rejected) == {"far"}
    exact, rounded = ([t.to(dtype) for t in TRUTH] for dtype in (torch.float64, torch.bfloat16))
    assert errors(rounded[0], TRUTH[0]).l2 > 1e-3
    for dtype, rejected in ((torch.bfloat16, set()), (torch.float32, {"halves"})):
        same, halves = (candidate(lambda found=found, dtype=dtype: [t.to(dtype) for t in found]) for found in (exact, rounded))
        assert set(held({"library": same, "halves": halves}).rejected) == rejected


def test_results_in_another_dtype_are_wrong():
    verdict = held({"library": candidate(), "wide": candidate(lambda: [t.double() for t in right()])})
    assert verdict.rejected == {"wide": "wrong: result 0 is in torch.float64, not torch.float32"}


def noisy(true, share, generator):
    """The truth with errors of this share of its values' size, in float32."""
    return (true + share * torch.randn(true.shape, generator=generator, dtype=true.dtype)).float()


@pytest.mark.parametrize(("size", "most"), [(1, 0.3), (8, 0.05), (64, 0), (20_000, 0)])
def test_equals_are_hardly_ever_refused(size, most):
    """Their errors have nothing in common but their size: the limits leave room for the scatter of two such."""
    draw, count, refused = torch.Generator().manual_seed(0), 200, 0
    for _ in range(count):
        true = torch.randn(size, generator=draw, dtype=torch.float64)
        one, other = (errors(noisy(true, 1e-3, draw), true) for _ in range(2))
        limit = limits(one, size, torch.float32)
        refused += other.l2 > limit.l2 or other.largest > limit.largest
    assert refused <= most * count


@pytest.mark.parametrize("size", [1000, 100_000, 10_000_000])
def test_one_wrong_value_among_millions_is_found(size):
    """Where it hides in the relative error, the largest gives it away."""
    draw = torch.Generator().manual_seed(0)
    true = torch.randn(size, generator=draw, dtype=torch.float64)
    incumbent, equal = noisy(true, 1e-3, draw), noisy(true, 1e-3, draw)
    wrong = equal.clone()
    wrong[size // 2] += 1
    candidates = {name: candidate(lambda found=found: [found]) for name, found in (("equal", equal), ("wrong", wrong))}
    verdict = held({"library": candidate(lambda: [incumbent])} | candidates, truth=lambda i: [true])
    assert list(verdict.rejected) == ["wrong"]


def test_one_and_a_half_times_the_error_is_found_in_an_image():
    draw = torch.Generator().manual_seed(0)
    true = torch.randn(20_000, generator=draw, dtype=torch.float64)
    incumbent, worse = noisy(true, 1e-3, draw), noisy(true, 1.5e-3, draw)
    verdict = held({"library": candidate(lambda: [incumbent]), "worse": candidate(lambda: [worse])}, truth=lambda i: [true])
    assert "relative error" in verdict.rejected["worse"]


def test_every_draw_is_judged():
    """Right on the first draw and wrong on the second, whatever the clock says."""
    blind = Candidate(lambda i: None, lambda i: right())
    verdict = held(
        {"library": Candidate(lambda i: None, lambda i: [t * (i + 1) for t in right()]), "blind": blind},
        lambda runs, *_: {name: 1.0 if name == "library" else 0.1 for name in runs},
        lambda i: [t * (i + 1) for t in TRUTH],
    )
    assert verdict.winner == "library"
    assert "wrong: result 0" in verdict.rejected["blind"]


def test_nobody_to_beat_is_nothing_to_measure():
    assert contest({"fast": candidate(raising)}, {}) == (Verdict("library", {}, {"fast": "RuntimeError: no such instruction"}), [])
    assert contest({}, {}) == (Verdict("library", {}, {}), [])


def test_an_incumbent_that_fails_stays():
    failing = {"library": candidate(raising), "a": candidate()}
    assert held(failing, None) == Verdict("library", {}, {"library": "RuntimeError: no such instruction"})


def test_a_dead_device_is_an_error_of_its_own(monkeypatch):
    calls = []

    def synchronize(device):
        calls.append(device)
        if len(calls) > 1:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(trials, "_synchronize", synchronize)
    with pytest.raises(UnusableDeviceError, match=r"took cpu with it.*illegal memory access.*FUSED_RES_TUNE=0"):
        contest({"a": candidate()}, {})


def test_errors_are_relative_and_infinite_where_they_cannot_be_told():
    one, never = torch.ones(4, dtype=torch.float64), Errors(math.inf, math.inf)
    assert errors(one.float() * 1.5, one) == (0.5, 0.5)
    assert errors(torch.tensor([1.0, 1, 1, 3]), one) == (1.0, 2.0)
    assert errors(one * 0, one * 0) == (0.0, 0.0)
    assert errors(one[:0], one[:0]) == (0.0, 0.0)
    assert errors(one, one * 0) == never
    assert errors(one * math.nan, one) == never
    assert errors(one[:3], one) == never


def test_limits_leave_room_for_the_scatter_of_few_values():
    found = Errors(1e-3, 1e-2)
    assert limits(found, 10**8, torch.float32) == (pytest.approx(1.25e-3, rel=1e-3), LARGEST * 1e-2)
    assert limits(found, 64, torch.float32).l2 == pytest.approx(1.25e-3 * 1.375)
    assert limits(Errors(0.0, 0.0), 64, torch.float32) == (8 * 2.0**-24,) * 2


def test_the_clock_interleaves_and_takes_medians_of_rounds_on_changing_inputs(monkeypatch):
    order, now, rounds = [], [0.0], itertools.count()
    slow = {"a": 1.0, "b": 3.0}

    def run(name):
        def work(i):
            order.append((name, i))
            now[0] += slow[name] * (100 if next(rounds) % 5 == 0 else 1)

        return work

    monkeypatch.setattr(trials.time, "perf_counter", lambda: now[0])
    assert measure({name: run(name) for name in slow}, CPU, True) == slow
    assert len(order) == 2 * (trials.ROUNDS + 2)
    assert order[:4] == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert {i for _, i in order} == set(range(INPUTS))
