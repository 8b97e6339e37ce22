"""The tables of docs/kernels.md: written from rows, read back, and noticed when they have not the kernels that there are."""

from types import SimpleNamespace

import pytest

from fused_res import aot_table

DOCUMENT = """# Kernels

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
]


def test_one_line_for_each_kernel_variant_and_dtype():
    assert aot_table.section(ROWS, (80, 90)).splitlines() == [
        "| kernel | variant | dtype | sm_80 | sm_90 |",
        "| --- | --- | --- | --- | --- |",
        "| first | a, b 1x2 | bfloat16 | 96, 48, mma | 96, 48, wgmma |",
        "| first_sum | 1x2 | bfloat16 | 96, 0.5 | 96, 48, 8 B local |",
    ]


def test_only_the_given_sections_are_rewritten():
    text = aot_table.rewritten(DOCUMENT, {"first": aot_table.section(ROWS, (80, 90))})
    assert "what was there" not in text
    assert text.startswith("# Kernels\n\n<!-- kernels:begin first -->\n\n| kernel")
    assert text.endswith(DOCUMENT[DOCUMENT.index("between") :])
    assert aot_table.documented(text) == {("first", "first", "a, b 1x2", "bfloat16"), ("first", "first_sum", "1x2", "bfloat16")}
    assert aot_table.rewritten(text, {"first": aot_table.section(ROWS, (80, 90))}) == text


def test_refuses_a_file_without_a_section():
    with pytest.raises(ValueError, match="expected <!-- kernels:begin third --> and <!-- kernels:end -->"):
        aot_table.rewritten(DOCUMENT, {"third": ""})
