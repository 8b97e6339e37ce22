"""A whole benchmark run: the numerical check and the training run first where they are asked for, then the cases, one by one.

The result file is written after every case, so that an interrupted run can be resumed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fused_res import check, environment
from fused_res.benchmarks import digits, plot, report
from fused_res.benchmarks.cases import BATCHES, SUITES
from fused_res.benchmarks.clocks import clock_for
from fused_res.benchmarks.peers import REGISTRY, Setup
from fused_res.benchmarks.runner import ROUNDS, run_case
from fused_res.console import progress, require

WHOLE = ("quick",)
"""Suites that begin with the numerical check and the training run."""


@dataclass(frozen=True)
class Options:
    """`time_budget` [s] is for the cases; it may cut the rounds, never below `runner.MIN_ROUNDS`. None for a default by device."""

    suite: str = "quick"
    mode: str = "train"
    dtype: str | None = None
    batches: Sequence[int] | None = None
    rounds: int = ROUNDS
    time_budget: float | None = None
    device: torch.device | None = None
    peers: Sequence[str] | None = None
    output: Path | None = None
    resume: bool = False

    def resolved(self) -> "Options":
        """With every None that has a default replaced by it."""
        device = self.device or environment.default_device()
        return Options(
            self.suite,
            self.mode,
            self.dtype or ("bf16" if device.type == "cuda" else "fp32"),
            tuple(self.batches or BATCHES[device.type]),
            self.rounds,
            self.time_budget,
            device,
            tuple(self.peers or REGISTRY),
            self.output or default_output(device),
            self.resume,
        )

    @property
    def command(self) -> str:
        """The command line that repeats the run, without paths."""
        parts = ["fused-res bench", f"--suite {self.suite}", f"--mode {self.mode}", f"--dtype {self.dtype}"]
        parts += ["--batch " + " ".join(map(str, self.batches)), f"--rounds {self.rounds}"]
        if self.time_budget is not None:
            parts.append(f"--time-budget {self.time_budget:g}")
        if tuple(self.peers) != tuple(REGISTRY):
            parts.append("--peers " + " ".join(f"'{name}'" for name in self.peers))
        return " ".join(parts)

    @property
    def file(self) -> Path:
        return self.output / f"{self.suite}-{self.mode}-{self.dtype}.json"


class CheckFailedError(RuntimeError):
    """The numerical check failed: nothing is timed."""


def default_output(device: torch.device) -> Path:
    """In a checkout benchmarks/results/cpu or benchmarks/results/gpu/<name>; elsewhere ./fused-res-results."""
    root = environment.checkout()
    if root is None:
        return Path("fused-res-results")
    results = root / "benchmarks" / "results"
    if device.type == "cpu":
        return results / "cpu"
    return results / "gpu" / "-".join(torch.cuda.get_device_name(device).lower().split())


def _resumable(old: dict, new: dict) -> bool:
    """Whether rows of the old document may stand beside the new one's: same device, versions, sources and command."""
    names = ("command", "device", "versions", "source", "settings")
    return all(old.get(name) == new[name] for name in names) and report.device_name(old) == report.device_name(new)


def begin(options: Options) -> dict:
    """The document to fill: the file's if the run resumes it, else a new one."""
    document = report.new(options.command, options.device)
    if options.resume and options.file.is_file():
        try:
            old = report.load(options.file)
        except ValueError:
            return document
        if _resumable(old, document):
            return old
    return document


def run(options: Options) -> dict:
    """Run the suite; returns the document, which is also in `options.file`, with a plot beside it.

    Raises:
        CheckFailedError: the numerical check failed.
        agreement.ResultMismatchError: fused_res differs from eager in a measured case. Cases before it are in the file.
        console.MissingPackageError: a package of the extra `bench` is missing.
    """
    options = options.resolved()
    for module, package in (
        ("rich", None),
        ("matplotlib", None),
        *((("sklearn", "scikit-learn"),) if options.suite in WHOLE else ()),
    ):
        require(module, package)
    document = begin(options)
    if options.suite in WHOLE:
        _prove(document, options)
    _measure(document, options)
    plot.draw(document, options.file.with_suffix(".png"))
    return document


def _prove(document: dict, options: Options) -> None:
    if "check" not in document:
        with progress(len(check.plan(options.device)[0]), "check against fp64") as advance:
            document["check"] = check.summary(check.run(options.device, advance=advance))
        report.save(document, options.file)
    if not document["check"]["passed"]:
        bad = [row for row in document["check"]["rows"] if not row["passed"]]
        named = "; ".join(" ".join(row[k] for k in ("backend", "dtype", "block", "mode", "quantity")) for row in bad)
        raise CheckFailedError(f"the numerical check against fp64 failed, nothing was timed: {named or 'nothing could run'}")
    if "digits" not in document:
        with progress(digits.total_steps(), "training on digits") as advance:
            document["digits"] = digits.run(options.device, advance=advance)
        report.save(document, options.file)


def _measure(document: dict, options: Options) -> None:
    dtype, clock = environment.DTYPES[options.dtype], clock_for(options.device)
    setups = [
        Setup(case, batch, dtype, options.device, options.mode) for case in SUITES[options.suite] for batch in options.batches
    ]
    done = {report.row_key(row) for row in document["rows"]}
    setups = [s for s in setups if (s.case.name, s.batch, options.dtype, s.mode) not in done]
    end = None if options.time_budget is None else time.monotonic() + options.time_budget
    with progress(len(setups) * (len(options.peers) + 1), "blocks") as advance:
        for n, setup in enumerate(setups):
            deadline = None
            if end is not None:
                now = time.monotonic()
                deadline = now + max(0.0, end - now) / (len(setups) - n)
            document["rows"] += run_case(setup, options.peers, options.rounds, deadline, clock, advance)
            setup.release()
            if options.device.type == "cuda":
                document["gpu_after"] = environment.gpu(options.device.index)
            report.save(document, options.file)
