"""The tool that times kernels tile by tile, at small shapes in Triton's interpreter."""

import json

import pytest
import torch

from fused_res.benchmarks.cases import Case

pytest.importorskip("triton")
tiles = pytest.importorskip("fused_res.benchmarks.tiles")
IDENTITY = Case("small.identity", "bottleneck", 64, 16, 4)
PROJECTION = Case("small.projection", "bottleneck", 24, 16, 4, 2)
KERNELS = {
    IDENTITY: (
        *(f"conv_{direction} {what}" for what in ("1x1 first", "1x1 last", "3x3") for direction in ("fprop", "dgrad", "wgrad")),
        *("pointwise_tail", "moments", "pointwise_tail_backward_reduce", "pointwise_tail_backward_apply"),
    ),
    PROJECTION: (
        "pointwise_tail",
        *("moments projection", "pointwise_tail_backward_reduce projection", "pointwise_tail_backward_apply projection"),
    ),
}


@pytest.fixture
def _no_clock(monkeypatch):
    """A CPU has no events: every launch takes a microsecond."""
    monkeypatch.setattr(tiles, "microseconds", lambda call: 1.0)


def jobs(case, device):
    return list(tiles.jobs(case, 2, torch.bfloat16, torch.device(device)))


@pytest.mark.usefixtures("_no_clock", "proven_interpreter")
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_every_job_runs_with_several_tiles_that_agree(case, device):
    found = jobs(case, device)
    assert sorted(job.name for job in found) == sorted(KERNELS[case])
    for job in found:
        assert job.bytes > 0
        rows = list(tiles.measure(job._replace(tiles=job.tiles[-2:]), 1e12, compile_only=False))
        assert len(rows) >= 2, job.name
        assert [row.get("reason") for row in rows] == [None] * len(rows), job.name
        assert all(row["difference"] <= tiles.AGREE for row in rows), job.name


@pytest.mark.usefixtures("_no_clock")
def test_a_tile_that_is_wrong_or_does_not_run_is_a_row():
    right, wrong = torch.ones(4), torch.ones(4) + 0.1
    results = {None: right, (1,): wrong, (2,): right}

    def run(tile):
        if tile == (3,):
            raise RuntimeError("out of shared memory\nmore")
        return results[tile], torch.zeros(1, 2, 3)  # partial results by tiles are no matter

    rows = list(tiles.measure(tiles.Job("a kernel", run, ((1,), (2,), (3,)), 100), 1e12, compile_only=False))
    assert [row["tile"] for row in rows] == [None, [1], [2], [3]]
    assert rows[1]["difference"] == pytest.approx(0.1)
    assert rows[2]["difference"] == 0.0
    assert rows[3]["reason"] == "RuntimeError: out of shared memory"


@pytest.fixture
def job_list(monkeypatch):
    """Two jobs of a case whose tiles do as planted; the launches are noted."""
    launches = []

    def job(name, tile_fails=False):
        def run(tile):
            launches.append((name, tile))
            if tile_fails and tile is not None:
                raise RuntimeError("illegal memory access")
            return torch.ones(2)

        return tiles.Job(name, run, ((1,), (2,)), 8)

    case = Case("resnet50.3.identity", "bottleneck", 64, 16, 4)
    monkeypatch.setattr(tiles, "SUITES", {"resnet50": [case]})
    monkeypatch.setattr(tiles, "_copy_rate", lambda device: 1e12)
    monkeypatch.setattr(tiles, "jobs", lambda *args: [job("first", tile_fails=True), job("second")])
    return launches


@pytest.mark.usefixtures("_no_clock")
def test_after_a_tile_that_took_the_gpu_with_it_the_next_process_goes_on(job_list, tmp_path, monkeypatch):
    path = tmp_path / "tiles.jsonl"
    monkeypatch.setattr(tiles, "is_lost", lambda device: True)
    assert tiles.main(["--output", str(path), "--resume"]) == 3
    assert ("first", (2,)) not in job_list
    with path.open("a") as file:
        file.write('{"case": "resn')  # cut off
    assert tiles.main(["--output", str(path), "--resume"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["kernel"], row["tile"]) for row in rows] == [
        ("first", None),
        ("first", [1]),
        ("second", None),
        ("second", [1]),
        ("second", [2]),
    ]


@pytest.mark.usefixtures("_no_clock")
def test_compiling_only_runs_every_tile_of_the_kernels_that_are_named(job_list, capsys):
    assert tiles.main(["--compile-only", "--kernels", "second"]) == 0
    assert job_list == [("second", None), ("second", (1,)), ("second", (2,))]
    assert tiles.main(["--compile-only", "--kernels", "sec"]) == 0
    assert len(job_list) == 3
    assert tiles.main(["--compile-only"]) == 0
    assert "resnet50.3.identity first: 3 tiles, 2 do not run" in capsys.readouterr().out
