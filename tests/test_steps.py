"""Steps on a machine that may end at any moment: limits, cuts, what is kept, and what is packed."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from fused_res.benchmarks import steps
from fused_res.benchmarks.gpu import Stay
from fused_res.benchmarks.steps import State, Step

CHILD = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep({})"


def alive(process):
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def gone(process, seconds=5.0):
    end = time.monotonic() + seconds
    while alive(process) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(process)


@pytest.fixture
def stay(tmp_path):
    """Runs steps as a call of the script does, and returns the call."""
    output = tmp_path / "results"
    output.mkdir()

    def run(*planned, source="sources", seconds=float("inf")):
        made = Stay(output, list(planned), time.monotonic() + seconds, tmp_path / "all.tar.gz", dict(os.environ), tmp_path, source)
        made.run_all(planned)
        return made

    return run


def statuses(stay):
    return [stay.state.status(step) for step in stay.planned]


def counting(path, code=0):
    """A command that notes that it has run."""
    return ("-c", f"import sys; open({str(path)!r}, 'a').write('x'); sys.exit({code})")


def test_a_limit_ends_a_step_with_all_that_it_started(stay, tmp_path):
    hanging = Step("hangs", (("-c", CHILD.format(60)),), limit=1.5)
    begin = time.monotonic()
    made = stay(hanging)
    assert time.monotonic() - begin < 15
    assert statuses(made) == ["over its limit of 2 s"]
    assert gone(int((tmp_path / "results" / "logs" / "hangs.out").read_text()))


def test_what_a_command_leaves_behind_ends_with_the_step(stay, tmp_path):
    made = stay(Step("leaves", (("-c", CHILD.format(0)),)))
    assert statuses(made) == ["passed"]
    assert gone(int((tmp_path / "results" / "logs" / "leaves.out").read_text()))


def test_all_ends_when_the_script_is_killed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from fused_res.benchmarks import steps; "
        f"steps.execute([[sys.executable, '-c', {CHILD.format(60)!r}]], None, Path('.'), [Path({str(tmp_path / 'log')!r})], 60)"
    )
    script = subprocess.Popen([sys.executable, "-c", code])
    log, end = tmp_path / "log.out", time.monotonic() + 60
    while not (log.is_file() and log.read_text().endswith("\n")) and time.monotonic() < end:
        time.sleep(0.05)
    child = int(log.read_text())
    assert alive(child)
    script.send_signal(signal.SIGKILL)
    script.wait()
    assert gone(child)


def test_what_the_stay_cuts_off_runs_again_and_what_its_own_limit_ends_does_not(stay, tmp_path):
    begun = tmp_path / "begun"
    code = f"import time; open({str(begun)!r}, 'a').write('x'); time.sleep(5)"
    longer = Step("longer", (("-c", code),), estimate=0, limit=4)
    assert statuses(stay(longer, seconds=1.5)) == ["cut off"]
    assert statuses(stay(longer)) == ["over its limit of 4 s"]
    assert statuses(stay(longer)) == ["over its limit of 4 s"]
    assert begun.read_text() == "xx"


def test_what_failed_is_passed_over_and_the_others_run(stay, tmp_path, capsys):
    seen = tmp_path / "seen"
    failing = Step("fails", (("-c", "import sys; print('what went wrong'); sys.exit(7)"), counting(seen)))
    needing, other = Step("needs", (counting(seen),), needs=("fails",)), Step("other", (counting(seen),))
    made = stay(failing, needing, other)
    assert statuses(made) == ["failed with exit code 7", "not started", "passed"]
    said = capsys.readouterr().out
    assert "what went wrong" in said
    assert "needs: not begun, fails has not passed" in said
    assert statuses(stay(failing, needing, other)) == statuses(made)
    assert seen.read_text() == "xx"


def test_a_step_that_cannot_even_begin_does_not_end_the_run(stay, monkeypatch):
    def broken(*args):
        raise OSError("no more processes")

    monkeypatch.setattr("fused_res.benchmarks.gpu.run", broken)
    made = stay(Step("one", (("-c", ""),)), Step("two", (("-c", ""),)))
    assert statuses(made) == 2 * ["failed with OSError: no more processes"]


def test_an_archive_or_summary_that_cannot_be_written_does_not_end_the_run(stay, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise ValueError("broken")

    monkeypatch.setattr("fused_res.benchmarks.gpu.pack", broken)
    monkeypatch.setattr("fused_res.benchmarks.summary.page", broken)
    made = stay(Step("one", (("-c", ""),)), Step("two", (("-c", ""),)))
    assert statuses(made) == ["passed", "passed"]
    assert "no archive: ValueError: broken" in capsys.readouterr().out
    assert "no summary: ValueError: broken" in (made.output / "summary.md").read_text()


def test_a_step_is_begun_only_where_its_estimate_fits(stay, capsys):
    made = stay(Step("long", (("-c", ""),), estimate=30), Step("short", (("-c", ""),), estimate=1), seconds=20)
    assert statuses(made) == ["not started", "passed"]
    assert "it takes 30" in capsys.readouterr().out


RESUMABLE = """
import sys
from pathlib import Path
path = Path(sys.argv[1])
with path.open("a") as file:
    file.write("line\\n")
sys.exit(0 if path.read_text().count("line") == 3 else 3)
"""


def test_a_resumable_step_runs_on_as_long_as_it_gets_further(stay, tmp_path):
    path = tmp_path / "results" / "bench.jsonl"
    assert statuses(stay(Step("bench one", (("-c", RESUMABLE, str(path)),), resumable=True))) == ["passed"]
    assert path.read_text() == 3 * "line\n"
    stuck = Step("stuck", (("-c", "import sys; sys.exit(3)"),), resumable=True)
    assert statuses(stay(stuck)) == ["cut off"]


def test_no_more_commands_run_at_once_than_are_meant_to(stay, tmp_path):
    spans = tmp_path / "spans"
    code = f"import time; a = time.time(); time.sleep(0.3); open({str(spans)!r}, 'a').write(f'{{a}} {{time.time()}}\\n')"
    assert statuses(stay(Step("many", 5 * (("-c", code),), at_once=2, limit=120))) == ["passed"]
    found = [tuple(map(float, line.split())) for line in spans.read_text().splitlines()]
    assert len(found) == 5
    assert max(sum(begin <= moment < end for begin, end in found) for moment, _ in found) <= 2


def test_logs_of_steps_whose_names_hold_dots_are_kept_apart(stay, tmp_path):
    stay(*(Step(f"suite {case}", (("-c", f"print({case!r})"),)) for case in ("1.identity", "1.projection")))
    logs = tmp_path / "results" / "logs"
    assert [(logs / f"suite-1.{kind}.out").read_text() for kind in ("identity", "projection")] == ["1.identity\n", "1.projection\n"]


def test_missing_programs_variables_and_kept_output(stay, tmp_path):
    skipped = Step("sanitizer", (("-c", ""),), within=("no-such-program",))
    code = "import os, sys; print(os.environ['SOME']); sys.exit(1)"
    within = Step("within", (("-c", code),), accepted=(1,), within=("env",), environment=(("SOME", "5"),), keep=("some.json",))
    assert statuses(stay(skipped, within)) == ["skipped: no-such-program is not installed", "passed"]
    assert (tmp_path / "results" / "some.json").read_text() == "5\n"


def test_results_of_other_sources_are_set_aside(stay, tmp_path):
    output = tmp_path / "results"
    step = Step("one", (counting(output / "measured"),))
    stay(step, source="older sources")
    (output / "cache").mkdir()
    made = stay(step, source="sources")
    assert statuses(made) == ["passed"]
    assert (output / "measured").read_text() == "x"
    assert (output / "earlier-older so" / "measured").read_text() == "x"
    assert (output / "cache").is_dir()


def test_other_options_start_anew(stay):
    stay(Step("one", (("-c", ""),)))
    made = stay(Step("one", (("-c", "pass"),)))
    assert statuses(made) == ["passed"]
    other = State(made.output / "state.json", "sources")
    assert other.status(Step("one", (("-c", "1"),))) == "passed, with other sources or options"


def test_the_archive_is_whole_and_has_all_but_the_cache(tmp_path):
    folder, archive = tmp_path / "results", tmp_path / "all.tar.gz"
    (folder / "logs").mkdir(parents=True)
    (folder / "cache").mkdir()
    (folder / "cache" / "kernel").write_text("not this")
    (folder / "a.jsonl").write_text("{}\n")
    (folder / "logs" / "long.err").write_text("first\n" + (1 << 22) * "x" + "last\n")
    (folder / ".state.json.new").write_text("half")
    steps.pack(folder, archive, leave_out="cache")
    with tarfile.open(archive) as packed:
        assert packed.getnames() == ["results/a.jsonl", "results/logs/long.err"]
        log = packed.extractfile("results/logs/long.err").read()
    assert len(log) < 1.1 * (1 << 20)
    assert log.startswith(b"first\n")
    assert log.endswith(b"last\n")


def test_the_archive_survives_a_cut_while_it_is_written(tmp_path, monkeypatch):
    folder, archive = tmp_path / "results", tmp_path / "all.tar.gz"
    folder.mkdir()
    (folder / "a.jsonl").write_text("{}\n")
    steps.pack(folder, archive, leave_out="cache")
    (folder / "b.jsonl").write_text("{}\n")
    plain = tarfile.TarFile.addfile

    def cut(self, entry, contents):
        plain(self, entry, contents)
        raise KeyboardInterrupt

    monkeypatch.setattr(tarfile.TarFile, "addfile", cut)
    with pytest.raises(KeyboardInterrupt):
        steps.pack(folder, archive, leave_out="cache")
    with tarfile.open(archive) as packed:
        assert packed.getnames() == ["results/a.jsonl"]


def test_a_signal_ends_the_step_and_still_packs(tmp_path):
    """As a machine that is taken away may announce itself."""
    code = f"""
import os, sys, time
from pathlib import Path
from fused_res.benchmarks import gpu
from fused_res.benchmarks.steps import Step
output = Path({str(tmp_path / "results")!r})
output.mkdir()
planned = [Step("first", (("-c", ""),)), Step("second", (("-c", "import time; print(1, flush=True); time.sleep(60)"),))]
gpu.stop_on_signals()
stay = gpu.Stay(output, planned, float("inf"), Path({str(tmp_path / "all.tar.gz")!r}), dict(os.environ), output, "sources")
stay.run_all(planned)
"""
    script = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    log, end = tmp_path / "results" / "logs" / "second.out", time.monotonic() + 90
    while not (log.is_file() and log.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    script.terminate()
    assert script.wait(60) == 128 + signal.SIGTERM
    with tarfile.open(tmp_path / "all.tar.gz") as packed:
        state = json.loads(packed.extractfile("results/state.json").read())["steps"]
        assert "| second | cut off |" in packed.extractfile("results/summary.md").read().decode()
    assert [found["status"] for found in state.values()] == ["passed", "cut off"]
