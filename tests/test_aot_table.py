"""The tables of docs/kernels.md: written from rows, read back, and noticed when they have not the kernels that there are."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from fused_res import aot_table

ROOT = Path(__file__).parents[1]
DOCUMENT = """# Kernels

<!-- kernels:begin worst -->
<!-- kernels:end -->
<!-- kernels:begin first -->
what was there
<!-- kernels:end -->
between
<!-- kernels:begin second -->
<!-- kernels:end -->
"""


def row(kernel, variant, dtype, arch, **fields):
    known = {"registers": 96, "local": 0, "shared": 49152, "matrix": "wgmma"}
    return SimpleNamespace(kernel=kernel, variant=variant, dtype=dtype, arch=arch, **(known | fields))


ROWS = [
    row("first", "a, b 1x2", "bfloat16", 80, matrix="mma"),
    row("first", "a, b 1x2", "bfloat16", 90),
    row("first_sum", "1x2", "bfloat16", 80, matrix="", shared=512),
    row("first_sum", "1x2", "bfloat16", 90, matrix="", local=8),
    row("first", "1x1", "bfloat16", 80, matrix="mma", registers=255, shared=0),
    row("first", "1x1", "bfloat16", 90, matrix="mma+wgmma", local=16),
    row("first_sum", "1x1", "bfloat16", 80, matrix="mma", shared=0),
    row("first_sum", "1x1", "bfloat16", 90, matrix="", registers=100, local=0),
]


def test_one_line_for_each_kernel_variant_and_dtype():
    assert aot_table.section(ROWS).splitlines() == [
        "<details><summary>4 variants</summary>",
        "",
        "| kernel | variant | dtype | sm_80 | sm_90 |",
        "| --- | --- | --- | --- | --- |",
        "| first | a, b 1x2 | bfloat16 | 96, 48, mma | 96, 48, wgmma |",
        "| first_sum | 1x2 | bfloat16 | 96, 0.5 | 96, 48, 8 B local |",
        "| first | 1x1 | bfloat16 | 255, 0, mma | 96, 48, mma+wgmma, 16 B local |",
        "| first_sum | 1x1 | bfloat16 | 96, 0, mma | 100, 48 |",
        "",
        "</details>",
    ]


def test_only_the_given_sections_are_rewritten():
    text = aot_table.rewritten(DOCUMENT, {"first": aot_table.section(ROWS)})
    assert "what was there" not in text
    assert text.endswith(DOCUMENT[DOCUMENT.index("between") :])
    assert aot_table.files(text) == ["first", "second"]
    names = ("first", "a, b 1x2"), ("first", "1x1"), ("first_sum", "1x2"), ("first_sum", "1x1")
    assert aot_table.documented(text) == {("first", *name, "bfloat16") for name in names}
    assert aot_table.rewritten(text, {"first": aot_table.section(ROWS)}) == text


def test_the_worst_case_of_each_kernel_comes_from_the_other_tables():
    text = aot_table.rewritten(DOCUMENT, {"first": aot_table.section(ROWS[:2]), "second": aot_table.section(ROWS[2:])})
    assert text[: text.index("<!-- kernels:begin first")].splitlines()[3:] == [
        "",
        "| kernel | variants | sm_80 | sm_90 |",
        "| --- | --- | --- | --- |",
        "| first | 2 | 255, 48, mma | 96, 48, mma+wgmma or wgmma, 16 B local |",
        "| first_sum | 2 | 96, 0.5, mma or none | 100, 48, 8 B local |",
        "",
        "<!-- kernels:end -->",
    ]


def test_refuses_a_file_without_a_section():
    with pytest.raises(ValueError, match="expected <!-- kernels:begin third --> and <!-- kernels:end -->"):
        aot_table.rewritten(DOCUMENT, {"third": ""})


def test_the_document_has_a_section_for_every_file_of_kernels():
    text = (ROOT / "docs" / "kernels.md").read_text()
    files = aot_table.files(text)
    assert len(files) == len(set(files))
    kernels = {path.stem for path in (ROOT / "kernels").glob("*.py") if "def aot_variants" in path.read_text()}
    assert set(files) == kernels
    assert aot_table.rewritten(text, {}) == text


def test_a_profile_tells_kernels_apart():
    """No two files have kernels of one name: each is called after its file."""
    lines = aot_table.documented((ROOT / "docs" / "kernels.md").read_text())
    kernels = {(kernel, file) for file, kernel, _, _ in lines}
    assert len(dict(kernels)) == len(kernels) > 15
    assert all(kernel == file or kernel.startswith(f"{file}_") for kernel, file in kernels)
