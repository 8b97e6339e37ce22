"""What documents show of evaluation beside what else serves models."""

from fused_res.benchmarks import readme, serving
from fused_res.benchmarks.cases import NETWORKS, SUITES

VERSIONS = {"torch": "2.13.0", "fused_res": "0.1.0", "triton": None}


def row(case, peer, times, mode="eval", reason=None):
    times = list(times)
    middle = sorted(times)[len(times) // 2]
    engines = {"ONNX Runtime": "onnxruntime 1.2", "fused_res": "native, epilogue"}
    found = {"case": case, "batch": 1, "dtype": "fp32", "mode": mode, "peer": peer, "reason": reason}
    return found | {"times": times, "ms": {"median": middle}, "rounds": len(times), "backend": engines.get(peer, "eager")}


def document(*rows):
    about = {"device": "cpu", "gpu": None, "versions": VERSIONS, "git": {"commit": "0" * 40, "dirty": False}}
    machine = {"machine": {"cpu": "a CPU", "threads": 1}, "created": "2026-01-01T00:00:00"}
    return about | machine | {"rows": list(rows), "command": "fused-res bench", "suite": "serving"}


def rows(case, **times):
    names = {"eager": serving.EAGER, "frozen": serving.FROZEN, "onnx": "ONNX Runtime", "ours": "fused_res"}
    return [row(case, names.get(name, name), values) for name, values in times.items()]


def test_each_case_has_a_line_with_the_fastest_of_the_others_in_bold():
    found = rows("a", eager=[20, 20, 20], frozen=[10, 10, 10], onnx=[8, 8, 8], ours=[10, 10, 10])
    found.append(row("a", "fused_res compiled freezing", [9, 9, 9]))
    head, _, line = serving.table(document(*found))
    assert head.endswith("| x ONNX Runtime | fused_res compiled freezing x torch.compile freezing |")
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["a", "1", "10"]
    assert [cell.split(" ")[0] for cell in cells[3:]] == ["0.50", "1.00", "**1.25", "0.90"]


def test_goals_count_the_cases_that_meet_them_and_name_the_others():
    fast = rows("fast", eager=[20] * 5, frozen=[11] * 5, onnx=[11] * 5, ours=[10] * 5)
    slow = rows("slow", eager=[12] * 5, frozen=[9] * 5, onnx=[8] * 5, ours=[10] * 5)
    lines = serving.met(document(*fast, *slow))
    assert [line.split(": in ")[1].split(" cases")[0] for line in lines] == ["1 of 2"] * 3
    assert all("Not in slow, batch 1" in line and "fast, batch" not in line for line in lines)


def test_a_median_that_is_fast_in_few_rounds_alone_does_not_meet_the_goal():
    ours = [10, 10, 10, 19, 19]
    line, *_ = serving.met(document(*rows("a", eager=[20] * 5, ours=ours)))
    assert ": in 0 of 1 cases" in line


def test_a_training_step_has_the_goal_of_compiled_models_alone():
    found = [
        row("resnet18", name, [10] * 3, "train") for name in (serving.EAGER, "torch.compile", "fused_res", "fused_res compiled")
    ]
    (line,) = serving.met(document(*found))
    assert line == "- fused_res compiled at most 1 times the time of torch.compile: in 1 of 1 cases."


def test_what_did_not_run_is_left_out_and_its_reason_stands():
    found = rows("a", eager=[20] * 3, ours=[10] * 3)
    found.append({**found[0], "peer": "ONNX Runtime", "reason": "no bfloat16"})
    text = serving.section(document(*found))
    assert "ONNX Runtime not run anywhere: no bfloat16" in text
    assert "onnxruntime" not in text


def test_a_file_that_is_not_there_yet_is_said_and_no_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- serving:begin none.jsonl -->\n<!-- serving:end -->\n<!-- goals:begin none.jsonl -->\n<!-- goals:end -->\n"
    )
    assert readme.main([str(page)]) == 0
    assert page.read_text().count(serving.MISSING) == 2
    assert readme.main(["--check", str(page)]) == 0
    assert readme.shown(page.read_text(), tmp_path) == []


def test_the_suite_holds_three_networks_block_by_block_and_whole():
    names = ("resnet18", "resnet50", "resnext50_32x4d")
    assert [case for case in SUITES["serving"] if case.is_network] == [NETWORKS[name] for name in names]
    assert {case for case in SUITES["serving"] if not case.is_network} == {case for name in names for case in SUITES[name]}
