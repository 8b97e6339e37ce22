"""`python -m fused_res.benchmarks.carry`: what a GPU's machine need not compile, made where there is none, in a checkout.

For a GPU of one compute capability: the Triton kernels of ResNet-50's training steps at every level, in bfloat16, and the commit
that the sources are of. `make gpu` finds them in build/carry. Triton's keys hold its own version: run this with that of the
machine, and with --wheel where the Python there is another.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fused_res import environment
from fused_res.benchmarks import kernel_cache
from fused_res.benchmarks.cases import SUITES
from fused_res.planner import LEVELS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_res.benchmarks.carry", description=__doc__)
    parser.add_argument("--capability", type=int, default=90, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=256, help="default %(default)s")
    parser.add_argument("--cases", nargs="+", default=[case.name for case in SUITES["resnet50"]], metavar="CASE")
    parser.add_argument("--wheel", type=Path, help="of the same Triton for the machine's Python")
    options = parser.parse_args(argv)
    root = environment.checkout()
    if root is None:
        parser.error("expected a source checkout")
    folder = root / environment.CARRIED.parent
    folder.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, root / "tests" / "fake_gpu.py", "blocks", str(options.capability), "bfloat16"]
    arguments = ["--levels", *LEVELS, "--cases", *options.cases, "--batch", str(options.batch)]
    with tempfile.TemporaryDirectory() as cache:
        more = ["--cache", cache, *(["--wheel", options.wheel] if options.wheel else [])]
        subprocess.run([*program, *arguments, *more], check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
        count = kernel_cache.pack(Path(cache), folder / kernel_cache.NAME)
    print(f"written: {folder / kernel_cache.NAME}, {count} kernels")
    state = environment.git()
    if state is None or state["dirty"]:
        (root / environment.CARRIED).unlink(missing_ok=True)
        print("no commit is noted: the sources are those of none")
    else:
        text = json.dumps({"commit": state["commit"], "source": environment.fingerprint()})
        (root / environment.CARRIED).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
