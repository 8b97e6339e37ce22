"""Proof on a GPU: `python3 benchmarks/gpu.py` builds, tests, checks, times and profiles everything on the NVIDIA GPU that is there.

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
"""Seconds a process may take, and the least time that is worth starting one with."""
STOP_AFTER = 300
"""Seconds after which a benchmark begins no further case; a case takes less than the rest of the limit."""
SOURCES = ("fused_res", "kernels", "csrc", "benchmarks", "tests")
PASSED, SKIPPED, UNFINISHED = "passed", "skipped", 3
BUILD = f"""
import os, runpy, sys, torch
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{{}}.{{}}".format(*torch.cuda.get_device_capability()))
os.chdir({str(ROOT)!r})
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


@dataclass(frozen=True)
class Slice:
    """A command after `python`. `accepted` are the exit codes of success. `within` is a program that runs python, and options of
    its own; where it is not installed the slice is skipped. `resumable`: exit code UNFINISHED asks for another run, with --resume.
    `last`: it is made of what the others leave, and runs again after any of them.
    """

    name: str
    arguments: tuple[str, ...]
    accepted: tuple[int, ...] = (0,)
    within: tuple[str, ...] = ()
    resumable: bool = False
    last: bool = False


def kernel_tests() -> list[str]:
    """The test files that mirror the kernels' stems."""
    stems = [path.stem for path in sorted((ROOT / "kernels").glob("*.py"))]
    return [str(ROOT / "tests" / f"test_{stem}.py") for stem in stems if (ROOT / "tests" / f"test_{stem}.py").is_file()]


def sanitizer(tool: str) -> Slice:
    """The numerical check, one seed of every block, under compute-sanitizer; memory errors and races make it fail."""
    within = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20")
    small = ("--dtype", "fp32", "--seeds", "1", "--backend", "native", "triton")
    # Exit code 1 is the check's own: numbers are judged by the slice `check`, at its full number of seeds.
    return Slice(f"sanitizer-{tool}", ("-m", "fused_res", "check", *small), accepted=(0, 1), within=within)


def benches(output: Path, more: tuple[str, ...]) -> list[Slice]:
    """The suites, training of the usual networks first."""
    runs = [(suite, "train", dtype) for dtype in ("bf16", "fp32", "fp16") for suite in ("resnet50", "resnet18")]
    runs += [("networks", "train", "bf16"), *((s, mode, "bf16") for mode in ("eval", "forward") for s in ("resnet50", "resnet18"))]
    runs += [(suite, "train", "bf16") for suite in ("wide_resnet50_2", "resnext50_32x4d")]
    command = ("-m", "fused_res", "bench", "--output", str(output), "--stop-after", str(STOP_AFTER))
    return [
        Slice(
            f"{suite}-{mode}-{dtype}",
            (*command, "--suite", suite, "--mode", mode, "--dtype", dtype, *(() if suite == "networks" else ("--levels",)), *more),
            resumable=True,
        )
        for suite, mode, dtype in runs
    ]


def slices(output: Path, more: tuple[str, ...]) -> list[Slice]:
    """In the order of their value: the native library, which the rest then finds, correctness, then speed.

    `more` are further arguments of every benchmark.
    """
    pytest = ("-m", "pytest", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-q")
    return [
        Slice("build", ("-c", BUILD)),
        Slice("tests", (*pytest, "-m", "gpu", str(ROOT / "tests"))),
        *([Slice("kernels", (*pytest, *kernel_tests()))] if kernel_tests() else []),
        Slice("check", ("-m", "fused_res", "check", "--json")),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        *benches(output, more),
        *finish(output),
    ]


def finish(output: Path, worst: int = 4) -> list[Slice]:
    """What is made of the result files, which must be there."""
    code = (
        "import sys; from pathlib import Path; from {module} import main; "
        "files = sorted(map(str, Path(sys.argv[1]).glob('*.jsonl'))); sys.exit(main([*{before!r}, *files, *sys.argv[2:]]))"
    )
    profile = code.format(module="fused_res.benchmarks.profiling", before=[])
    report = code.format(module="fused_res.cli", before=["bench", "report"])
    return [
        Slice("profile", ("-c", profile, str(output), "--worst", str(worst), "--output", str(output / "profile.md")), last=True),
        Slice("report", ("-c", report, str(output), "--output", str(output / "report.html")), last=True),
    ]


def dry_slices(output: Path) -> list[Slice]:
    """Each kind of slice in miniature, on the CPU."""
    pytest = ("-m", "pytest", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-q")
    small = ("--suite", "resnet18", "--mode", "eval", "--dtype", "fp32", "--batch", "1", "--rounds", "1", "--stop-after", "4")
    peers = ("--peers", "eager channels_last", "bare convolutions", "fused_res")
    bench = ("-m", "fused_res", "bench", "--device", "cpu", "--output", str(output))
    return [
        Slice("tests", (*pytest, "-m", "gpu", "--collect-only", str(ROOT / "tests" / "test_gpu.py")), accepted=(0, 5)),
        Slice("check", ("-m", "fused_res", "check", "--json", "--dtype", "fp32", "--backend", "reference", "--seeds", "1")),
        Slice("sanitizer", ("-m", "fused_res", "info"), within=("compute-sanitizer-of-a-dry-run",)),
        Slice("resnet18-eval-fp32", (*bench, *small, *peers), resumable=True),
        *finish(output, worst=1),
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
    """What is finished, in a file. A slice counts only with the same sources and the same command."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self.slices = json.loads(path.read_text()) if path.is_file() else {}

    def _key(self, chosen: Slice) -> str:
        command = json.dumps([*chosen.within, *chosen.arguments]).replace(str(ROOT), "")
        return hashlib.sha256(f"{self.source} {command}".encode()).hexdigest()[:16]

    def begun(self, chosen: Slice) -> bool:
        return self.slices.get(chosen.name, {}).get("key") == self._key(chosen)

    def status(self, chosen: Slice) -> str:
        found = self.slices.get(chosen.name, {"status": "not started"})["status"]
        return found if found == "not started" or self.begun(chosen) else f"{found}, with other sources or options"

    def finished(self, chosen: Slice) -> bool:
        return self.begun(chosen) and self.slices[chosen.name]["status"].startswith((PASSED, SKIPPED))

    def note(self, chosen: Slice, status: str, seconds: float) -> None:
        before = self.slices[chosen.name]["seconds"] if self.begun(chosen) and chosen.resumable else 0.0
        self.slices[chosen.name] = {"status": status, "seconds": round(before + seconds, 1), "key": self._key(chosen)}
        self.path.write_text(json.dumps(self.slices, indent=1) + "\n")


def run_slice(chosen: Slice, environment: dict, folder: Path, output: Path, limit: float, begun: bool) -> str:
    """Run one slice, or go on with one that was begun; returns its status.

    Its output is kept under logs/, which git ignores: it may name this machine's paths.
    """
    if chosen.within and shutil.which(chosen.within[0]) is None:
        return f"{SKIPPED}: {chosen.within[0]} is not installed"
    logs = output / "logs"
    logs.mkdir(exist_ok=True)
    (logs / ".gitignore").write_text("*\n")
    command = [*chosen.within, sys.executable, *chosen.arguments, *(["--resume"] if chosen.resumable and begun else [])]
    out, log = logs / f"{chosen.name}.out", logs / f"{chosen.name}.err"
    # Under a sanitizer every tensor has memory of its own, so that reading past one shows.
    environment = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if chosen.within else environment
    code = execute(command, environment, folder, out, log, limit)
    if chosen.name == "check" and code in (0, 1):
        shutil.copyfile(out, output / "check.json")
    if code is None or (chosen.resumable and code == UNFINISHED):
        return "unfinished"
    if code in chosen.accepted:
        return PASSED
    tail = "\n".join([*out.read_text().splitlines()[-25:], *log.read_text().splitlines()[-25:]])
    print(tail)
    return f"failed with exit code {code}"


def run_to_end(chosen: Slice, environment: dict, folder: Path, output: Path, state: State, end: float) -> None:
    """Run a slice; a resumable one again and again, as long as there is time and it gets further."""
    while True:
        begin = time.monotonic()
        results = sorted(output.glob(f"{chosen.name}.jsonl"))
        before = [path.stat().st_size for path in results]
        status = run_slice(chosen, environment, folder, output, min(TIME_LIMIT, end - begin), state.begun(chosen))
        state.note(chosen, status, time.monotonic() - begin)
        print(f"{chosen.name}: {status}", flush=True)
        further = before != [path.stat().st_size for path in sorted(output.glob(f"{chosen.name}.jsonl"))]
        if status != "unfinished" or not chosen.resumable or not further or end - time.monotonic() < LEAST:
            return


def summarise(output: Path, planned: list[Slice], state: State, folder: Path) -> Path:
    """Write the one-page summary."""
    sys.path.insert(0, str(folder))
    from fused_res.benchmarks import summary

    rows = [(s.name, state.status(s), str(state.slices.get(s.name, {}).get("seconds", ""))) for s in planned]
    (output / "summary.md").write_text(summary.page(output, rows))
    return output / "summary.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results/gpu/NAME-OF-THE-GPU")
    parser.add_argument("--slice", action="append", metavar="NAME", help="only this one, finished or not; may be repeated")
    parser.add_argument("--list", action="store_true", help="name the slices and what became of them")
    parser.add_argument("--dry-run", action="store_true", help="miniature slices on the CPU, to test this script")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start nothing after this, all slices together")
    parser.add_argument("--batch", nargs="+", metavar="N", help="batch sizes of the benchmarks; default: theirs")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="peers of the benchmarks; default: theirs")
    options = parser.parse_args()
    gpu = "dry run" if options.dry_run else gpu_name()
    if gpu is None:
        print("no NVIDIA GPU that torch can use; --dry-run tries this script on the CPU", file=sys.stderr)
        return 2
    folder_name = "-".join(gpu.lower().split())
    output = (options.output or ROOT / "benchmarks" / "results" / "gpu" / folder_name).resolve()
    more = (("--batch", *options.batch) if options.batch else ()) + (("--peers", *options.peers) if options.peers else ())
    planned = dry_slices(output) if options.dry_run else slices(output, more)
    unknown = set(options.slice or ()) - {s.name for s in planned}
    if unknown:
        names = ", ".join(s.name for s in planned)
        parser.error(f"--slice: expected one of {names}, got {', '.join(sorted(unknown))}")
    state = State(output / "state.json", fingerprint())
    if options.list:
        print("\n".join(f"{s.name}: {state.status(s)}" for s in planned))
        return 0
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + (options.time_limit or float("inf"))
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != ROOT / "benchmarks"]
    ran = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = importable(folder)
        for chosen in planned:
            wanted = chosen.name in options.slice if options.slice else not state.finished(chosen) or (ran and chosen.last)
            if wanted and end - time.monotonic() >= LEAST:
                print(f"{chosen.name} ...", flush=True)
                run_to_end(chosen, environment, folder, output, state, end)
                ran = True
        print(f"summary: {summarise(output, planned, state, folder)}")
    return 0 if all(state.finished(s) for s in planned if not options.slice or s.name in options.slice) else 1


if __name__ == "__main__":
    sys.exit(main())
