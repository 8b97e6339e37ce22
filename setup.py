"""Maps the top-level folders `kernels` and `benchmarks` into the package; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "fused_res",
        "fused_res.backends",
        "fused_res.block",
        "fused_res.primitives",
        "fused_res.kernels",
        "fused_res.benchmarks",
    ],
    package_dir={"fused_res.kernels": "kernels", "fused_res.benchmarks": "benchmarks"},
)
