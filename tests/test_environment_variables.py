"""docs/environment.md names every variable that the sources read, and no other."""

import re
from pathlib import Path

import pytest

from fused_res import settings

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs/environment.md").read_text()
READS = re.compile(r"""(?:environ(?:\.get\(|\[)|getenv\(|_one_of\()\s*["'](FUSED_RES_\w+)["']""")


def sources():
    for folder in ("fused_res", "kernels", "benchmarks", "csrc"):
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"))
    yield ROOT / "setup.py"


def read_by(paths):
    return {name for path in paths for name in READS.findall(path.read_text())}


def documented(heading):
    _, section = DOCUMENT.split(heading)
    return set(re.findall(r"^\| `(FUSED_RES_\w+)` \|", section.split("\n\n")[1], re.MULTILINE))


def test_what_a_running_program_reads_is_documented_and_the_other_way_round():
    found = read_by(path for path in sources() if path.name != "setup.py")
    assert found == documented("Read by a running program")
    assert {"FUSED_RES_NATIVE", "FUSED_RES_CPU_CAPABILITY", "FUSED_RES_CONVOLUTIONS"} <= found


def test_what_the_build_reads_is_documented_and_the_other_way_round():
    assert read_by([ROOT / "setup.py"]) == documented("Read when the package is built")


def test_no_source_reads_a_variable_in_a_way_that_these_tests_miss():
    """A name in quotes is read by one of the ways above, or stands in a message."""
    named = {name for path in sources() for name in re.findall(r"""["'](FUSED_RES_\w+)["']""", path.read_text())}
    assert named == read_by(sources())


def test_the_values_documented_are_those_that_are_taken():
    lines = dict(re.findall(r"^\| `(FUSED_RES_\w+)` \| ([^|]*) \|", DOCUMENT.split("Read when")[0], re.MULTILINE))
    taken = re.findall(r'_one_of\("(FUSED_RES_\w+)", \(([^)]*)\), "(\w+)"\)', (ROOT / "fused_res/settings.py").read_text())
    assert len(taken) >= 2
    for name, values, default in taken:
        assert re.findall(r"`(\w+)`", lines[name]) == re.findall(r'"(\w+)"', values), name
        assert re.findall(r"`(\w+)`", lines[name])[0] == default, name


def test_values_that_mean_nothing_are_refused(monkeypatch):
    monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", "mine")
    with pytest.raises(ValueError, match="FUSED_RES_CONVOLUTIONS: expected one of auto, library, own, got 'mine'"):
        settings.convolutions()
