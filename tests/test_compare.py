"""What tests share: assertions that say what is wrong, and no test file that imports another."""

import ast
from pathlib import Path

import pytest
import torch
from compare import all_same, every, same, within

NAN = float("nan")


def test_the_first_wrong_element_is_named():
    got, expected = torch.zeros(2, 3), torch.zeros(2, 3)
    got[1, 0], got[1, 2] = 0.5, 2.0
    text = r"y: at \(1, 0\) got 0\.5, expected 0\.0, difference 0\.5; 2 of 6 elements are wrong, shape \(2, 3\), torch\.float32"
    with pytest.raises(AssertionError, match=text):
        same(got, expected, "y")
    within(got, expected, 2.0)
    with pytest.raises(AssertionError, match=r"at \(1, 2\) got 2\.0, expected 0\.0, difference 2, limit 1"):
        within(got, expected, 1.0)
    with pytest.raises(AssertionError, match=r"fails at \(1, 0\), 2 of 6"):
        every(got == 0)
    with pytest.raises(AssertionError, match=r"sums\[1\]: at \(1, 0\)"):
        all_same([got, got], [got, expected], "sums")


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (torch.zeros(3), r"got shape torch\.Size\(\[2\]\)"),
        (torch.zeros(2, dtype=torch.float64), r"got dtype torch\.float32, expected torch\.float64"),
    ],
)
def test_another_shape_or_dtype_is_not_the_same(other, text):
    with pytest.raises(AssertionError, match=text):
        same(torch.zeros(2), other)


def test_nan_equals_nothing_unless_it_may():
    got, inf = torch.tensor([1.0, NAN]), torch.tensor([1.0, float("inf")])
    same(got, got.clone(), nan=True)
    within(got, got.clone(), 0.0, special=True)
    within(inf, inf.clone(), 0.0, special=True)
    for attempt in (lambda: same(got, got.clone()), lambda: within(got, got.clone(), 9.0), lambda: within(inf, inf.clone(), 9.0)):
        with pytest.raises(AssertionError, match=r"at \(1,\)"):
            attempt()
    with pytest.raises(AssertionError, match=r"at \(1,\)"):
        within(got, inf, 9.0, special=True)


def test_no_test_file_imports_another():
    """What they share is in files of its own: an import would run the other's skips, and break when it is renamed."""
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0].startswith("test_")], f"{path.name}: {names}"
