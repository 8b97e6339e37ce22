"""Steps of a stay on a machine that may end at any moment: each in processes of its own, with a limit; what is finished is kept.

A step that was cut off from outside runs again in the next stay; one that failed, or was still running at its own limit, does not.
After every step, and while long ones run, everything is packed into one archive.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PASSED, SKIPPED, FAILED, LIMIT, RUNNING, NOT_STARTED = "passed", "skipped", "failed", "over its limit", "cut off", "not started"
UNFINISHED = 3
"""Exit code of a command that asks for another run, with --resume."""
_POLL = 0.2
_PACK_EVERY = 15.0
_DIES = 10.0
"""Seconds that killed processes may take: one that waits for a driver may never end."""
_MOST = 1 << 20
"""Bytes of a log that are packed, from its beginning and its end."""


@dataclass(frozen=True)
class Step:
    """Commands after `python`, run at once, but no more than `at_once`. Times in seconds.

    estimate: what it took before; limit: when it is ended. accepted: the exit codes of success. within: a program that runs
    python, and options of its own; where it is not installed the step is skipped. resumable: exit code UNFINISHED asks for
    another run, with --resume. needs: steps without whose success this one is not begun. last: it is made of what the others
    leave, and runs again after any of them. environment: variables, as pairs. keep: names of files among the results for what
    each command prints, where it exits with 0 or 1.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    estimate: float = 30.0
    limit: float = 60.0
    accepted: tuple[int, ...] = (0,)
    within: tuple[str, ...] = ()
    resumable: bool = False
    needs: tuple[str, ...] = ()
    last: bool = False
    environment: tuple[tuple[str, str], ...] = ()
    keep: tuple[str, ...] = ()
    at_once: int = 16


def replace(text: str, path: Path) -> None:
    """Write a file such that a reader, or a cut at any moment, finds the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    os.replace(fresh, path)


class State:
    """What became of the steps, in a file. A step counts only with the same sources and the same commands."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self.steps = json.loads(path.read_text())["steps"] if path.is_file() else {}

    def _key(self, step: Step) -> str:
        command = json.dumps([step.within, step.commands, step.environment])
        return hashlib.sha256(f"{self.source} {command}".encode()).hexdigest()[:16]

    def begun(self, step: Step) -> bool:
        return self.steps.get(step.name, {}).get("key") == self._key(step)

    def status(self, step: Step) -> str:
        found = self.steps.get(step.name, {"status": NOT_STARTED})["status"]
        return found if found == NOT_STARTED or self.begun(step) else f"{found}, with other sources or options"

    def passed(self, step: Step) -> bool:
        return self.begun(step) and self.steps[step.name]["status"].startswith((PASSED, SKIPPED))

    def done(self, step: Step) -> bool:
        """Whether it is not to be run again: it passed, failed, or was over its own limit."""
        return self.begun(step) and self.steps[step.name]["status"].startswith((PASSED, SKIPPED, FAILED, LIMIT))

    def seconds(self, step: Step) -> float | None:
        return self.steps[step.name]["seconds"] if self.begun(step) else None

    def note(self, step: Step, status: str, seconds: float = 0.0) -> None:
        before = self.steps[step.name]["seconds"] if self.begun(step) and step.resumable else 0.0
        self.steps[step.name] = {"status": status, "seconds": round(before + seconds, 1), "key": self._key(step)}
        replace(json.dumps({"source": self.source, "steps": self.steps}, indent=1) + "\n", self.path)


def set_aside(folder: Path, source: str, stays: str) -> None:
    """Move the results of other sources, but what has this name, into a folder beside those that are to come."""
    path = folder / "state.json"
    earlier = json.loads(path.read_text())["source"] if path.is_file() else source
    if earlier != source:
        aside = folder / f"earlier-{earlier[:8]}"
        aside.mkdir(exist_ok=True)
        for found in [found for found in folder.iterdir() if found.name != stays and not found.name.startswith("earlier-")]:
            shutil.rmtree(aside / found.name, ignore_errors=True)
            found.replace(aside / found.name)


def _contents(path: Path) -> bytes:
    """Of a log that has no end only the beginning and the end: an archive that is too large comes back from nowhere."""
    if path.suffix not in (".out", ".err") or path.stat().st_size <= _MOST:
        return path.read_bytes()
    with path.open("rb") as file:
        begin = file.read(_MOST // 2)
        file.seek(-_MOST // 2, os.SEEK_END)
        return begin + b"\n[...]\n" + file.read(_MOST)


def pack(folder: Path, archive: Path, leave_out: str) -> None:
    """Everything in a folder, but what has this name there, as a .tar.gz that is whole at any moment.

    Files may change or go while they are packed.
    """
    fresh = archive.with_name(f".{archive.name}.new")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fresh, "w:gz", compresslevel=6) as packed:
        tops = [top for top in sorted(folder.iterdir()) if top.name != leave_out]
        for path in (path for top in tops for path in (top, *sorted(top.rglob("*")))):
            if path.name.endswith(".new"):
                continue
            with contextlib.suppress(OSError):
                if not path.is_file():
                    continue
                contents, entry = _contents(path), tarfile.TarInfo(path.relative_to(folder.parent).as_posix())
                entry.size, entry.mtime = len(contents), int(path.stat().st_mtime)
                packed.addfile(entry, io.BytesIO(contents))
    os.replace(fresh, archive)


@contextmanager
def _group() -> Iterator[int]:
    """A process group that ends, with all in it, on leaving, and as soon as this process is gone, however it went.

    Its leader waits for the end of a pipe of which this process holds the other end.
    """
    leader = subprocess.Popen(
        ["sh", "-c", "trap '' TERM INT HUP; read nothing; kill -KILL 0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **_joining(0),
    )
    try:
        yield leader.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
        leader.stdin.close()
        leader.wait()


def _joining(group: int) -> dict[str, object]:
    """The arguments of subprocess.Popen that put the process into a group."""
    if sys.version_info >= (3, 11):
        return {"process_group": group}
    return {"preexec_fn": lambda: os.setpgid(0, group)}


def execute(
    commands: Sequence[Sequence[str]],
    environment: dict[str, str],
    folder: Path,
    logs: Sequence[Path],
    limit: float,
    while_running: Callable[[], None] = lambda: None,
    at_once: int = 16,
) -> list[int | None]:
    """Exit codes of commands that run at once, None for those that a limit [s] ended or never let begin.

    Whatever they started is ended with them. logs: for each command the path, without suffix, of what it writes to standard
    output and error.
    """
    end, pack_at = time.monotonic() + limit, time.monotonic() + _PACK_EVERY
    processes: list[subprocess.Popen] = []
    with contextlib.ExitStack() as files:
        with _group() as group:
            while time.monotonic() < end:
                running = sum(process.poll() is None for process in processes)
                for command, log in list(zip(commands, logs, strict=True))[len(processes) :][: max(0, at_once - running)]:
                    out, err = (files.enter_context(Path(f"{log}.{suffix}").open("w")) for suffix in ("out", "err"))
                    where = {"env": environment, "cwd": folder, "stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
                    processes.append(subprocess.Popen(command, **where, **_joining(group)))
                    running += 1
                if not running:
                    break
                time.sleep(_POLL)
                if time.monotonic() > pack_at:
                    while_running()
                    pack_at = time.monotonic() + _PACK_EVERY
            codes: list[int | None] = [process.poll() for process in processes]
        dead = time.monotonic() + _DIES
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, dead - time.monotonic()))
    return codes + [None] * (len(commands) - len(codes))


def run(
    step: Step, environment: dict[str, str], folder: Path, output: Path, limit: float, while_running: Callable[[], None]
) -> str:
    """Run one step, or go on with one that was begun; returns its status. A limit below its own, which ends it, is a cut.

    What its commands print is kept under logs/, which git ignores: it may name this machine's paths.
    """
    if step.within and shutil.which(step.within[0]) is None:
        return f"{SKIPPED}: {step.within[0]} is not installed"
    folder_of_logs = output / "logs"
    folder_of_logs.mkdir(exist_ok=True)
    (folder_of_logs / ".gitignore").write_text("*\n")
    many, name = len(step.commands) > 1, step.name.replace(" ", "-")
    logs = [folder_of_logs / (f"{name}-{i}" if many else name) for i in range(len(step.commands))]
    commands = [[*step.within, sys.executable, *command] for command in step.commands]
    variables = environment | dict(step.environment)
    codes = execute(commands, variables, folder, logs, min(limit, step.limit), while_running, step.at_once)
    for log, code, kept in zip(logs, codes, step.keep, strict=False):
        if code in (0, 1):
            replace(Path(f"{log}.out").read_text(errors="replace"), output / kept)
    wrong = [i for i, code in enumerate(codes) if code not in step.accepted]
    for i in wrong:
        print("\n".join([f"--- {step.name}, command {i}: exit code {codes[i]}", *_last(logs[i])]), flush=True)
    if not wrong:
        return PASSED
    if any(codes[i] is None for i in wrong):
        return f"{LIMIT} of {step.limit:.0f} s" if limit >= step.limit else RUNNING
    if step.resumable and any(codes[i] == UNFINISHED for i in wrong):
        return RUNNING
    return f"{FAILED} with exit code {', '.join(str(codes[i]) for i in wrong)}"


def _last(log: Path, lines: int = 12) -> list[str]:
    """The end of what a command wrote to standard output and error."""
    paths = [path for path in (Path(f"{log}.out"), Path(f"{log}.err")) if path.is_file()]
    return [line for path in paths for line in _contents(path).decode(errors="replace").splitlines()[-lines:]]
