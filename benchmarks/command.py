"""`fused-res bench`: run a suite, and what is done with its result files."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from fused_res import check
from fused_res.benchmarks import agreement, compare, model, report, results, suite, sums, webpage
from fused_res.benchmarks.cases import SUITES
from fused_res.benchmarks.peers import MODES, REGISTRY
from fused_res.benchmarks.steps import UNFINISHED
from fused_res.console import UsageError
from fused_res.planner import LEVELS


def add_arguments(bench: argparse.ArgumentParser, device: Callable, positive: Callable) -> None:
    """The options of `fused-res bench`; `device` and `positive` are the command line's types."""
    bench.add_argument("--suite", choices=SUITES, default="quick", help="quick also runs the check and a short training")
    bench.add_argument("--mode", choices=MODES, default="train", help="train: forward and backward (default)")
    bench.add_argument("--dtype", choices=check.CHECKED, help="default: bf16 on a GPU, fp32 on the CPU; fp32 is TF32 on a GPU")
    bench.add_argument("--batch", nargs="+", type=positive, help="one or several; default: 16 64 256 on a GPU, 8 on the CPU")
    bench.add_argument("--rounds", type=positive, default=30, help="interleaved rounds (default 30)")
    bench.add_argument("--time-budget", type=float, metavar="SECONDS", help="for the timings; may cut the rounds to no less than 5")
    bench.add_argument("--keep-memory", action="store_true", help="have glibc's malloc keep what is freed, for all peers alike")
    bench.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin no further case; exit code 3, --resume goes on")
    bench.add_argument("--peers", nargs="+", metavar="NAME", help=f"of: {', '.join(REGISTRY)}; or all; default: by device and mode")
    bench.add_argument(
        "--levels", nargs="*", choices=LEVELS, metavar="LEVEL", help="also fused_res at these levels; all if none named"
    )
    bench.add_argument(
        "--cases", nargs="+", metavar="CASE", help="only these of the suite; --resume adds the others to the same file"
    )
    bench.add_argument("--device", type=device, help="default: the GPU if there is one")
    bench.add_argument("--output", type=Path, metavar="DIR", help="for result file and plot; default: fused-res-results/DEVICE")
    bench.add_argument("--resume", action="store_true", help="go on with the result file in DIR, which must be of the same run")
    bench.add_argument("--json", action="store_true", help="print JSON to standard output instead of text")
    bench.set_defaults(run=run)
    actions = bench.add_subparsers(dest="action", metavar="{compare,model,report}", help="or what to do with result files")

    comparing = actions.add_parser("compare", help="two result files, case by case; marks regressions")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    comparing.add_argument("--peers", nargs="+", metavar="NAME", help="only these; default: all in both files")
    comparing.add_argument("--tolerance", type=float, default=compare.TOLERANCE, help="default %(default)s")
    comparing.add_argument("--fail", action="store_true", help="exit code 1 if anything has regressed")
    comparing.add_argument("--json", action="store_true", help="print JSON to standard output instead of text")
    comparing.set_defaults(run=_compare)

    modelling = actions.add_parser("model", help="a step on paper: bytes, FLOPs, and the time to be expected by level and GPU")
    modelling.add_argument("--suite", choices=[name for name in SUITES if name != "networks"], default="resnet50")
    modelling.add_argument("--mode", choices=MODES, default="train")
    modelling.add_argument("--dtype", choices=model.ITEMSIZES, default="bf16")
    modelling.add_argument("--batch", type=positive, default=64)
    modelling.add_argument("--gpu", nargs="+", choices=model.GPUS, default=list(model.SHOWN))
    modelling.add_argument("--results", nargs="*", type=Path, metavar="FILE", help="show what these measured beside it")
    modelling.add_argument(
        "--least", action="store_true", help="the least times that bytes and FLOPs allow, instead of those to be expected"
    )
    modelling.add_argument("--json", action="store_true", help="print JSON to standard output instead of text")
    modelling.set_defaults(run=_model)

    reporting = actions.add_parser("report", help="one HTML page, which needs no network, of result files")
    reporting.add_argument("files", type=Path, nargs="+", metavar="FILE")
    reporting.add_argument("--output", type=Path, default=Path("fused-res-report.html"), help="default %(default)s")
    reporting.set_defaults(run=_report)


def _loaded(path: Path) -> dict:
    try:
        return results.load(path)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


def _compare(options: argparse.Namespace) -> int:
    old, new = _loaded(options.old), _loaded(options.new)
    try:
        rows = compare.compare(old, new, options.tolerance, options.peers)
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(json.dumps(rows, indent=1) if options.json else compare.text(old, new, rows, options.tolerance))
    return 1 if options.fail and any(row["verdict"] == "REGRESSED" for row in rows) else 0


def _model(options: argparse.Namespace) -> int:
    documents = [_loaded(path) for path in options.results or ()]
    rows = model.predict(options.suite, options.mode, options.batch, options.dtype, options.gpu, documents, options.least)
    print(json.dumps(rows, indent=1) if options.json else model.text(rows))
    return 0


def _report(options: argparse.Namespace) -> int:
    page = webpage.page([_loaded(path) for path in options.files])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page)
    print(f"written: {options.output}")
    return 0


def run(options: argparse.Namespace) -> int:
    unknown = set(options.peers or ()) - {*REGISTRY, suite.ALL}
    if unknown:
        raise UsageError(f"--peers: expected all or some of {', '.join(REGISTRY)}, got {', '.join(sorted(unknown))}")
    known = [case.name for case in SUITES[options.suite]]
    if unknown := set(options.cases or ()) - set(known):
        raise UsageError(f"--cases: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
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
        cases=options.cases,
        keep_memory=options.keep_memory,
    ).resolved()
    try:
        document = suite.run(asked)
    except (suite.CheckFailedError, agreement.NoOracleError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    except (results.StaleResultError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(document | {"sums": sums.sums(document, asked.suite)}, indent=1, allow_nan=False))
    else:
        report.print_table(document)
        print(f"written: {', '.join(str(path) for path in (asked.file, asked.plot) if path.is_file())}")
    failed = suite.failures(document, asked.cases)
    for failure in failed:
        print(f"FAILED: {failure}", file=sys.stderr)
    if "finished" not in document and not suite.measured(document, asked):
        print("unfinished; the same command with --resume goes on", file=sys.stderr)
        return UNFINISHED
    return 0 if document.get("digits", {}).get("passed", True) and not failed else 1
