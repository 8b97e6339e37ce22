"""Which times a failed test makes void."""

import pytest

from fused_res.benchmarks import void

ALL = ("bn_act", "epilogue", "prologue", "moment")
BOTH = ("triton", "native")


@pytest.mark.parametrize(
    ("test", "backends", "levels"),
    [
        ("tests/test_conv_fprop.py::test_exact[triton-1x3-torch.float32]", ["triton"], ALL[1:]),
        ("tests/test_bn_act.py::test_rounds_once[native-1-1-skip-torch.float32]", ["native"], ALL),
        ("tests/test_moments.py::test_matches_float64[triton-64-plain]", ["triton"], ["moment"]),
        ("tests/test_pointwise_tail.py::test_past_the_caches", BOTH, ["moment"]),
        ("tests/test_moment_form.py::test_other", BOTH, ["moment"]),
        ("tests/test_gpu.py::test_streams[bn_act]", BOTH, ["bn_act"]),
        ("tests/test_gpu.py::test_step[stage 2 first-prologue-torch.float16]", BOTH, ["prologue"]),
        ("tests/test_gpu.py::test_step[odd sizes-None-torch.float16]", BOTH, ALL),
        ("tests/test_gpu.py::test_prologue_and_moment", BOTH, ALL),
    ],
)
def test_a_failed_test_voids_what_it_names_or_all_that_use_its_kernels(test, backends, levels):
    assert sorted(void.ways_of(test)) == sorted((backend, level) for backend in backends for level in levels)


def test_only_failed_tests_void_anything():
    found = {
        "tests/test_gpu.py::test_a[triton-moment]": {"outcome": "failed"},
        "tests/test_gpu.py::test_b[triton-moment]": {"outcome": "failed"},
        "tests/test_gpu.py::test_a[triton-prologue]": {"outcome": "passed"},
        "tests/test_gpu.py::test_a[native-moment]": {"outcome": "skipped"},
    }
    assert {way: len(tests) for way, tests in void.by_tests(found).items()} == {("triton", "moment"): 2}


def test_rows_are_void_by_what_ran():
    ways = {("triton", "moment"): ["why"]}
    assert void.is_void({"backend": "triton, moment"}, ways)
    assert void.is_void({"backend": "triton, bn_act; triton, moment"}, ways)
    assert not void.is_void({"backend": "native, moment"}, ways)
    assert not void.is_void({"backend": "eager"}, ways)
    assert not void.is_void({"backend": None}, ways)
    assert not void.is_void({}, ways)
