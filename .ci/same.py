"""Hold two checkouts of fused_res against each other, bit for bit: `.ci/same.py <other checkout>`.

Every block of `fused-res check`, in training and evaluation, in every precision, on every backend that runs here and at every
level, with our convolutions where the rules take them and with ours wherever there is one; on one thread, with nothing tuned.
Compared are outputs, the ReLUs' signs, all gradients and running statistics, of one forward and backward, and the output without
gradients. Prints how much was compared, and the first difference; exits with 1 if there is any, or if one of the two does not run
what the other runs.

Both checkouts need the compiled library in place (`setup.py build_ext --inplace`) where `native` is to be compared.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
PRECISIONS = {"fp32": ("float32", False), "bf16": ("bfloat16", False), "bf16 pure": ("bfloat16", True)}
PRECISIONS |= {"fp16": ("float16", False), "fp16 pure": ("float16", True), "fp64": ("float64", True)}
_INTERPRETED = ("fp32", "bf16 pure")
"""Triton's interpreter is slow: it runs the dtypes that a kernel distinguishes, and no more."""


def _record(checkout: Path, arguments: argparse.Namespace) -> None:
    """Writes what every case gives in this checkout: {case: {name: tensor}, or why it does not run}."""
    sys.path.insert(0, str(HERE / "tests"))
    if "triton" in arguments.backends:
        import interpreter

        interpreter.install()
    import torch

    import fused_res
    from fused_res import accuracy, backends, check
    from fused_res.planner import LEVELS, use_backend

    if not Path(fused_res.__file__).is_relative_to(checkout):
        sys.exit(f"imported {fused_res.__file__}, not the package of {checkout}")
    torch.set_num_threads(1)
    device, found = torch.device("cpu"), {}
    for backend in arguments.backends:
        for name, (dtype, pure) in PRECISIONS.items():
            if name not in arguments.precisions or (backend == "triton" and name not in _INTERPRETED):
                continue
            dtype = getattr(torch, dtype)
            reason = backends.supports(backend, device, dtype)
            if reason is not None:
                found[f"{backend}, {name}"] = reason
                continue
            for level in arguments.levels or LEVELS:
                for shape in check.SHAPES:
                    for mode in check.MODES:
                        block, x, dout = check.problem(shape, mode, device, 0)
                        for _ in range(1 if backend == "triton" else 2):  # the second call may be a recording of the first
                            result = accuracy.step(block, x, dout, dtype, backend, level, True, pure)
                        tensors = result.tensors | {f"sign {i}": sign for i, sign in enumerate(result.signs)}
                        with torch.no_grad(), use_backend(backend, level):
                            block, x = block.to(dtype), x.to(dtype)
                            tensors["out without gradients"] = block(x)
                        found[f"{backend}, {level}, {shape}, {mode}, {name}"] = tensors
    torch.save(found, arguments.record)


def _start(checkout: Path, own: bool, arguments: argparse.Namespace, file: Path) -> subprocess.Popen:
    """Records a checkout in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "FUSED_RES_TUNE": "0"}
    environment |= {"FUSED_RES_CONVOLUTIONS": "own" if own else "auto"}
    command = [sys.executable, "-P", str(Path(__file__).resolve()), str(checkout), "--record", str(file)]
    # Interpreted kernels are slow, and all that `auto` runs of them `own` runs too.
    backends = [name for name in arguments.backends if own or name != "triton"]
    for name, values in (("backends", backends), ("levels", arguments.levels), ("precisions", arguments.precisions)):
        command += [f"--{name}", *values] if values else []
    return subprocess.Popen(command, env=environment, cwd=file.parent)


def _both(other: Path, own: bool, arguments: argparse.Namespace, folder: Path) -> tuple[dict, dict]:
    """What this checkout gives and what the other one does, side by side."""
    import torch

    files = [folder / f"{name}.pt" for name in ("here", "there")]
    running = [_start(root, own, arguments, file) for root, file in zip((HERE, other), files, strict=True)]
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit("one of the two failed")
    return tuple(torch.load(file) for file in files)


def _differences(ours: dict, theirs: dict) -> tuple[int, list[str]]:
    """How many tensors were compared, and what differs."""
    import torch

    compared, found = 0, [f"{case}: only one of the two has it" for case in ours.keys() ^ theirs.keys()]
    for case in [case for case in ours if case in theirs]:
        a, b = ours[case], theirs[case]
        if isinstance(a, str) or isinstance(b, str):
            if isinstance(a, str) != isinstance(b, str):
                found.append(f"{case}: runs in one of the two only: {a if isinstance(a, str) else b}")
            continue
        found += [f"{case}: {name}: only one of the two has it" for name in a.keys() ^ b.keys()]
        for name in [name for name in a if name in b]:
            compared += 1
            one, other = a[name], b[name]
            for what in ("shape", "dtype", "stride"):
                first, second = (getattr(t, what) for t in (one, other))
                first, second = (f() if callable(f) else f for f in (first, second))
                if first != second:
                    found.append(f"{case}: {name}: {what} {first} here, {second} there")
                    break
            else:
                # Byte by byte: NaNs, and the sign of zero, count.
                bytes_ = [t.contiguous().unsqueeze(-1).view(torch.uint8).flatten(end_dim=-2) for t in (one, other)]
                bad = (bytes_[0] != bytes_[1]).any(-1).nonzero().flatten().tolist()
                if bad:
                    values = " here, ".join(repr(t.contiguous().flatten()[bad[0]].item()) for t in (one, other))
                    found.append(f"{case}: {name}: {len(bad)} of {one.numel()} elements, the first at {bad[0]}: {values} there")
    return compared, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument(
        "--backends", nargs="+", choices=("reference", "native", "triton"), default=["reference", "native", "triton"]
    )
    parser.add_argument("--levels", nargs="+", help="by default all")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--record", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.record:
        _record(arguments.other.resolve(), arguments)
        return 0
    compared, cases, found = 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        for own in (False, True):
            if not own and arguments.backends == ["triton"]:
                continue
            ours, theirs = _both(arguments.other.resolve(), own, arguments, Path(folder))
            for case in [case for case, what in ours.items() if isinstance(what, str)] if own else []:
                print(f"not compared: {case}: {ours[case]}")
            count, differences = _differences(ours, theirs)
            compared, cases = compared + count, cases + sum(not isinstance(what, str) for what in ours.values())
            found += [f"{'own' if own else 'auto'}: {difference}" for difference in differences]
    print(f"{compared} tensors of {cases} cases compared, {len(found)} differences")
    if found:
        print(f"the first: {found[0]}")
    return 1 if found or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
