"""Proof on a GPU that is there for minutes: `python3 benchmarks/gpu.py --minutes 9` checks, tests, times and profiles fused_res.

The project need not be installed; a library and compiled kernels that were made elsewhere (`make gpu-carry`) are used as they are.
The work is cut into steps (`fused_res.benchmarks.steps`), by value: each has a limit of its own and is begun only where its
estimate fits into what is left. After every step one archive holds all results and a summary of one page. What is finished stays
finished: a further call goes on. Exit codes: 0 all passed, 1 not yet or failed, 2 no GPU.
"""

import argparse
import contextlib
import hashlib
import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

if __package__:
    from fused_res.benchmarks import kernel_cache
    from fused_res.benchmarks.steps import FAILED, RUNNING, State, Step, pack, replace, run, set_aside
else:  # run as a script, perhaps without an installation: its own folder is on the path
    import kernel_cache
    from steps import FAILED, RUNNING, State, Step, pack, replace, run, set_aside

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("fused_res", "kernels", "csrc", "benchmarks", "tests")
LEVELS = ("bn_act", "epilogue", "prologue", "moment")
CASES = ("1.identity", "2.identity", "3.identity", "4.identity", "1.projection", "2.projection", "3.projection", "4.projection")
"""Of ResNet-50, by the time that they take together in the network."""
RESERVE = 12.0
"""Seconds kept for the summary and the archive."""
PROCESSES = 14
CACHE = "cache"
"""Folder of compiled kernels beside the results."""
CARRY = ROOT / "build" / "carry"
"""Where `make gpu-carry` leaves what was compiled beforehand."""
BUILD = f"""
import os, runpy, sys, torch
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{{}}.{{}}".format(*torch.cuda.get_device_capability()))
os.chdir({str(ROOT)!r})
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


def kernel_tests() -> list[str]:
    """The test files that mirror the kernels' stems, and the moment form's, which chains them."""
    stems = [path.stem for path in sorted((ROOT / "kernels").glob("*.py"))] + ["moment_form"]
    return [str(ROOT / "tests" / f"test_{stem}.py") for stem in stems if (ROOT / "tests" / f"test_{stem}.py").is_file()]


def gpu_tests() -> list[str]:
    """The files of tests that need a GPU: named, because collecting all others takes every process many seconds."""
    return [str(ROOT / "tests" / f"test_{name}.py") for name in ("gpu", "benchmarks_gpu")]


def pytest(output: Path, name: str, *arguments: str, processes: int = PROCESSES) -> tuple[str, ...]:
    """pytest in many processes, each test within a minute; every outcome is written down as soon as it is known."""
    options = ("--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-q", "--tb=short")
    spread = ("-n", str(processes), "--dist", "worksteal", "--timeout", "60", "--timeout-method", "thread")
    plugin = ("-p", "fused_res.benchmarks.outcomes", "--outcomes", str(output / f"{name}.outcomes.jsonl"))
    return ("-m", "pytest", *options, *(spread if processes > 1 else ()), *plugin, *arguments)


def full_check() -> Step:
    """The numerical check with all seeds, a process for each backend and dtype."""
    parts = [(backend, dtype) for backend in ("triton", "native", "reference") for dtype in ("fp32", "fp16", "bf16")]
    commands = tuple(("-m", "fused_res", "check", "--json", "--backend", backend, "--dtype", dtype) for backend, dtype in parts)
    keep = tuple(f"check-{backend}-{dtype}.json" for backend, dtype in parts)
    return Step("check", commands, estimate=60, limit=180, needs=("smoke",), keep=keep)


def sanitizer(tool: str) -> Step:
    """The numerical check, one seed of every block, under compute-sanitizer; memory errors and races make it fail."""
    within = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20")
    small = ("--dtype", "bf16", "--seeds", "1", "--backend", "native")
    return Step(
        f"sanitizer-{tool}",
        (("-m", "fused_res", "check", *small),),
        estimate=60,
        limit=150,
        accepted=(0, 1),  # 1 is the check's own: numbers are judged by the step `check`
        within=within,
        # Under a sanitizer every tensor has memory of its own, so that reading past one shows.
        environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    )


def timings(output: Path, suite: str, mode: str, dtype: str, batch: int, cases: Sequence[str], peers: Sequence[str]) -> list[Step]:
    """A suite's cases, each a step and a process of its own, all into one result file."""
    common = ("-m", "fused_res", "bench", "--output", str(output), "--resume", "--suite", suite, "--mode", mode, "--dtype", dtype)
    name = f"{suite}-{mode}-{dtype}"
    return [
        Step(
            f"{name} {case}",
            ((*common, "--batch", str(batch), "--rounds", "30", "--peers", *peers, "--cases", f"{suite}.{case}"),),
            estimate=15,
            limit=60,
            resumable=True,
            needs=("smoke",),
        )
        for case in cases
    ]


PEERS = (
    "eager NCHW",
    "eager channels_last",
    "torch.compile",
    "bare convolutions",
    "fused_res",
    *(f"fused_res {x}" for x in LEVELS),
)


def warm(batch: int, peers: Sequence[str]) -> Step:
    """Everything that the timings compile, compiled by many processes at once."""
    common = ("-m", "fused_res.benchmarks.warm", "--suite", "resnet50", "--batch", str(batch), "--dtype", "bf16")
    commands = [(*common, "--cases", f"resnet50.{case}", "--peers", peer) for case in CASES for peer in peers]
    return Step(
        "warm", tuple(commands), estimate=45, limit=100, needs=("smoke",), environment=(("TORCHINDUCTOR_COMPILE_THREADS", "1"),)
    )


def sequences(output: Path, name: str, environment: tuple[tuple[str, str], ...] = (), batch: int = 256) -> Step:
    """All kernels of all blocks of ResNet-50 at every level."""
    peers = ("eager channels_last", "bare convolutions", *(f"fused_res {level}" for level in LEVELS))
    command = ("-m", "fused_res.benchmarks.profiling", "--resume", "--suite", "resnet50", "--batch", str(batch), "--dtype", "bf16")
    arguments = (*command, "--output", str(output / f"{name}.jsonl"), "--peers", *peers)
    return Step(name, (arguments,), estimate=35, limit=90, resumable=True, needs=("smoke",), environment=environment)


TILED = (
    *(f"conv_{direction} {which}" for direction in ("fprop", "dgrad", "wgrad") for which in ("1x1 first", "1x1 last", "3x3")),
    *("pointwise_tail", "moments", "pointwise_tail_backward_reduce", "pointwise_tail_backward_apply"),
)


def tiles(output: Path) -> list[Step]:
    """The kernels' tiles, compiled by many processes at once, then timed."""
    command = ("-m", "fused_res.benchmarks.tiles")
    few = ("--compile-only", "--batch", "32", "--cases", "resnet50.3.identity", "resnet50.3.projection")
    compile_only = tuple((*command, *few, "--kernels", kernel) for kernel in TILED)
    timed = ((*command, "--resume", "--output", str(output / "tiles.jsonl")),)
    return [
        Step("tiles-warm", compile_only, estimate=45, limit=90, needs=("smoke",)),
        Step("tiles", timed, estimate=40, limit=80, resumable=True, needs=("smoke",)),
    ]


def steps(output: Path) -> list[Step]:
    """In the order of their value: correctness, then the times that decide, then what time allows."""
    check = ("-m", "fused_res", "check", "--seeds", "1", "--dtype", "bf16")
    triton = (*check, "--backend", "triton", "--mode", "train")
    blocks = ("Bottleneck identity", "Bottleneck projection")
    smoke = [(*triton, "--level", level, "--block", block) for level in LEVELS for block in blocks]
    smoke += [(*check, "--backend", "native"), ("-m", "fused_res", "info")]
    built = (ROOT / "fused_res" / "_native.so").is_file()
    fusions = ("-m", "fused_res.benchmarks.cudnn_fusions", "--output", str(output / "cudnn-fusions.json"), "--limit", "60")
    return [
        *([] if built else [Step("build", (("-c", BUILD),), estimate=60, limit=150)]),
        Step("smoke", tuple(smoke), estimate=30, limit=90),
        Step(
            "kernel-tests",
            (pytest(output, "kernel-tests", "-m", "kernel and not slow", "-k", "not reference", *kernel_tests()),),
            estimate=80,
            limit=110,
        ),
        Step("gpu-tests", (pytest(output, "gpu-tests", "-m", "gpu and not slow", *gpu_tests()),), estimate=50, limit=90),
        warm(256, ("fused_res", *(f"fused_res {level}" for level in LEVELS), "torch.compile")),
        *timings(output, "resnet50", "train", "bf16", 256, CASES, PEERS),
        Step("cudnn-fusions", (fusions,), estimate=65, limit=80, accepted=(0, 3), needs=("smoke",)),
        sequences(output, "sequences"),
        sequences(output, "sequences-own", (("FUSED_RES_CONVOLUTIONS", "own"),)),
        *tiles(output),
        *timings(output, "resnet50", "eval", "bf16", 256, CASES, PEERS),
        full_check(),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        *timings(output, "resnet50", "train", "fp16", 256, CASES, PEERS),
        *timings(output, "resnet50", "train", "fp32", 64, CASES, PEERS),
        *timings(output, "resnet18", "train", "bf16", 256, ("1.identity", "2.identity", "3.identity", "4.identity"), PEERS),
        *finish(output),
    ]


def finish(output: Path, worst: int = 4) -> list[Step]:
    """What is made of the result files, which must be there."""
    code = (
        "import sys; from pathlib import Path; from {module} import main; files = sorted(str(p) for p in Path(sys.argv[1])"
        ".glob('*-*-*.jsonl') if '.outcomes' not in p.name); sys.exit(main([*{before!r}, *files, *sys.argv[2:]]) if files else 0)"
    )
    profile = code.format(module="fused_res.benchmarks.profiling", before=[])
    report = code.format(module="fused_res.cli", before=["bench", "report"])
    return [
        Step(
            "profile",
            (("-c", profile, str(output), "--worst", str(worst), "--output", str(output / "profile.md")),),
            40,
            90,
            last=True,
        ),
        Step("report", (("-c", report, str(output), "--output", str(output / "report.html")),), 8, 40, last=True),
    ]


def dry_steps(output: Path) -> list[Step]:
    """Each kind of step in miniature, on the CPU."""
    small = ("--suite", "resnet18", "--mode", "eval", "--dtype", "fp32", "--batch", "1", "--rounds", "1", "--resume")
    peers = ("--peers", "eager channels_last", "bare convolutions", "fused_res")
    bench = ("-m", "fused_res", "bench", "--device", "cpu", "--output", str(output), *small, *peers)
    check = ("-m", "fused_res", "check", "--json", "--dtype", "fp32", "--backend", "reference", "--seeds", "1", "--level")
    tests = pytest(output, "tests", str(ROOT / "tests" / "test_bench_model.py"), processes=2)
    sequence = ("-m", "fused_res.benchmarks.profiling", "--resume", "--suite", "resnet18", "--cases", "resnet18.4.identity")
    sequence = (*sequence, "--batch", "1", "--dtype", "fp32")
    return [
        Step(
            "smoke",
            ((*check, "bn_act"), (*check, "moment")),
            estimate=8,
            limit=120,
            keep=("check-bn_act.json", "check-moment.json"),
        ),
        Step("tests", (tests,), estimate=4, limit=120),
        Step("sanitizer", (("-m", "fused_res", "info"),), within=("compute-sanitizer-of-a-dry-run",)),
        *(
            Step(
                f"resnet18-eval-fp32 {case}",
                ((*bench, "--cases", f"resnet18.{case}"),),
                estimate=8,
                limit=120,
                resumable=True,
                needs=("smoke",),
            )
            for case in ("1.identity", "2.projection")
        ),
        Step("sequences", ((*sequence, "--output", str(output / "sequences.jsonl")),), estimate=8, limit=120, resumable=True),
        *finish(output, worst=1),
    ]


def importable(folder: Path) -> dict[str, str]:
    """Lay the package out in a folder as an installation would, out of links, and return the environment that imports it."""
    package = folder / "fused_res"
    package.mkdir()
    built = {ROOT / "fused_res" / name for name in ("_native.so", "_native.json")}  # perhaps by the first step, after this
    for path in {*(ROOT / "fused_res").iterdir()} | built | {ROOT / "kernels", ROOT / "benchmarks"}:
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    metadata = folder / f"fused_res-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fused-res\nVersion: {version}\n")
    search = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(search), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}


def caches(output: Path) -> dict[str, str]:
    """Where compiled kernels lie, those that were carried among them; a user's own cache is left alone."""
    folder = output / CACHE
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    kernels, carried, unpacked = folder / "triton", CARRY / "triton-cache.tar.xz", folder / "unpacked"
    if carried.is_file() and not (unpacked.is_file() and unpacked.read_text() == str(carried.stat().st_mtime_ns)):
        print(f"{kernel_cache.unpack(carried, kernels)} compiled kernels were carried here", flush=True)
        unpacked.write_text(str(carried.stat().st_mtime_ns))  # afterwards: what a cut leaves half unpacked is unpacked again
    return {"TRITON_CACHE_DIR": str(kernels), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}


def fingerprint() -> str:
    """Hash of the sources and tests: a step that passed with others is not finished."""
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
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=90)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or None


class Stay:
    """One call of the script: the steps that are planned, what became of them, and until when [s] there is time."""

    def __init__(
        self, output: Path, planned: list[Step], end: float, archive: Path, environment: dict[str, str], folder: Path
    ) -> None:
        self.output, self.planned, self.end, self.archive = output, planned, end, archive
        self.environment, self.folder = environment, folder
        set_aside(output, fingerprint(), stays=CACHE)
        self.state = State(output / "state.json", fingerprint())
        self.ran = False

    def left(self) -> float:
        return self.end - time.monotonic()

    def why_not(self, step: Step) -> str | None:
        """Why a step is not begun now, or None."""
        by_name = {other.name: other for other in self.planned}
        failed = [name for name in step.needs if name in by_name and not self.state.passed(by_name[name])]
        if failed:
            return f"{', '.join(failed)} has not passed"
        least = min(step.estimate, step.limit)
        return None if self.left() >= least else f"{self.left():.0f} s are left, it takes {least:.0f}"

    def save(self) -> None:
        """The summary, and everything in the archive."""
        ahead = {step.name: self.state.status(step) for step in self.planned}
        seconds = {step.name: self.state.seconds(step) for step in self.planned}
        rows = [
            (step.name, ahead[step.name], f"{step.estimate:g}", "" if (s := seconds[step.name]) is None else f"{s:g}")
            for step in self.planned
        ]
        try:
            from fused_res.benchmarks import summary

            page = summary.page(self.output, rows)
        except Exception as error:  # no summary is worth losing results for
            page = "\n".join([f"no summary: {type(error).__name__}: {error}", *(" ".join(row) for row in rows), ""])
        try:
            replace(page, self.output / "summary.md")
            replace(page, self.archive.with_suffix("").with_suffix(".md"))
        except OSError as error:
            print(f"no summary: {error}", flush=True)
        self.pack()

    def pack(self) -> None:
        try:
            pack(self.output, self.archive, leave_out=CACHE)
        except Exception as error:  # the next one may be
            print(f"no archive: {type(error).__name__}: {error}", flush=True)

    def run(self, step: Step) -> None:
        """Run a step; a resumable one again and again, as long as there is time and it gets further."""
        results = f"{step.name.split()[0]}.jsonl"
        while True:
            begin = time.monotonic()
            before = self._size(results)
            left = "" if self.end == float("inf") else f", {self.left():.0f} s are left"
            print(f"{step.name}: about {step.estimate:.0f} s, at most {step.limit:.0f}{left}", flush=True)
            self.state.note(step, RUNNING)
            try:
                status = run(step, self.environment, self.folder, self.output, self.left(), self.pack)
            except Exception as error:  # the steps after it are worth as much
                status = f"{FAILED} with {type(error).__name__}: {error}"
            self.state.note(step, status, time.monotonic() - begin)
            print(f"{step.name}: {status}, {time.monotonic() - begin:.0f} s", flush=True)
            if status != RUNNING or not step.resumable or self._size(results) == before or self.why_not(step):
                break
        self.ran = True
        self.save()

    def _size(self, name: str) -> int:
        path = self.output / name
        return path.stat().st_size if path.is_file() else 0


def _load_summary() -> None:
    """While the first step runs: the import takes seconds."""
    with contextlib.suppress(Exception):  # whoever needs it says what is wrong
        importlib.import_module("fused_res.benchmarks.summary")


def _stopped(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="end in time for this; default: when all is done")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: build/gpu/NAME-OF-THE-GPU, one for other sources")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="a .tar.gz, the summary beside it; default: DIR.tar.gz")
    parser.add_argument("--step", action="append", metavar="NAME", help="only these, done or not; NAME* for all that begin so")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="not these; NAME* for all that begin so")
    parser.add_argument("--list", action="store_true", help="name the steps, their estimates and what became of them")
    parser.add_argument("--dry-run", action="store_true", help="miniature steps on the CPU, to test this script")
    options = parser.parse_args()
    started = time.monotonic()
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != ROOT / "benchmarks"]
    gpu = "dry run" if options.dry_run else gpu_name()
    if gpu is None:
        print("no NVIDIA GPU that torch can use; --dry-run tries this script on the CPU", file=sys.stderr)
        return 2
    folder_name = "-".join(gpu.lower().split())
    output = (options.output or ROOT / "build" / "gpu" / f"{folder_name}-{fingerprint()[:8]}").resolve()
    archive = (options.archive or output.with_name(f"{output.name}.tar.gz")).resolve()
    planned = dry_steps(output) if options.dry_run else steps(output)

    def named(step: Step, patterns: Sequence[str]) -> bool:
        return any(step.name.startswith(p[:-1]) if p.endswith("*") else step.name == p for p in patterns)

    for pattern in [*(options.step or ()), *options.skip]:
        if not any(named(step, [pattern]) for step in planned):
            parser.error(f"--step: expected one of {', '.join(step.name for step in planned)}, got {pattern}")
    chosen = [s for s in planned if (named(s, options.step) if options.step else True) and not named(s, options.skip)]
    output.mkdir(parents=True, exist_ok=True)
    end = float("inf") if options.minutes is None else started + 60 * options.minutes - RESERVE
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stopped)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = importable(folder) | caches(output)
        sys.path.insert(0, str(folder))
        stay = Stay(output, planned, end, archive, environment, folder)
        if options.list:
            print("\n".join(f"{s.name}: {stay.state.status(s)}; about {s.estimate:g} s, at most {s.limit:g}" for s in planned))
            return 0
        threading.Thread(target=_load_summary, daemon=True).start()
        try:
            for step in chosen:
                if not options.step and stay.state.done(step) and not (step.last and stay.ran):
                    continue
                if reason := stay.why_not(step):
                    print(f"{step.name}: not begun, {reason}", flush=True)
                    continue
                stay.run(step)
        finally:  # also where a signal has ended a step
            stay.save()
        size = archive.stat().st_size if archive.is_file() else 0
        print(f"written: {archive}, {size / 1e6:.2f} MB")
        return 0 if all(stay.state.passed(step) for step in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
