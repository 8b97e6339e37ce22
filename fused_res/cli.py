"""The command `fused-res`: info, check and bench. Exit codes: 0 all well, 1 a check failed, 2 it could not be run as asked."""

import argparse
import json
import sys

import torch

from fused_res import backends, check, environment
from fused_res.console import UsageError, progress, table, wrapped
from fused_res.planner import LEVELS

try:
    from fused_res.benchmarks import command
except ModuleNotFoundError as error:
    if error.name != "fused_res.benchmarks":
        raise
    command = None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}") from error
    if device.type == "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device not in environment.devices():
        here = ", ".join(map(str, environment.devices()))
        raise argparse.ArgumentTypeError(f"{text} is not here; this machine has {here}")
    return device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fused-res", description="Whole residual blocks as one PyTorch operator.")
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="what this machine can run, and why not the rest")
    info.set_defaults(run=_info)

    checking = commands.add_parser("check", help="compare every backend and dtype that runs here with fp64")
    checking.add_argument("--device", type=_device, help="default: the GPU if there is one")
    checking.add_argument("--dtype", nargs="+", choices=check.CHECKED, default=check.CHECKED)
    checking.add_argument("--backend", nargs="+", choices=backends.NAMES, default=backends.NAMES)
    checking.add_argument("--level", nargs="+", choices=LEVELS, default=LEVELS)
    blocks = tuple(map(str, check.SHAPES))
    checking.add_argument("--block", nargs="+", choices=blocks, default=blocks, metavar="BLOCK", help=f"of: {', '.join(blocks)}")
    checking.add_argument("--mode", nargs="+", choices=check.MODES, default=check.MODES)
    checking.add_argument(
        "--seeds",
        type=_positive,
        default=check.SEEDS,
        help=f"random problems per block (default {check.SEEDS}; fewer widen the limits)",
    )
    checking.add_argument("--all", action="store_true", help="show every quantity, not the worst of each block")
    checking.set_defaults(run=_check)

    bench = commands.add_parser("bench", help="time blocks and networks against eager, torch.compile and others; compare, report")
    if command is None:
        bench.add_argument("anything", nargs=argparse.REMAINDER)
        bench.set_defaults(run=_no_bench)
    else:
        command.add_arguments(bench, _device, _positive)

    for parser_ in (info, checking):
        parser_.add_argument("--json", action="store_true", help="print JSON to standard output instead of text")
    return parser


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))


def _info(options: argparse.Namespace) -> int:
    versions, machine, support = environment.versions(), environment.machine(), environment.support()
    if options.json:
        found = {"versions": versions, "machine": machine, "git": environment.git(), "levels": LEVELS, "backends": support}
        _print_json(found)
        return 0
    print(wrapped(", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)))
    cores = f"{machine['cpu_cores']} cores, {machine['threads']} threads"
    print(wrapped(f"CPU: {machine['cpu']}, {cores}, {machine['cpu_capability']}"))
    for gpu in machine.get("gpus", ()):
        print(f"GPU: {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB")
    if "gpus" not in machine:
        print("GPU: none that torch can use")
    print(f"levels of fusion: {', '.join(LEVELS)}\n")
    groups: dict[tuple, list[str]] = {}
    for row in support:
        groups.setdefault((row["device"], row["backend"], row["reason"]), []).append(row["dtype"])
    rows = [(*key[:2], " ".join(dtypes), "no" if key[2] else "yes", key[2] or "") for key, dtypes in groups.items()]
    print(table(("device", "backend", "dtypes", "runs", "why not"), rows))
    return 0


def _check(options: argparse.Namespace) -> int:
    device = options.device or environment.default_device()
    selection = check.Selection(options.dtype, options.backend, options.level, options.block, options.mode)
    with progress(len(check.plan(device, selection)[0]), "check against fp64") as advance:
        rows = check.run(device, selection, options.seeds, advance)
    summary = check.summary(rows)
    if options.json:
        _print_json({"device": str(device), "versions": environment.versions(), **summary, "rows": [row.to_dict() for row in rows]})
        return 0 if summary["passed"] else 1
    lines, reasons = [], []
    for row in rows if options.all else check.worst(rows):
        if row.reason is not None:
            reasons.append(f"{row.backend}, {row.dtype} not run: {row.reason}")
            continue
        numbers = (f"{value:.1e}" for value in (row.error, row.eager_error, row.limit))
        verdict = "pass" if row.passed else "FAIL"
        lines.append((row.backend, row.level, row.dtype, row.block, row.mode, row.quantity, *numbers, verdict))
    lines.sort(key=lambda line: (line[0], line[2]))
    head = ("backend", "level", "dtype", "block", "mode", "quantity", "error", "eager", "limit", "verdict")
    print("\n".join([table(head, lines, shared=5), *(["", *map(wrapped, reasons)] if reasons else [])]))
    failed = sum(not row.passed for row in rows)
    verdict = f"{failed} FAILED." if failed else "All passed." if summary["passed"] else "Nothing could run."
    shown = "" if options.all else " The table shows of each block the one nearest to its limit."
    compared = wrapped(f"{summary['compared']} quantities compared. {verdict}{shown}")
    print(f"\n{compared}")
    return 0 if summary["passed"] else 1


def _no_bench(options: argparse.Namespace) -> int:
    raise UsageError("this installation has no fused_res.benchmarks; use a source checkout")


def main(argv: list[str] | None = None) -> int:
    """Run a command line, without the program's name; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
