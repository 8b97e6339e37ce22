"""`python -m fused_res.benchmarks.warm`: a step of every named peer, so that what it compiles is in a cache before it is timed."""

import argparse
import sys
import time

import torch

from fused_res import environment
from fused_res.benchmarks import cudnn_graphs, foreign, peers  # noqa: F401 - two of them register peers
from fused_res.benchmarks.cases import SUITES
from fused_res.benchmarks.peers import Setup


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 if a peer of ours failed; others may."""
    parser = argparse.ArgumentParser(prog="python -m fused_res.benchmarks.warm", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="resnet50")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="only these of the suite")
    parser.add_argument("--peers", nargs="+", choices=peers.REGISTRY, required=True, metavar="NAME")
    parser.add_argument("--batch", type=int, default=256, help="default %(default)s")
    parser.add_argument("--dtype", choices=environment.DTYPES, default="bf16")
    parser.add_argument("--mode", choices=peers.MODES, default="train")
    options = parser.parse_args(argv)
    device, failed = environment.default_device(), False
    for case in (case for case in SUITES[options.suite] if options.cases is None or case.name in options.cases):
        setup = Setup(case, options.batch, environment.DTYPES[options.dtype], device, options.mode, sets=1)
        for name in options.peers:
            begin = time.perf_counter()
            made = peers.make(name, setup)
            refused = isinstance(made, peers.Refusal)
            failed |= refused and made.failed
            said = made.reason if refused else "ready"
            print(f"{case.name}, {name}: {said}, {time.perf_counter() - begin:.1f} s", flush=True)
            del made
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
