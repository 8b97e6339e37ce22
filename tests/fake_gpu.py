"""Blocks on a GPU that launches nothing: Triton's real run time, compiler and checks, over a driver of our own, on meta tensors.

A program of its own, since a test's process has Triton interpret its kernels. It writes one JSON object a line.
"""

import argparse
import ctypes
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import triton
from torch import nn

from fused_res.aot import SHARED, compile_launch


def load_driver(folder: Path) -> ctypes.CDLL:
    """Build the driver and have Triton link against it."""
    library, headers = folder / "libcuda.so.1", Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_name("fake_driver.c")
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers}", "-o", library, source]
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded.fake_digest.restype = ctypes.c_ulong
    return loaded


def _become(capability: int) -> None:
    """Make Triton believe that there is one such GPU."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    class Driver(nvidia.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.set_current_device = lambda device: None
            self.get_device_capability = lambda device=0: divmod(capability, 10)

    driver.set_active(Driver())


def _stop_at_shared_memory() -> None:
    """Nothing runs, so no machine code is needed. Shared memory is laid out before LLVM."""
    os.environ["DISABLE_LLVM_OPT"] = "1"

    def ptx(source, metadata):
        metadata["name"] = "none"
        return ""

    def change(backend=None, stages=None, options=None, language=None, capability=None):
        if backend is None:
            return "no machine code", "no machine code"
        return stages.update(ptx=ptx, cubin=lambda source, metadata: b"none")

    triton.knobs.runtime.add_stages_inspection_hook = change


def _have_the_keys_of(wheel: Path) -> None:
    """Have Triton's cache find entries by the keys that the Triton in a wheel has: of the same version, for another Python.

    A key has the hashes of Triton's own files, of which `libtriton` alone differs between Pythons.
    """
    from triton.runtime import cache

    own = hashlib.sha256((Path(triton.__file__).parent / "_C" / "libtriton.so").read_bytes()).hexdigest()
    with zipfile.ZipFile(wheel) as archive:
        other = hashlib.sha256(archive.read("triton/_C/libtriton.so")).hexdigest()
    key = cache.triton_key()
    if key.count(own) != 1:
        raise SystemExit(f"--wheel: expected a key with the hash of libtriton.so, got {key}")
    cache.triton_key = lambda: key.replace(own, other)


def _blocks(options: argparse.Namespace) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    from fused_res.benchmarks.cases import SUITES, convert

    cases = {case.name: case for suite in SUITES.values() for case in suite}
    dtype = getattr(torch, options.dtype)
    for name in options.cases:
        case = cases[name]
        block = convert(case.module(), dtype, torch.channels_last, torch.device("meta"))
        x = torch.empty(options.batch, case.inplanes, case.size, case.size, dtype=dtype, device="meta")
        yield name, block, x.contiguous(memory_format=torch.channels_last)


def _step(block: nn.Module, x: torch.Tensor, training: bool) -> None:
    """Through the operator at once: a block by itself leaves tensors without data to its child modules."""
    from fused_res.functional import residual_block_with_saved

    block.train(training)
    if not training:
        with torch.no_grad():
            residual_block_with_saved(x, **block.operands(x))
        return
    x = x.detach().requires_grad_()
    out, _ = residual_block_with_saved(x, **block.operands(x))
    torch.autograd.grad(out, [x, *block.parameters()], torch.empty_like(out))


def _become_triton() -> None:
    """Make the backend `triton` take meta tensors."""
    from fused_res.backends import triton as backend

    autocast = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda *device: False if device == ("meta",) else autocast(*device)
    backend.supports = lambda device, dtype: None


def _run_blocks(options: argparse.Namespace, library: ctypes.CDLL) -> Iterator[dict]:
    """Blocks at levels: what a step launched, what of that was compiled for it first, and the error it ended with, if any.

    The first step is recorded; the second one replayed by Python, since somebody wants to be told of launches; the third by the
    compiled library, where that is there. "same": whether the last two launched the same kernels with the same parameters;
    "chosen": how many of their launches Triton chose a compiled kernel for anew; "direct": how many the compiled library made.
    """
    import fused_res

    kernels: list[tuple[str, int]] = []

    def compiled(*, src, metadata, cache_hit, **_):
        if not cache_hit:
            kernels.append((src.name, metadata["shared"]))

    chosen = []

    def run(kernel, *arguments, **options):
        chosen.append(kernel)
        found = choose(kernel, *arguments, **options)
        if hasattr(found, "src"):
            sizes = bytes(_sizes(found.src.signature.values()))
            library.fake_sizes(ctypes.c_ulong(found.function), len(sizes), sizes)
        return found

    triton.knobs.compilation.listener = compiled
    choose, triton.JITFunction.run = triton.JITFunction.run, run
    _become_triton()
    for name, block, x in _blocks(options):
        for level in options.levels:
            for training in (True, False):
                before, known, error, digests, direct = library.fake_launches(), len(kernels), None, [], 0
                try:
                    with fused_res.use_backend("triton", level):
                        _step(block, x, training)
                        chosen.clear()
                        for replays in ("Python", "the library"):
                            library.fake_digest()
                            if replays == "Python":
                                triton.knobs.runtime.launch_enter_hook.add(_told)
                            earlier = library.fake_direct()
                            _step(block, x, training)
                            direct = library.fake_direct() - earlier
                            triton.knobs.runtime.launch_enter_hook.remove(_told)
                            digests.append(library.fake_digest())
                except triton.runtime.errors.OutOfResources as found:
                    error = str(found)
                row = {
                    "case": name,
                    "level": level,
                    "training": training,
                    "error": error,
                    "same": len(set(digests)) == 1,
                    "chosen": len(chosen),
                    "direct": direct,
                }
                yield row | {"launches": (library.fake_launches() - before) // 3, "kernels": kernels[known:]}


def _time_blocks(options: argparse.Namespace, library: ctypes.CDLL) -> Iterator[dict]:
    """One object: what the host takes for a step's programs, of which Python makes the calls, or the compiled library, in turns.

    Microseconds, medians of `--rounds`. What torch takes for its own operators is in them, which for meta tensors are written in
    Python: of a convolution more than all launches of a step by the library.
    """
    import fused_res
    from fused_res import environment
    from fused_res.block import program

    rows, spent, replay = [], 0, program.replay

    def timed(*arguments):
        nonlocal spent
        begin = time.perf_counter_ns()
        found = replay(*arguments)
        spent += time.perf_counter_ns() - begin
        return found

    program.replay = timed
    _become_triton()
    for name, block, x in _blocks(options):
        for level in options.levels:
            times = {True: [], False: []}
            with fused_res.use_backend("triton", level):
                _step(block, x, True)
                for _ in range(options.rounds):
                    for hooked, found in times.items():
                        if hooked:
                            triton.knobs.runtime.launch_enter_hook.add(_told)
                        spent, before = 0, library.fake_launches()
                        _step(block, x, True)
                        found.append(spent / 1e3)
                        triton.knobs.runtime.launch_enter_hook.remove(_told)
            us = {who: round(statistics.median(times[hooked]), 1) for hooked, who in ((True, "Python"), (False, "library"))}
            rows.append({"case": name, "level": level, "launches": library.fake_launches() - before, "us": us})
    command = f"python tests/fake_gpu.py {shlex.join(sys.argv[1:])}"
    about = {"machine": environment.machine(), "versions": environment.versions(), "git": environment.git()}
    yield {"command": command, **about, "batch": options.batch, "dtype": options.dtype, "rounds": options.rounds, "rows": rows}


def _told(metadata: object) -> None:
    """Somebody who asked Triton to be told of launches."""


def _sizes(types: Iterable) -> Iterator[int]:
    """Bytes of each parameter of a kernel, by the types in its signature."""
    for kind in types:
        if isinstance(kind, tuple):
            yield from _sizes(kind)
        elif kind != "constexpr":
            yield 8 if kind[0] == "*" else max(1, int(kind.lstrip("iufp")) // 8)


def _compile_tiles(options: argparse.Namespace, library: ctypes.CDLL) -> Iterator[dict]:
    """The convolutions with every tile, whether it fits or not: shared memory as told from the tile, and as compiled."""
    from fused_res.kernels import conv_cases, conv_tiling
    from fused_res.kernels.ahead import variant
    from fused_res.kernels.conv_dgrad import conv_dgrad
    from fused_res.kernels.conv_fprop import conv_fprop
    from fused_res.kernels.conv_wgrad import conv_wgrad

    dtype = getattr(torch, options.dtype)
    for case in conv_cases.meta_cases(dtype):
        if not case.main or case.unit.stride != (1, 1):
            continue
        x = conv_cases.meta_activated(case)
        for direction, launcher, image, mask, arguments in (
            ("fprop", conv_fprop, case.dy, None, (x, case.unit, True, None)),
            ("dgrad", conv_dgrad, case.x, "y", (case.x, case.unit, x, None)),
            ("dgrad", conv_dgrad, case.x, "signs", (case.x, case.unit, x, None)),
            ("wgrad", conv_wgrad, case.dy, "signs", (x, case.unit)),
        ):
            dy = () if mask is None else (conv_cases.meta_gradient(case.dy, mask),)
            read = {"fprop": (x,), "dgrad": dy, "wgrad": (*dy, x)}[direction]
            pixels = image.numel() // image.shape[1]
            for config in conv_tiling.configurations(direction, dtype, pixels, case.unit.weight.shape):
                launch = variant("", launcher, *dy, *arguments, config=config).launch
                shared = compile_launch(launch, options.capability).metadata.shared
                told = conv_tiling.shared_bytes(direction, config, dtype.itemsize, *read)
                yield {"direction": direction, "at": case.at, "config": config, "mask": mask, "told": told, "shared": shared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("blocks", "time", "tiles"))
    parser.add_argument("capability", type=int, choices=SHARED)
    parser.add_argument("dtype")
    parser.add_argument("precision", nargs="?", default="tf32", choices=("tf32", "ieee"), help="of float32")
    parser.add_argument("--levels", nargs="+")
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=200, help="of `time`")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="compile to the end, and keep it there")
    parser.add_argument("--wheel", type=Path, help="of this Triton, for the Python that is to find the kernels in the cache")
    options = parser.parse_args()
    torch.backends.cudnn.conv.fp32_precision = options.precision
    os.environ["FAKE_SHARED"] = str(SHARED[options.capability])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = str(options.cache or folder)
        library = load_driver(Path(folder))
        _become(options.capability)
        if options.cache is None:
            _stop_at_shared_memory()
        if options.wheel is not None:
            _have_the_keys_of(options.wheel)
        runs = {"blocks": _run_blocks, "time": _time_blocks, "tiles": _compile_tiles}
        for row in runs[options.what](options, library):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
