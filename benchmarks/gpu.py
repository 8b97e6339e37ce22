"""Proof on a GPU: `python3 benchmarks/gpu.py` tests, checks and times everything on the NVIDIA GPU that is there.

The project need not be installed. The work is cut into slices, each a process of its own with a time limit; what is finished is
kept in the output directory, and a further run does what is not. Exit codes: 0 all passed, 1 not yet or failed, 2 no GPU.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT, LEAST = 480, 45
"""Seconds a slice may take, and the least time that is worth starting one with."""
SOURCES = ("fused_res", "kernels", "csrc", "benchmarks", "tests")
PASSED = "passed"
BUILD = f"""
import os, runpy, sys, torch
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{{}}.{{}}".format(*torch.cuda.get_device_capability()))
os.chdir({str(ROOT)!r})
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


@dataclass(frozen=True)
class Slice:
    """A command after `python`; `budget` is the share of the time limit that is handed on as --time-budget; 0 for none."""

    name: str
    arguments: tuple[str, ...]
    budget: float = 0.0
    accepted: tuple[int, ...] = (0,)


def kernel_tests() -> list[str]:
    """The test files that mirror the kernels' stems."""
    stems = [path.stem for path in sorted((ROOT / "kernels").glob("*.py"))]
    return [str(ROOT / "tests" / f"test_{stem}.py") for stem in stems if (ROOT / "tests" / f"test_{stem}.py").is_file()]


def slices(output: Path, dry_run: bool) -> list[Slice]:
    """In the order of their value: the native library, which the rest then finds, correctness, then speed."""
    pytest = ("-m", "pytest", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-q")
    bench = ("-m", "fused_res", "bench", "--output", str(output))
    if dry_run:
        small = (
            "--dtype",
            "fp32",
            "--batch",
            "1",
            "--rounds",
            "2",
            "--peers",
            "eager channels_last",
            "bare convolutions",
            "fused_res",
        )
        return [
            Slice("tests", (*pytest, "-m", "gpu", str(ROOT / "tests")), accepted=(0, 5)),
            Slice("kernels", (*pytest, "--collect-only", *kernel_tests()), accepted=(0, 5)),
            Slice("check", ("-m", "fused_res", "check", "--json", "--dtype", "fp32")),
            Slice("resnet18-fp32", (*bench, "--suite", "resnet18", *small), 0.5),
        ]
    return [
        Slice("build", ("-c", BUILD)),
        Slice("tests", (*pytest, "-m", "gpu", str(ROOT / "tests"))),
        *([Slice("kernels", (*pytest, *kernel_tests()))] if kernel_tests() else []),
        Slice("check", ("-m", "fused_res", "check", "--json")),
        *(
            Slice(f"{suite}-{dtype}", (*bench, "--suite", suite, "--dtype", dtype), 0.75)
            for dtype in ("bf16", "fp32", "fp16")
            for suite in ("resnet50", "resnet18")
        ),
    ]


def importable(folder: Path) -> dict[str, str]:
    """Lay the package out in a folder as an installation would, out of links, and return the environment that imports it."""
    package = folder / "fused_res"
    package.mkdir()
    built = {ROOT / "fused_res" / name for name in ("_native.so", "_native.json")}  # by the first slice, after this
    for path in {*(ROOT / "fused_res").iterdir()} | built | {ROOT / "kernels", ROOT / "benchmarks"}:
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    metadata = folder / f"fused_res-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fused-res\nVersion: {version}\n")
    search = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(search), "PYTHONDONTWRITEBYTECODE": "1"}


def fingerprint() -> str:
    """Hash of the sources and tests: a slice that passed with others is not finished."""
    digest = hashlib.sha256()
    files = (
        path
        for folder in SOURCES
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h")
    )
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def gpu_name() -> str | None:
    """The GPU's name, asked of a process of its own so that none of its memory is held here."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() and not torch.version.hip else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def execute(command: list[str], environment: dict[str, str], folder: Path, out: Path, log: Path, limit: float) -> int | None:
    """Exit code, or None at the time limit [s]; then every process it started is ended with it."""
    with out.open("w") as stdout, log.open("w") as stderr:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=stdout, stderr=stderr, preexec_fn=os.setpgrp)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class State:
    """What is finished, in a file."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self.slices = json.loads(path.read_text()) if path.is_file() else {}

    def finished(self, name: str) -> bool:
        found = self.slices.get(name, {})
        return found.get("status") == PASSED and found.get("source") == self.source

    def begun(self, name: str) -> bool:
        """Whether it was started with the same sources: what it has written may be added to."""
        return self.slices.get(name, {}).get("source") == self.source

    def note(self, name: str, status: str, seconds: float) -> None:
        self.slices[name] = {"status": status, "seconds": round(seconds, 1), "source": self.source}
        self.path.write_text(json.dumps(self.slices, indent=1) + "\n")


def run_slice(chosen: Slice, environment: dict, folder: Path, output: Path, limit: float, begun: bool) -> str:
    """Run one slice, or go on with one that was begun; returns its status.

    Its output is kept under logs/, which git ignores: it may name this machine's paths.
    """
    logs = output / "logs"
    logs.mkdir(exist_ok=True)
    (logs / ".gitignore").write_text("*\n")
    command = [sys.executable, *chosen.arguments]
    if chosen.budget:
        command += ["--time-budget", f"{chosen.budget * TIME_LIMIT:.0f}", *(["--resume"] if begun else [])]
    out, log = logs / f"{chosen.name}.out", logs / f"{chosen.name}.err"
    code = execute(command, environment, folder, out, log, limit)
    if chosen.name == "check" and code in (0, 1):
        shutil.copyfile(out, output / "check.json")
    if code is None:
        return f"unfinished after {limit:.0f} s"
    if code in chosen.accepted:
        return PASSED
    tail = "\n".join([*out.read_text().splitlines()[-25:], *log.read_text().splitlines()[-25:]])
    print(tail)
    return f"failed with exit code {code}"


def summarise(output: Path, names: list[str], state: State, folder: Path) -> Path:
    """Write the one-page summary: the slices, the check, and a table per result file."""
    sys.path.insert(0, str(folder))
    from fused_res.benchmarks import report, results

    lines = ["# fused_res on this GPU", "", "| slice | status | seconds |", "| --- | --- | ---: |"]
    for name in names:
        found = state.slices.get(name, {"status": "not started", "seconds": ""})
        stale = "" if found.get("source") in (None, state.source) else ", with other sources"
        lines.append(f"| {name} | {found['status']}{stale} | {found['seconds']} |")
    if (output / "check.json").is_file():
        found = json.loads((output / "check.json").read_text())
        worst = "not finite" if found["worst"] is None else f"at {found['worst']:.2f} of its limit"
        verdict = "passed" if found["passed"] else "FAILED"
        lines += ["", f"Numerical check on {found['device']}: {verdict}, {found['compared']} comparisons, worst {worst}."]
    for path in sorted(output.glob("*.jsonl")):
        picture = path.with_suffix(".png")
        lines += ["", f"## {path.stem}", "", report.markdown(results.load(path), picture.name if picture.is_file() else None)]
    (output / "summary.md").write_text("\n".join(lines) + "\n")
    return output / "summary.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", metavar="DIR")
    parser.add_argument("--slice", action="append", metavar="NAME", help="only this one, finished or not; may be repeated")
    parser.add_argument("--list", action="store_true", help="name the slices and what became of them")
    parser.add_argument("--dry-run", action="store_true", help="miniature slices on the CPU, to test this script")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start nothing after this, all slices together")
    options = parser.parse_args()
    gpu = None if options.dry_run or options.list else gpu_name()
    if gpu is None and not (options.dry_run or options.list):
        print("no NVIDIA GPU that torch can use; --dry-run tries this script on the CPU", file=sys.stderr)
        return 2
    output = (options.output / "dry-run" if options.dry_run else options.output).resolve()
    planned = slices(output, options.dry_run)
    names, source = [s.name for s in planned], fingerprint()
    unknown = set(options.slice or ()) - set(names)
    if unknown:
        parser.error(f"--slice: expected one of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    state = State(output / "state.json", source)
    if options.list:
        for name in names:
            print(f"{name}: {'passed' if state.finished(name) else state.slices.get(name, {}).get('status', 'not started')}")
        return 0
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + (options.time_limit or float("inf"))
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != ROOT / "benchmarks"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = importable(folder)
        for chosen in planned:
            wanted = chosen.name in options.slice if options.slice else not state.finished(chosen.name)
            limit = min(TIME_LIMIT, end - time.monotonic())
            if not wanted or limit < LEAST:
                continue
            print(f"{chosen.name} ...", flush=True)
            begin = time.monotonic()
            status = run_slice(chosen, environment, folder, output, limit, state.begun(chosen.name))
            state.note(chosen.name, status, time.monotonic() - begin)
            print(f"{chosen.name}: {status}", flush=True)
        print(f"summary: {summarise(output, names, state, folder)}")
    return 0 if all(state.finished(name) for name in options.slice or names) else 1


if __name__ == "__main__":
    sys.exit(main())
