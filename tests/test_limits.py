"""docs/limits.md: every line names tests that show it, and those tests are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = [line for line in (ROOT / "docs" / "limits.md").read_text().splitlines() if line.startswith("| ")]
ROWS = [line for line in LINES if not line.startswith(("| what |", "| --- "))]


def _tests(file):
    return {node.name for node in ast.parse((ROOT / "tests" / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_there_are_lines_and_readme_links_to_them():
    assert len(ROWS) > 20
    assert "docs/limits.md" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:50])
def test_the_tests_that_a_line_names_are_there(row):
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", row.split("|")[-2])
    assert named
    for file, name in named:
        assert name in _tests(file), f"{file} has no {name}"
