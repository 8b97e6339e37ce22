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
    from fused_res.benchmarks.gpu_plan import ROOT, dry_steps, steps
    from fused_res.benchmarks.steps import FAILED, RUNNING, State, Step, pack, replace, run, set_aside
else:  # run as a script, perhaps without an installation: its own folder is on the path
    import kernel_cache
    from gpu_plan import ROOT, dry_steps, steps
    from steps import FAILED, RUNNING, State, Step, pack, replace, run, set_aside

SOURCES = ("fused_res", "kernels", "csrc", "benchmarks", "tests")
RESERVE = 12.0
"""Seconds kept for the summary and the archive."""
CACHE = "cache"
"""Folder of compiled kernels beside the results."""
CARRY = ROOT / "build" / "carry"
"""Where `make gpu-carry` leaves what was compiled beforehand."""


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
    kernels, carried, unpacked = folder / "triton", CARRY / kernel_cache.NAME, folder / "unpacked"
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
    """One call of the script: the steps that are planned, what became of them, and until when [s] there is time.

    Results of other sources are set aside.
    """

    def __init__(
        self,
        output: Path,
        planned: Sequence[Step],
        end: float,
        archive: Path,
        environment: dict[str, str],
        folder: Path,
        source: str,
    ) -> None:
        self.output, self.planned, self.end, self.archive = output, planned, end, archive
        self.environment, self.folder = environment, folder
        set_aside(output, source, stays=CACHE)
        self.state = State(output / "state.json", source)
        self.ran = False

    def run_all(self, chosen: Sequence[Step], again: bool = False) -> None:
        """Run the steps, those that are done only if `again`."""
        threading.Thread(target=_load_summary, daemon=True).start()
        try:
            for step in chosen:
                if not again and self.state.done(step) and not (step.last and self.ran):
                    continue
                if reason := self.why_not(step):
                    print(f"{step.name}: not begun, {reason}", flush=True)
                    continue
                self.run(step)
        finally:  # also where a signal has ended a step
            self.save()

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


def stop_on_signals() -> None:
    """End in order, with an archive, where a machine that is taken away says so."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


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
    folder_name, source = "-".join(gpu.lower().split()), fingerprint()
    output = (options.output or ROOT / "build" / "gpu" / f"{folder_name}-{source[:8]}").resolve()
    archive = (options.archive or output.with_name(f"{output.name}.tar.gz")).resolve()
    planned = dry_steps(output) if options.dry_run else steps(output)

    def named(step: Step, patterns: Sequence[str]) -> bool:
        return any(step.name.startswith(p[:-1]) if p.endswith("*") else step.name == p for p in patterns)

    for pattern in [*(options.step or ()), *options.skip]:
        if not any(named(step, [pattern]) for step in planned):
            parser.error(f"--step: expected one of {', '.join(step.name for step in planned)}, got {pattern}")
    chosen = [s for s in planned if (named(s, options.step) if options.step else True) and not named(s, options.skip)]
    if options.list:
        state = State(output / "state.json", source)
        print("\n".join(f"{s.name}: {state.status(s)}; about {s.estimate:g} s, at most {s.limit:g}" for s in planned))
        return 0
    output.mkdir(parents=True, exist_ok=True)
    end = float("inf") if options.minutes is None else started + 60 * options.minutes - RESERVE
    stop_on_signals()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = importable(folder) | caches(output)
        sys.path.insert(0, str(folder))
        stay = Stay(output, planned, end, archive, environment, folder, source)
        stay.run_all(chosen, again=bool(options.step))
        size = archive.stat().st_size if archive.is_file() else 0
        print(f"written: {archive}, {size / 1e6:.2f} MB")
        return 0 if all(stay.state.passed(step) for step in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
