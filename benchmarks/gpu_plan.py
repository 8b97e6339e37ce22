"""What `benchmarks/gpu.py` does with minutes on a GPU: the steps, in the order of their value, with estimates and limits [s].

Estimates are what the steps took on an H200 with 16 cores, where they ran there.
"""

from collections.abc import Sequence
from pathlib import Path

if __package__:
    from fused_res.benchmarks.steps import Step
else:  # of a script, perhaps without an installation: its folder is on the path
    from steps import Step

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ("bn_act", "epilogue", "prologue", "moment")
CASES = ("1.identity", "2.identity", "3.identity", "4.identity", "1.projection", "2.projection", "3.projection", "4.projection")
"""Of ResNet-50, by the time that they take together in the network."""
PROCESSES = 14
BUILD = f"""
import os, runpy, sys, torch
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{{}}.{{}}".format(*torch.cuda.get_device_capability()))
os.chdir({str(ROOT)!r})
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


def kernel_tests() -> list[str]:
    """The test files that mirror the kernels' stems, and the moment form's, which chains them."""
    stems = [path.stem for path in sorted((ROOT / "kernels").glob("*.py"))] + ["moment_form"]
    return [str(ROOT / "tests" / f"test_{stem}.py") for stem in stems if (ROOT / "tests" / f"test_{stem}.py").is_file()]


def gpu_tests() -> list[str]:
    """The files of tests that need a GPU: named, because collecting all others takes every process many seconds."""
    return [str(ROOT / "tests" / f"test_{name}.py") for name in ("gpu", "benchmarks_gpu")]


def pytest(output: Path, name: str, *arguments: str, processes: int = PROCESSES) -> tuple[str, ...]:
    """pytest in many processes, each test within a minute; every outcome is written down as soon as it is known."""
    options = ("--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-q", "--tb=short")
    spread = ("-n", str(processes), "--dist", "worksteal", "--timeout", "60", "--timeout-method", "thread")
    plugin = ("-p", "fused_res.benchmarks.outcomes", "--outcomes", str(output / f"{name}.outcomes.jsonl"))
    return ("-m", "pytest", *options, *(spread if processes > 1 else ()), *plugin, *arguments)


def full_check() -> Step:
    """The numerical check with all seeds, a process for each backend and dtype."""
    parts = [(backend, dtype) for backend in ("triton", "native", "reference") for dtype in ("fp32", "fp16", "bf16")]
    commands = tuple(("-m", "fused_res", "check", "--json", "--backend", backend, "--dtype", dtype) for backend, dtype in parts)
    keep = tuple(f"check-{backend}-{dtype}.json" for backend, dtype in parts)
    return Step("check", commands, estimate=60, limit=180, needs=("smoke",), keep=keep)


def sanitizer(tool: str) -> Step:
    """The numerical check, one seed of every block, under compute-sanitizer; memory errors and races make it fail."""
    within = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20")
    small = ("--dtype", "bf16", "--seeds", "1", "--backend", "native")
    return Step(
        f"sanitizer-{tool}",
        (("-m", "fused_res", "check", *small),),
        estimate=60,
        limit=150,
        accepted=(0, 1),  # 1 is the check's own: numbers are judged by the step `check`
        within=within,
        # Under a sanitizer every tensor has memory of its own, so that reading past one shows.
        environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    )


def timings(output: Path, suite: str, mode: str, dtype: str, batch: int, cases: Sequence[str], peers: Sequence[str]) -> list[Step]:
    """A suite's cases, each a step and a process of its own, all into one result file."""
    common = ("-m", "fused_res", "bench", "--output", str(output), "--resume", "--suite", suite, "--mode", mode, "--dtype", dtype)
    name = f"{suite}-{mode}-{dtype}"
    return [
        Step(
            f"{name} {case}",
            ((*common, "--batch", str(batch), "--rounds", "30", "--peers", *peers, "--cases", f"{suite}.{case}"),),
            estimate=31,
            limit=90,
            resumable=True,
            needs=("smoke",),
        )
        for case in cases
    ]


OURS = ("fused_res", *(f"fused_res {level}" for level in LEVELS))
# Of the eager layouts channels_last is the faster one on tensor cores; NCHW would take a good part of the time.
PEERS = ("eager channels_last", "torch.compile", "bare convolutions", *OURS)


def warm(batch: int) -> Step:
    """Everything that the timings compile, compiled by many processes at once."""
    common = ("-m", "fused_res.benchmarks.warm", "--suite", "resnet50", "--batch", str(batch), "--dtype", "bf16")
    groups = (OURS, ("torch.compile",))
    commands = [(*common, "--cases", f"resnet50.{case}", "--peers", *peers) for case in CASES for peers in groups]
    return Step(
        "warm", tuple(commands), estimate=40, limit=100, needs=("smoke",), environment=(("TORCHINDUCTOR_COMPILE_THREADS", "1"),)
    )


def sequences(output: Path, name: str, environment: tuple[tuple[str, str], ...] = (), batch: int = 256) -> Step:
    """All kernels of all blocks of ResNet-50 at every level."""
    peers = ("eager channels_last", "bare convolutions", *(f"fused_res {level}" for level in LEVELS))
    command = ("-m", "fused_res.benchmarks.profiling", "--resume", "--suite", "resnet50", "--batch", str(batch), "--dtype", "bf16")
    arguments = (*command, "--output", str(output / f"{name}.jsonl"), "--peers", *peers)
    return Step(name, (arguments,), estimate=41, limit=90, resumable=True, needs=("smoke",), environment=environment)


TILED = (
    *(f"conv_{direction} {which}" for direction in ("fprop", "dgrad", "wgrad") for which in ("1x1 first", "1x1 last", "3x3")),
    *("pointwise_tail", "moments", "pointwise_tail_backward_reduce", "pointwise_tail_backward_apply"),
)


def tiles(output: Path) -> list[Step]:
    """The kernels' tiles, compiled by many processes at once, then timed."""
    command = ("-m", "fused_res.benchmarks.tiles")
    few = ("--compile-only", "--batch", "32", "--cases", "resnet50.3.identity", "resnet50.3.projection")
    compile_only = tuple((*command, *few, "--kernels", kernel) for kernel in TILED)
    timed = ((*command, "--resume", "--output", str(output / "tiles.jsonl")),)
    return [
        Step("tiles-warm", compile_only, estimate=52, limit=90, needs=("smoke",)),
        Step("tiles", timed, estimate=60, limit=120, resumable=True, needs=("smoke",)),
    ]


def steps(output: Path) -> list[Step]:
    """In the order of their value: correctness, then the times that decide, then what time allows."""
    check = ("-m", "fused_res", "check", "--seeds", "1", "--dtype", "bf16")
    triton = (*check, "--backend", "triton", "--mode", "train")
    blocks = ("Bottleneck identity", "Bottleneck projection")
    smoke = [(*triton, "--level", level, "--block", block) for level in LEVELS for block in blocks]
    smoke += [(*check, "--backend", "native"), ("-m", "fused_res", "info")]
    built = (ROOT / "fused_res" / "_native.so").is_file()
    fusions = ("-m", "fused_res.benchmarks.cudnn_fusions", "--output", str(output / "cudnn-fusions.json"), "--limit", "40")
    return [
        *([] if built else [Step("build", (("-c", BUILD),), estimate=60, limit=150)]),
        Step("smoke", tuple(smoke), estimate=30, limit=90),
        Step(
            "kernel-tests",
            (pytest(output, "kernel-tests", "-m", "kernel and not slow", "-k", "not reference", *kernel_tests()),),
            estimate=80,
            limit=110,
        ),
        Step("gpu-tests", (pytest(output, "gpu-tests", "-m", "gpu and not slow", *gpu_tests()),), estimate=50, limit=90),
        warm(256),
        *timings(output, "resnet50", "train", "bf16", 256, CASES, PEERS),
        Step("cudnn-fusions", (fusions,), estimate=45, limit=65, accepted=(0, 3), needs=("smoke",)),
        sequences(output, "sequences"),
        sequences(output, "sequences-own", (("FUSED_RES_CONVOLUTIONS", "own"),)),
        *tiles(output),
        *timings(output, "resnet50", "eval", "bf16", 256, CASES, PEERS),
        full_check(),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        *timings(output, "resnet50", "train", "fp16", 256, CASES, PEERS),
        *timings(output, "resnet50", "train", "fp32", 64, CASES, PEERS),
        *timings(output, "resnet18", "train", "bf16", 256, ("1.identity", "2.identity", "3.identity", "4.identity"), PEERS),
        *finish(output),
    ]


def finish(output: Path, worst: int = 4) -> list[Step]:
    """What is made of the result files, which must be there."""
    code = (
        "import sys; from pathlib import Path; from {module} import main; files = sorted(str(p) for p in Path(sys.argv[1])"
        ".glob('*-*-*.jsonl') if '.outcomes' not in p.name); sys.exit(main([*{before!r}, *files, *sys.argv[2:]]) if files else 0)"
    )
    profile = code.format(module="fused_res.benchmarks.profiling", before=[])
    report = code.format(module="fused_res.cli", before=["bench", "report"])
    ship = code.format(module="fused_res.benchmarks.shipping", before=[])
    outcomes = [str(output / f"{name}.outcomes.jsonl") for name in ("kernel-tests", "gpu-tests")]
    return [
        Step(
            "profile",
            (("-c", profile, str(output), "--worst", str(worst), "--output", str(output / "profile.md")),),
            40,
            90,
            last=True,
        ),
        Step("plans", (("-c", ship, str(output), "--output", str(output / "shipped"), "--outcomes", *outcomes),), 5, 30, last=True),
        Step("report", (("-c", report, str(output), "--output", str(output / "report.html")),), 8, 40, last=True),
    ]


def dry_steps(output: Path) -> list[Step]:
    """Each kind of step in miniature, on the CPU."""
    small = ("--suite", "resnet18", "--mode", "eval", "--dtype", "fp32", "--batch", "1", "--rounds", "1", "--resume")
    peers = ("--peers", "eager channels_last", "bare convolutions", "fused_res")
    bench = ("-m", "fused_res", "bench", "--device", "cpu", "--output", str(output), *small, *peers)
    check = ("-m", "fused_res", "check", "--json", "--dtype", "fp32", "--backend", "reference", "--seeds", "1", "--level")
    tests = pytest(output, "tests", str(ROOT / "tests" / "test_bench_model.py"), processes=2)
    sequence = ("-m", "fused_res.benchmarks.profiling", "--resume", "--suite", "resnet18", "--cases", "resnet18.4.identity")
    sequence = (*sequence, "--batch", "1", "--dtype", "fp32")
    return [
        Step(
            "smoke",
            ((*check, "bn_act"), (*check, "moment")),
            estimate=8,
            limit=120,
            keep=("check-bn_act.json", "check-moment.json"),
        ),
        Step("tests", (tests,), estimate=4, limit=120),
        Step("sanitizer", (("-m", "fused_res", "info"),), within=("compute-sanitizer-of-a-dry-run",)),
        *(
            Step(
                f"resnet18-eval-fp32 {case}",
                ((*bench, "--cases", f"resnet18.{case}"),),
                estimate=8,
                limit=120,
                resumable=True,
                needs=("smoke",),
            )
            for case in ("1.identity", "2.projection")
        ),
        Step("sequences", ((*sequence, "--output", str(output / "sequences.jsonl")),), estimate=8, limit=120, resumable=True),
        *finish(output, worst=1),
    ]
