"""`python -m fuzz --minutes 10 --seed 3`: as many cases as the time allows, all targets and backends in turn."""

import argparse
import sys
import time
import traceback
import warnings
from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import interpreter

interpreter.install()

from fused_res import backends  # noqa: E402 - the interpreter comes first
from fuzz.draws import SCOPES  # noqa: E402
from fuzz.targets import BLOCKS, PRIMITIVES  # noqa: E402

_EXAMPLES = {"reference": 100, "native": 100, "triton": 4}
"""Cases of one target in one turn."""


def explore(check, strategy, backend: str, examples: int, start: int, count) -> str | None:
    """Hold so many cases; returns what failed, shrunk, or None."""
    last = []

    @seed(start)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(strategy)
    def run(case):
        last[:] = [case]
        count()
        check(case, backend)

    try:
        run()
    except Exception:
        return f"{last[0]!r}\n{''.join(traceback.format_exc(limit=-4))}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="another seed, other cases; the same again with the same --targets")
    parser.add_argument("--backends", nargs="+", choices=backends.NAMES, default=list(backends.NAMES))
    names = [*PRIMITIVES, *BLOCKS]
    parser.add_argument("--targets", nargs="+", choices=[*names, "primitives", "blocks"], default=["primitives", "blocks"])
    parser.add_argument("--examples", type=int, help="cases of one target in one turn")
    arguments = parser.parse_args()
    groups = {"primitives": PRIMITIVES, "blocks": BLOCKS}
    targets = {}
    for name in arguments.targets:
        targets |= groups[name] if name in groups else {name: (PRIMITIVES | BLOCKS)[name]}
    able = []
    for name in arguments.backends:
        reason = backends.supports(name, torch.device("cpu"), torch.float32)
        if reason is None:
            able.append(name)
        else:
            print(f"{name}: {reason}")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    warnings.simplefilter("ignore")
    counts, failures, turn = Counter(), {}, 0
    end = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < end and len(failures) < len(able) * len(targets):
        for backend in able:
            for name, target in targets.items():
                if time.monotonic() >= end:
                    break
                if (name, backend) in failures:
                    continue

                def count(name=name, backend=backend):
                    counts[name, backend] += 1

                start = arguments.seed * 10**6 + turn
                examples = arguments.examples or max(1, _EXAMPLES[backend] // (5 if name in BLOCKS else 1))
                found = explore(target.check, target.cases(SCOPES[backend]), backend, examples, start, count)
                if found is not None:
                    failures[name, backend] = found
                    print(f"FAILED {name} on {backend}, --seed {arguments.seed}, turn {turn}:\n{found}", flush=True)
        turn += 1
    for name in targets:
        print(f"{name:32}", *(f"{backend} {counts[name, backend]:7d}" for backend in able), sep="  ")
    for title, group in groups.items():
        print(f"{title:32}", *(f"{b} {sum(counts[n, b] for n in group):7d}" for b in able), sep="  ")
    print(f"{len(failures)} failures, {turn} turns, --seed {arguments.seed}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
