"""A whole benchmark run: the numerical check and the training run first where they are asked for, then the cases, one by one.

The result file is added to after every case, so that an interrupted run can be resumed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fused_res import check, environment
from fused_res.benchmarks import ceiling, digits, heap, plot, results
from fused_res.benchmarks.cases import BATCHES, SUITES
from fused_res.benchmarks.clocks import Clock, clock_for
from fused_res.benchmarks.peers import REGISTRY, DeviceLostError, Setup, level_peer, usual
from fused_res.benchmarks.runner import ROUNDS, run_case
from fused_res.console import progress, require
from fused_res.planner import LEVELS

WHOLE = ("quick",)
"""Suites that begin with the numerical check and the training run."""
ALL = "all"


@dataclass(frozen=True)
class Options:
    """`time_budget` [s] is for the timings; it may cut the rounds, never below `runner.MIN_ROUNDS`. After `stop_after` [s] no
    further case is begun, but one. `levels` adds a peer for each, fused_res at that level. `cases` leaves the others of the
    suite to further runs, which resume this one. `keep_memory` has malloc keep what is freed, for all peers. None for a default by
    device.
    """

    suite: str = "quick"
    mode: str = "train"
    dtype: str | None = None
    batches: Sequence[int] | None = None
    rounds: int = ROUNDS
    time_budget: float | None = None
    device: torch.device | None = None
    peers: Sequence[str] | None = None
    levels: Sequence[str] = ()
    output: Path | None = None
    resume: bool = False
    stop_after: float | None = None
    cases: Sequence[str] | None = None
    keep_memory: bool = False

    def resolved(self) -> "Options":
        """With every None that has a default replaced by it."""
        device = self.device or environment.default_device()
        peers = tuple(self.peers or usual(device, self.mode))
        if ALL in peers:
            peers = tuple(name for name in REGISTRY if name not in map(level_peer, LEVELS))
        extra = map(level_peer, self.levels)
        return replace(
            self,
            dtype=self.dtype or ("bf16" if device.type == "cuda" else "fp32"),
            batches=tuple(self.batches or BATCHES[device.type]),
            device=device,
            peers=(*peers, *(name for name in extra if name not in peers)),
            output=self.output or default_output(device),
        )

    @property
    def command(self) -> str:
        """The command line that repeats the run, without paths."""
        parts = ["fused-res bench", f"--suite {self.suite}", f"--mode {self.mode}", f"--dtype {self.dtype}"]
        parts += ["--batch " + " ".join(map(str, self.batches)), f"--rounds {self.rounds}"]
        if self.time_budget is not None:
            parts.append(f"--time-budget {self.time_budget:g}")
        if self.keep_memory:
            parts.append("--keep-memory")
        if self.peers != usual(self.device, self.mode):
            parts.append("--peers " + " ".join(f"'{name}'" for name in self.peers))
        return " ".join(parts)

    @property
    def file(self) -> Path:
        return self.output / f"{self.suite}-{self.mode}-{self.dtype}.jsonl"

    @property
    def plot(self) -> Path:
        return self.file.with_suffix(".png")


class CheckFailedError(RuntimeError):
    """The numerical check failed: nothing is timed."""


def default_output(device: torch.device) -> Path:
    """./fused-res-results/cpu, or NAME-OF-THE-GPU for cpu. Git ignores the folder: results to commit are written with --output."""
    name = "cpu" if device.type == "cpu" else "-".join(torch.cuda.get_device_name(device).lower().split())
    return Path("fused-res-results") / name


def begin(options: Options, clock: Clock) -> dict:
    """The document to fill: the file's if the run resumes it, else a new one.

    Raises:
        results.StaleResultError: the file is of another run.
    """
    document = results.new(options.command, options.device)
    document |= {"suite": options.suite, "conditions": clock.conditions}
    if options.resume and options.file.is_file():
        return results.resume(options.file, document)
    results.begin(document, options.file)
    return document


def run(options: Options) -> dict:
    """Run the suite; returns the document, which is also in `options.file`, with a plot beside it once it is finished.

    Raises:
        CheckFailedError: the numerical check failed.
        agreement.NoOracleError: eager does not run in a case. Cases before it are in the file.
        console.MissingPackageError: a package of the extra `bench` is missing.
        results.StaleResultError: the file to resume is of another run.
        ValueError: memory is to be kept, and this malloc cannot be told.
    """
    if options.keep_memory and not heap.keep_freed():
        raise ValueError("keep_memory: this malloc cannot be told")
    options = options.resolved()
    for module, package in (
        ("rich", None),
        ("matplotlib", None),
        *((("sklearn", "scikit-learn"),) if options.suite in WHOLE else ()),
    ):
        require(module, package)
    clock = clock_for(options.device)
    document = begin(options, clock)
    if "finished" not in document:
        if options.suite in WHOLE:
            _prove(document, options)
        if _measure(document, options, clock):
            results.append(document, options.file, "finished", results.now())
    if "finished" in document:
        plot.draw(document, options.plot, results.digest(options.file))
    return document


def _prove(document: dict, options: Options) -> None:
    if "check" not in document:
        with progress(len(check.plan(options.device)[0]), "check against fp64") as advance:
            found = check.summary(check.run(options.device, advance=advance))
        results.append(document, options.file, "check", found)
    if not document["check"]["passed"]:
        bad = [row for row in document["check"]["rows"] if not row["passed"]]
        named = "; ".join(" ".join(row[k] for k in ("backend", "dtype", "block", "mode", "quantity")) for row in bad)
        raise CheckFailedError(f"the numerical check against fp64 failed, nothing was timed: {named or 'nothing could run'}")
    if "digits" not in document:
        with progress(digits.total_steps(), "training on digits") as advance:
            found = digits.run(options.device, advance=advance)
        results.append(document, options.file, "digits", found)


def failures(document: dict, cases: Sequence[str] | None = None) -> list[str]:
    """What of fused_res ought to have run and did not, or computed something else than eager, in these cases or in all."""
    failed = (row for row in document["rows"] if row.get("failed") and (cases is None or row["case"] in cases))
    return [f"{row['case']}, batch {row['batch']}: {row['peer']} {row['reason']}" for row in failed]


def _setups(document: dict, options: Options) -> list[Setup]:
    """What is still to be measured, of all cases of the suite."""
    dtype, done = environment.DTYPES[options.dtype], {results.row_key(row) for row in document["rows"]}
    setups = [
        Setup(case, batch, dtype, options.device, options.mode) for case in SUITES[options.suite] for batch in options.batches
    ]
    return [s for s in setups if (s.case.name, s.batch, options.dtype, s.mode) not in done]


def measured(document: dict, options: Options) -> bool:
    """Whether the cases that were asked for are in the document."""
    return not any(options.cases is None or setup.case.name in options.cases for setup in _setups(document, options))


def _lost(document: dict, setup: Setup) -> dict[str, str]:
    """Peers that took the GPU's context with them when this was measured before, and how."""
    key = [setup.case.name, setup.batch]
    return {found["peer"]: found["reason"] for found in document.get("lost", ()) if found["setup"] == key}


def _measure(document: dict, options: Options, clock: Clock) -> bool:
    """Measure what is missing; returns whether nothing is any more."""
    missing, dtype, start = _setups(document, options), environment.DTYPES[options.dtype], time.monotonic()
    setups = [setup for setup in missing if options.cases is None or setup.case.name in options.cases]
    if setups and "ceiling" not in document:
        results.append(document, options.file, "ceiling", ceiling.measure(options.device, dtype, clock))
    end, doubted = None if options.time_budget is None else start + options.time_budget, False
    with progress(len(setups) * (len(options.peers) + 1), "blocks") as advance:
        for n, setup in enumerate(setups):
            now = time.monotonic()
            if n > 0 and options.stop_after is not None and now - start > options.stop_after:
                return False
            deadline = None if end is None else now + max(0.0, end - now) / (len(setups) - n)
            try:
                rows = run_case(setup, options.peers, options.rounds, deadline, clock, advance, _lost(document, setup))
            except DeviceLostError as error:
                found = {
                    "setup": [setup.case.name, setup.batch],
                    "peer": error.peer,
                    "reason": f"took the GPU with it: {error.reason}",
                }
                results.append(document, options.file, "lost", [*document.get("lost", ()), found])
                return False
            setup.release()
            if not doubted and any(row["reason"] is None and ceiling.excess(row, document["ceiling"]) for row in rows):
                doubted = True  # the ceiling may have been measured in a bad moment
                again = ceiling.measure(options.device, dtype, clock)
                results.append(document, options.file, "ceiling", ceiling.higher(document["ceiling"], again))
            results.append(document, options.file, "rows", rows)
    return len(setups) == len(missing)
