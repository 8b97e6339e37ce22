"""Processes that have imported torch and nothing of ours: forked from one that waits, since importing torch takes seconds."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path


class Fresh:
    """Runs code as `python -c` would in the folder /, after `import torch`."""

    def __init__(self, folder: Path):
        """folder: for what the processes write."""
        self.folder = folder
        command = [sys.executable, "-c", "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')", __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")

    def run(self, code: str, **environment: str) -> subprocess.CompletedProcess:
        """environment: set before the code runs, beside what torch was imported under."""
        request = {"code": code, "environment": dict(os.environ) | environment, "folder": str(self.folder)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(code, status, *((self.folder / name).read_text() for name in ("out", "err")))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def _child(request: dict) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(request["folder"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    status = 1
    try:
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    import torch  # noqa: F401, what the children have

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _child(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
