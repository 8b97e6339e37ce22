"""Runs of the CUDA kernels on the CPU, under AddressSanitizer and UBSan, in another process: the client of cuda_serving.h."""

import fcntl
import hashlib
import itertools
import os
import shutil
import struct
import subprocess
from pathlib import Path

import torch

from fused_res.primitives.bn_act import pack_signs, sign_bytes

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Of cuda_kernels.cpp, in the order of its table.
KERNELS = (
    *("bn_stats", "bn_finalize", "bn_act", "bn_act_backward_reduce", "bn_act_backward_finalize", "bn_act_backward_apply"),
    *("masked_add", "row_tiles", "widen", "narrow", "toy"),
)
NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
# What can be planted, and what plants none of it.
FAULTS = dict.fromkeys(("skipped_barrier", "absent_thread", "skipped_wait"), -1)
FAULTS |= dict.fromkeys(("early", "displaced", "unswizzled", "swapped"), 0)
SHORTCUTS = ("none", "identity", "projection")
RELUS = ("inner", "outer", "two")
# Few multiprocessors make blocks of the persistent kernels take several steps.
MULTIPROCESSORS = 1


class CrashError(Exception):
    """The process died; the message is what it had to say."""


def _key(command: list) -> str:
    """Of all that the program is made of."""
    sources = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.cuh"), *(ROOT / "tests").glob("*.h")])
    version = subprocess.run([command[0], "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(version + " ".join(map(str, command[1:])).encode())
    for source in [*sources, command[-1]]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def build(folder: Path, name: str = "cuda_kernels", *flags: str) -> Path:
    """Compiles tests/NAME.cpp, which serves kernels, in a folder of the caller's; or finds it among those of the same sources."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    source = ROOT / "tests" / f"{name}.cpp"
    command = [compiler, *FLAGS, *SANITIZERS, *flags, "-I", ROOT / "tests", "-I", ROOT / "csrc" / "cuda", source]
    kept = ROOT / "build" / "emulated" / f"{name}-{_key(command)}"
    if kept.is_file():
        return kept
    if not os.access(ROOT, os.W_OK):
        return _compile(command, folder / name)
    kept.parent.mkdir(parents=True, exist_ok=True)
    # Tests in other processes want the same: one compiles, which takes most of a minute, and the others wait.
    with (kept.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.is_file():
            for older in kept.parent.glob(f"{name}-*"):
                older.unlink()
            _compile(command, kept.with_suffix(".part")).replace(kept)
    return kept


def _compile(command: list, program: Path) -> Path:
    done = subprocess.run([*command, "-o", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


class Emulator:
    """Keeps the program running from call to call; a crash ends one process, and the next call starts another.

    `conflicts`: the bank conflicts of the last run, by the place of the access in the sources.
    """

    def __init__(self, program: Path, kernels: tuple[str, ...] = KERNELS):
        """kernels: what the program serves, in the order of its table."""
        self.program = program
        self.kernels = kernels
        self.conflicts = {}
        self.process = None
        self.seeds = itertools.count()

    def run(self, kernel, integers, buffers, outputs, *, shift=0, short=0, **faults):
        """Calls the kernel's launcher.

        Args:
            kernel: one of those that the program serves.
            integers: in the order in which the program reads them.
            buffers: tensors or None likewise; those among `outputs` are sent as their size only.
            outputs: the tensors to fill, which must be among the buffers.
            shift: distance of the buffers from 16-byte alignment, in their elements: of all of them, or of those by number.
            short: elements by which the memory of the first buffer is too small.
            faults: to plant, see cuda_on_cpu.h.
        """
        integers = [int(i) for i in integers]
        planted = [faults.pop(name, none) for name, none in FAULTS.items()]
        assert not faults, f"no such faults: {sorted(faults)}"
        request = struct.pack(f"={2 + len(planted)}q", self.kernels.index(kernel), next(self.seeds), *planted)
        request += struct.pack(f"={1 + len(integers)}q", len(integers), *integers) + struct.pack("=q", len(buffers))
        for i, buffer in enumerate(buffers):
            if buffer is None:
                request += struct.pack("=3q", -1, 0, 0)
                continue
            output = any(buffer is other for other in outputs)
            assert buffer.is_contiguous()
            size = (buffer.numel() - (short if i == 0 else 0)) * buffer.element_size()
            away = shift if isinstance(shift, int) else shift.get(i, 0)
            request += struct.pack("=3q", size, away * buffer.element_size(), output)
            if not output:
                request += buffer.reshape(-1).view(torch.uint8).numpy().tobytes()[:size]
        if self.process is None:
            self._start()
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        message = self._read(struct.unpack("=q", self._read(8))[0])
        if message:
            raise RuntimeError(message.decode())
        for buffer in buffers:
            if buffer is not None and any(buffer is other for other in outputs) and buffer.numel():
                filled = torch.frombuffer(bytearray(self._read(buffer.numel() * buffer.element_size())), dtype=buffer.dtype)
                buffer.copy_(filled.view(buffer.shape))
        remarks = self._read(struct.unpack("=q", self._read(8))[0]).decode()
        self.conflicts = {place: int(count) for place, count in (line.split() for line in remarks.splitlines())}

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            assert self.process.wait(10) == 0, self.process.stderr.read()
            self.process.stdout.close()
            self.process.stderr.close()
            self.process = None

    def _start(self):
        environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
        # A preloaded library (a tracer, another allocator) must not come before the sanitizer's.
        environment.pop("LD_PRELOAD", None)
        self.process = subprocess.Popen(
            [self.program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )

    def _read(self, size):
        data = self.process.stdout.read(size)
        if len(data) < size:
            message = self.process.communicate()[1].decode(errors="replace")
            self.process = None
            raise CrashError(message)
        return data


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 2 + 0.5).to(dtype)


def vectors(channels, seed=0):
    return random(5, channels, seed=seed)


def number(tensor):
    return 0 if tensor is None else NUMBERS[tensor.dtype]


def run_stats(emulator, y, rows, **options):
    pixels, channels = y.shape
    tiles = -(-pixels // rows)
    partials = torch.empty(tiles, 2, channels)
    emulator.run("bn_stats", (number(y), pixels, tiles, rows, channels), (y, partials), (partials,), **options)
    return partials


def run_act(emulator, y, v, skip=None, y2=None, v2=None, signs=True, **options):
    pixels, channels = y.shape
    out = torch.empty_like(y)
    bits = torch.empty(pixels, sign_bytes(channels), dtype=torch.uint8) if signs else None
    shortcut = 1 if skip is not None else 2 if y2 is not None else 0
    buffers = (y, v, y2 if skip is None else skip, v2, out, bits)
    integers = (number(y), shortcut, pixels, channels, MULTIPROCESSORS)
    emulator.run("bn_act", integers, buffers, [b for b in (out, bits) if b is not None], **options)
    return out, bits


def act_arguments(pixels, channels, dtype, shortcut):
    y, v = random(pixels, channels, dtype=dtype), vectors(channels)
    y.view(-1)[pixels * channels // 2] = float("nan")
    other = random(pixels, channels, dtype=dtype, seed=1)
    skip = other if shortcut == "identity" else None
    return (y, v, skip, other, vectors(channels, 2)) if shortcut == "projection" else (y, v, skip, None, None)


def backward_arguments(pixels, channels, dtype, relu):
    """dout, y, vectors, signs, y2, vectors2."""
    dout, y, v = random(pixels, channels, dtype=dtype), random(pixels, channels, dtype=dtype, seed=1), vectors(channels)
    signs = None if relu == "inner" else pack_signs(random(pixels, channels, seed=2) > 0)
    if relu == "two":
        return dout, y, v, signs, random(pixels, channels, dtype=dtype, seed=3), vectors(channels, 4)
    return dout, y, v, signs, None, None


def run_reduce(emulator, dout, y, v, signs, y2, v2, rows, **options):
    pixels, channels = y.shape
    tiles = max(1, -(-pixels // rows))
    partials = torch.empty(tiles, 2 if y2 is None else 3, channels)
    relu = 0 if signs is None else 1 if y2 is None else 2
    integers = (number(y), relu, pixels, tiles, rows, channels)
    emulator.run("bn_act_backward_reduce", integers, (dout, y, v, signs, y2, v2, partials), (partials,), **options)
    return partials


def run_apply(emulator, dout, y, v, c, signs, training, y2, c2, training2, keep_masked, **options):
    pixels, channels = y.shape
    dy, dy2 = torch.empty_like(y), None if y2 is None else torch.empty_like(y)
    masked = torch.empty_like(y) if keep_masked else None
    relu = 0 if signs is None else 1 if y2 is None else 2
    integers = (number(y), relu, pixels, channels, training, training2, MULTIPROCESSORS)
    # What is not to be read is not there.
    value, value2 = (y if training or signs is None else None), (y2 if training2 else None)
    buffers = (dout, v, signs, value, c, dy, value2, c2, dy2, masked)
    emulator.run("bn_act_backward_apply", integers, buffers, [b for b in (dy, dy2, masked) if b is not None], **options)
    return dy, dy2, masked


def run_add(emulator, dx, image, signs, stride, **options):
    """The new dx; images are [N, H, W, C]."""
    out, (n, h, w, channels) = torch.empty_like(dx), dx.shape
    integers = (number(dx), n, channels, h, w, *stride, MULTIPROCESSORS)
    emulator.run("masked_add", integers, (image, signs, dx, out), (out,), **options)
    return out


def add_arguments(shape, dtype, stride, masked=True):
    """dx, the addend and its signs or None."""
    n, h, w, channels = shape
    dx = random(*shape, dtype=dtype)
    image = random(n, -(-h // stride[0]), -(-w // stride[1]), channels, dtype=dtype, seed=1)
    opened = random(image.numel() // channels, channels, seed=2) > 0
    return dx, image, pack_signs(opened) if masked else None
