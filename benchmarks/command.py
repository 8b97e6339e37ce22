"""`fused-res bench`: run a suite, and what is done with its result files."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from fused_res import check
from fused_res.benchmarks import agreement, report, results, suite, sums
from fused_res.benchmarks.cases import SUITES
from fused_res.benchmarks.peers import MODES, REGISTRY
from fused_res.console import MissingPackageError
from fused_res.planner import LEVELS

UNFINISHED = 3


def add_arguments(bench: argparse.ArgumentParser, device: Callable, positive: Callable) -> None:
    """The options of `fused-res bench`; `device` and `positive` are the command line's types."""
    bench.add_argument("--suite", choices=SUITES, default="quick", help="quick also runs the check and a short training")
    bench.add_argument("--mode", choices=MODES, default="train", help="train: forward and backward (default)")
    bench.add_argument("--dtype", choices=check.CHECKED, help="default: bf16 on a GPU, fp32 on the CPU; fp32 is TF32 on a GPU")
    bench.add_argument("--batch", nargs="+", type=positive, help="one or several; default: 16 64 256 on a GPU, 8 on the CPU")
    bench.add_argument("--rounds", type=positive, default=30, help="interleaved rounds (default 30)")
    bench.add_argument("--time-budget", type=float, metavar="SECONDS", help="for the timings; may cut the rounds to no less than 5")
    bench.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin no further case; exit code 3, --resume goes on")
    bench.add_argument("--peers", nargs="+", metavar="NAME", help=f"of: {', '.join(REGISTRY)}; or all; default: by device and mode")
    bench.add_argument(
        "--levels", nargs="*", choices=LEVELS, metavar="LEVEL", help="also fused_res at these levels; all if none named"
    )
    bench.add_argument("--device", type=device, help="default: the GPU if there is one")
    bench.add_argument("--output", type=Path, metavar="DIR", help="for the result file and the plot")
    bench.add_argument("--resume", action="store_true", help="go on with the result file in DIR, which must be of the same run")
    bench.add_argument("--json", action="store_true", help="print JSON to standard output instead of text")
    bench.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    unknown = set(options.peers or ()) - {*REGISTRY, suite.ALL}
    if unknown:
        raise MissingPackageError(f"--peers: expected all or some of {', '.join(REGISTRY)}, got {', '.join(sorted(unknown))}")
    asked = suite.Options(
        suite=options.suite,
        mode=options.mode,
        dtype=options.dtype,
        batches=options.batch,
        rounds=options.rounds,
        time_budget=options.time_budget,
        device=options.device,
        peers=options.peers,
        levels=() if options.levels is None else options.levels or LEVELS,
        output=options.output,
        resume=options.resume,
        stop_after=options.stop_after,
    ).resolved()
    try:
        document = suite.run(asked)
    except (suite.CheckFailedError, agreement.ResultMismatchError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    except (results.StaleResultError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(document | {"sums": sums.sums(document, asked.suite)}, indent=1, allow_nan=False))
    else:
        report.print_table(document)
        print(f"written: {asked.file}")
    if "finished" not in document:
        print("unfinished; the same command with --resume goes on", file=sys.stderr)
        return UNFINISHED
    return 0 if document.get("digits", {}).get("passed", True) else 1
