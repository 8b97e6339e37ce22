"""What a step costs on a GPU, as counted: its kernels, their bytes and instructions, and times beside those that were measured."""

import threading
from pathlib import Path

import pytest
import torch

from fused_res.backends import triton
from fused_res.benchmarks import calibration, model
from fused_res.benchmarks.cases import SUITES, occurrences
from fused_res.benchmarks.results import load
from fused_res.block.levels import LEVELS
from fused_res.cost import constants, counted, predict, recorded
from fused_res.cost.constants import GPUS, SLOTS, Slots
from fused_res.cost.recorded import Step, launches, steps

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu" / "nvidia-h200"
CASES = {case.name: case for case in SUITES["resnet50"]}
IDENTITY = CASES["resnet50.1.identity"]
PAYS = triton.pays  # conftest.py replaces it in every test by one that says yes


@pytest.fixture(autouse=True)
def _as_sizes_say(monkeypatch):
    monkeypatch.setattr(triton, "pays", PAYS)
    recorded.clear()
    yield
    recorded.clear()


@pytest.fixture(scope="module")
def measured():
    return calibration.sequences(RESULTS)


def of(case, level, batch=256):
    return steps(case.geometry(batch), level, torch.bfloat16, 90)


def test_a_step_at_the_first_level_by_hand():
    """Three statistics, the inner activations and the tail; backward the outer BN, two inner ones, and the shortcut's gradient."""
    n, wide, narrow = 256 * 56 * 56, 256, 64
    found = [step for step in of(IDENTITY, "bn_act") if step.bytes > 1e7]
    assert {step.kind for step in found if step.macs} == {"library"}
    assert sum(step.macs for step in found) == 3 * n * (2 * wide * narrow + 9 * narrow * narrow)
    passes = [step.bytes for step in found if not step.macs]
    elements = [
        *(narrow, 2 * narrow, narrow, 2 * narrow, wide, 3 * wide + wide / 16),
        *(2 * wide + wide / 16, 3 * wide + wide / 16),
        *(2 * narrow, 2 * narrow, 3 * narrow, 2 * narrow, 2 * narrow, 3 * narrow, 3 * wide + wide / 16),
    ]
    assert passes == pytest.approx([2 * n * count for count in elements], rel=3e-3)  # less partial results


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_a_step_launches_what_a_gpu_was_seen_to_launch(case, measured):
    """At the levels whose kernels are the same as when the sequences were taken."""
    for level in ("bn_act", "epilogue"):
        shown = [name.removesuffix("_kernel") for name, _ in measured[case.name, f"fused_res {level}"] if name.endswith("_kernel")]
        ours = [step.kind.split()[0] for step in of(case, level) if step.kind not in ("library", "torch")]
        assert [name for name in shown if name != "move_statistics"] == ours


def test_bytes_of_strided_and_joined_operands_are_those_of_the_pixels_they_touch():
    case = CASES["resnet50.2.projection"]
    found = {step.kind: step for step in of(case, "moment", batch=8)}
    pixels = 8 * 28 * 28
    joined = 2 * (pixels * (512 + 3 * 256) + 512 * 256 + 256 * 256) + pixels * 512 / 8 + 256 * 8 + 4 * 256
    applied = [step.bytes for step in of(case, "moment", batch=8) if step.kind == "pointwise_tail_backward_apply"]
    assert applied[-1] == pytest.approx(joined)
    assert found["pointwise_tail"].macs == pixels * 512 * (128 + 256)


@pytest.mark.parametrize("mode", [(True, True), (True, False), (False, False)], ids=["train", "forward", "eval"])
@pytest.mark.parametrize("name", ["resnet50.1.projection", "resnet18.2.projection", "resnext50_32x4d.2.identity"])
def test_every_level_of_every_kind_of_block_is_recorded(name, mode):
    training, backward_too = mode
    case = next(case for suite in SUITES.values() for case in suite if case.name == name)
    for level in LEVELS:
        found = steps(case.geometry(2, training), level, torch.float32, 80, backward_too)
        assert all(step.bytes > 0 for step in found)
        assert sum(step.macs for step in found) > 0
        assert predict.total(found, torch.float32, GPUS["A100"]) > 0


def test_recording_in_one_thread_leaves_launches_of_another_alone():
    from fused_res.kernels import launching, tiling

    seen = {}

    def other():
        seen["noted"], seen["limits"] = launching._local.noted, tiling.limits(torch.device("cpu"))

    with launching.recording(), tiling.compiling_for(86, 1):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert tiling.limits(torch.device("cpu")).shared == 1
    assert seen == {"noted": None, "limits": tiling._NONE}


SASS = """
.L_x_0:
        /*0010*/                   MOV R1, c[0x0][0x28] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   LDSM.16.M88.4 R4, [R8] ;
        /*0040*/              @!P3 BRA `(.L_x_4) ;
.L_x_5:
        /*0050*/                   HMMA.16816.F32.BF16 R0, R4, R6, R0 ;
        /*0060*/              @P1  BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0080*/              @P2  BRA `(.L_x_3) ;
.L_x_2:
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [R2], R3 ;
        /*00b0*/              @!P3 BRA `(.L_x_4) ;
        /*00c0*/                   BRA `(.L_x_5) ;
"""


def test_loops_with_a_product_are_found_in_machine_code():
    code = counted.disassembled(SASS)
    assert len(code.instructions) == 12
    assert [len(body) for body in counted.loops(code)] == [4]
    launch = next(
        launch
        for launch in launches(IDENTITY.geometry(256), "epilogue", torch.bfloat16, 90)
        if not isinstance(launch, Step) and launch.kernel.__name__ == "conv_fprop_kernel"
    )
    found = counted.count(launch, code)
    assert (found.rest, found.bodies, found.trips) == (8, [4], [256 // launch.constants["BLOCK_C"]])
    assert found.program == 8 + 4 * found.trips[0]


TWO_LOOPS = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @P0  BRA `(.L_x_9) ;
        /*0020*/              @!P1 BRA `(.L_x_2) ;
        /*0030*/                   MOV R1, RZ ;
.L_x_1:
        /*0040*/                   LDSM.16.M88.4 R4, [R8] ;
        /*0050*/                   HMMA.16816.F32.BF16 R0, R4, R6, R0 ;
        /*0060*/              @P2  BRA `(.L_x_1) ;
        /*0070*/                   BRA `(.L_x_4) ;
.L_x_2:
        /*0080*/                   MOV R2, RZ ;
.L_x_3:
        /*0090*/                   HMMA.16816.F32.BF16 R0, R4, R6, R0 ;
        /*00a0*/              @P3  BRA `(.L_x_3) ;
.L_x_4:
        /*00b0*/                   STG R0 ;
.L_x_9:
        /*00c0*/                   EXIT ;
"""


def test_what_a_branch_passes_over_with_a_loop_is_found():
    """The shortest branch over the one loop, not the one over both."""
    code = counted.disassembled(TWO_LOOPS)
    first, second = counted.spans(code)
    assert (first, second) == ((4, 7), (9, 11))
    assert counted.skipped(code, first, [second]) == len(range(3, 8))
    assert counted.skipped(code, first, []) == counted.skipped(code, first, [second])
    assert counted.skipped(code, second, [first]) == len(range(8, 11))
    assert counted.skipped(code, (0, 1), [first, second]) == 0


def test_instructions_are_those_of_the_counted_loops():
    counts = calibration.counts(ROOT / "docs")
    assert {kind: set(found) for kind, found in SLOTS.items()} == {kind: set(found) for kind, found in counts.items()}
    assert {arch for found in counts.values() for arch in found} == {gpu.capability for gpu in GPUS.values()}
    for kind, found in counts.items():
        for arch, slots in found.items():
            assert list(SLOTS[kind][arch]) == pytest.approx(list(slots), rel=6e-3)


def test_efficiencies_are_those_that_were_measured():
    for name, value in calibration.derived(RESULTS).items():
        assert getattr(constants, name) == pytest.approx(value, rel=0.02), name


def test_predictions_of_whole_blocks_are_near_what_was_measured():
    rows = model.beside(load(RESULTS / "resnet50-train-bf16.jsonl"), "H200", calibration.counts(RESULTS))
    assert len(rows) == 4 * 7
    assert all(0.9 < row["predicted"] / row["measured"] < 1.12 for row in rows), rows


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_the_level_that_the_model_chooses_is_the_one_that_was_measured_to_be_fastest(stage):
    name, counts = f"resnet50.{stage}.identity", calibration.counts(RESULTS)  # of the kernels that were measured
    rows = [row for row in model.beside(load(RESULTS / "resnet50-train-bf16.jsonl"), "H200", counts) if row["case"] == name]
    fastest = min((row for row in rows if row["way"] in LEVELS), key=lambda row: row["measured"])["way"]
    assert predict.level(CASES[name].geometry(256), torch.bfloat16, GPUS["H200"], counts=counts) == fastest


def test_the_nearest_gpu_of_the_table():
    assert predict.nearest("NVIDIA H100 80GB HBM3", (9, 0)).name == "H100"
    assert predict.nearest("NVIDIA GeForce RTX 5070", (12, 0)).name == "RTX 5090"
    assert predict.nearest("NVIDIA A10G", (8, 6)).name == "A100"
    assert predict.nearest("Tesla T4", (7, 5)) is None


def test_kinds_that_were_not_counted_take_the_instructions_of_their_like():
    gpu = GPUS["H200"]
    like = predict.instructions(Step("conv_dgrad prologue", 0.0, 10.0, 100.0), gpu)
    assert predict.instructions(Step("conv_dgrad prologue unheard-of", 0.0, 10.0, 100.0), gpu) == like
    assert predict.instructions(Step("conv_wgrad_partial", 0.0, 10.0, 100.0), gpu) > 0


def test_what_free_instructions_would_save_is_as_documented():
    """docs/design.md: the best levels of ResNet-50's blocks in training, bfloat16, batch 256."""
    free = {kind: dict.fromkeys(found, Slots(0, 0)) for kind, found in SLOTS.items()}
    blocks, saved = occurrences("resnet50"), {}

    def best(case, gpu, slots):
        found = (steps(case.geometry(256), level, torch.bfloat16, gpu.capability) for level in LEVELS)
        return min(predict.total(of_level, torch.bfloat16, gpu, slots) for of_level in found)

    for gpu in map(GPUS.get, model.SHOWN):
        now, without = (sum(n * best(case, gpu, slots) for case, n in blocks.items()) for slots in (SLOTS, free))
        saved[gpu.name] = round(100 * (1 - without / now))
    assert saved == {"A100": 3, "H100": 1, "H200": 4, "B200": 19}
