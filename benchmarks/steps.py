"""Steps of a stay on a machine that may end at any moment: each in processes of its own, with a limit; what is finished is kept.

A step that was cut off from outside runs again in the next stay; one that failed, or was still running at its own limit, does not.
After every step, and while long ones run, everything is packed into one archive.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PASSED, SKIPPED, FAILED, LIMIT, RUNNING, NOT_STARTED = "passed", "skipped", "failed", "over its limit", "cut off", "not started"
UNFINISHED = 3
"""Exit code of a command that asks for another run, with --resume."""
_POLL = 0.2
_PACK_EVERY = 15.0


@dataclass(frozen=True)
class Step:
    """Commands after `python`, run at once. Times in seconds.

    estimate: what it took before; limit: when it is ended. accepted: the exit codes of success. within: a program that runs
    python, and options of its own; where it is not installed the step is skipped. resumable: exit code UNFINISHED asks for
    another run, with --resume. needs: steps without whose success this one is not begun. last: it is made of what the others
    leave, and runs again after any of them. environment: variables, as pairs.
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
        self.steps = json.loads(path.read_text()) if path.is_file() else {}

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
        replace(json.dumps(self.steps, indent=1) + "\n", self.path)


def pack(folder: Path, archive: Path, leave_out: str) -> None:
    """Everything in a folder, but what has this name there, as a .tar.gz that is whole at any moment."""
    fresh = archive.with_name(f".{archive.name}.new")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fresh, "w:gz", compresslevel=6) as packed:
        for path in sorted(folder.iterdir()):
            if path.name != leave_out:
                packed.add(path, f"{folder.name}/{path.name}")
    os.replace(fresh, archive)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def execute(
    commands: Sequence[Sequence[str]],
    environment: dict[str, str],
    folder: Path,
    logs: Sequence[Path],
    limit: float,
    while_running: Callable[[], None] = lambda: None,
) -> list[int | None]:
    """Exit codes of commands that run at once, None for those that a limit [s] ended, with every process they started.

    logs: for each command the path, without suffix, of what it writes to standard output and error.
    """
    processes, files = [], []
    end, pack_at = time.monotonic() + limit, time.monotonic() + _PACK_EVERY
    codes: list[int | None] = []
    try:
        for command, log in zip(commands, logs, strict=True):
            files += [log.with_suffix(".out").open("w"), log.with_suffix(".err").open("w")]
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=files[-2],
                    stderr=files[-1],
                    preexec_fn=os.setpgrp,
                )
            )
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            time.sleep(_POLL)
            if time.monotonic() > pack_at:
                while_running()
                pack_at = time.monotonic() + _PACK_EVERY
        codes = [process.poll() for process in processes]
    finally:
        _end(processes)
        for file in files:
            file.close()
    return codes


def run(
    step: Step, environment: dict[str, str], folder: Path, output: Path, limit: float, while_running: Callable[[], None]
) -> str:
    """Run one step, or go on with one that was begun; returns its status.

    What its commands print is kept under logs/, which git ignores: it may name this machine's paths.
    """
    if step.within and shutil.which(step.within[0]) is None:
        return f"{SKIPPED}: {step.within[0]} is not installed"
    folder_of_logs = output / "logs"
    folder_of_logs.mkdir(exist_ok=True)
    (folder_of_logs / ".gitignore").write_text("*\n")
    many = len(step.commands) > 1
    logs = [folder_of_logs / (step.name + (f"-{i}" if many else "")) for i in range(len(step.commands))]
    commands = [[*step.within, sys.executable, *command] for command in step.commands]
    codes = execute(commands, environment | dict(step.environment), folder, logs, limit, while_running)
    wrong = [i for i, code in enumerate(codes) if code not in step.accepted]
    for i in wrong:
        out, err = (logs[i].with_suffix(suffix).read_text(errors="replace").splitlines() for suffix in (".out", ".err"))
        print("\n".join([f"--- {step.name}, command {i}: exit code {codes[i]}", *out[-12:], *err[-12:]]), flush=True)
    if not wrong:
        return PASSED
    if any(codes[i] is None for i in wrong):
        return f"{LIMIT} of {limit:.0f} s"
    if step.resumable and any(codes[i] == UNFINISHED for i in wrong):
        return RUNNING
    return f"{FAILED} with exit code {', '.join(str(codes[i]) for i in wrong)}"
