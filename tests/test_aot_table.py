"""What the compiler made of the kernels: written as data and read back, and summed up in a page."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from fused_res import aot_table

ROOT = Path(__file__).parents[1]
PAGE = """# Kernels

<!-- kernels:begin worst -->
what was there
<!-- kernels:end -->
after
"""


def row(kernel, variant, dtype, arch, **fields):
    known = {"registers": 96, "local": 0, "shared": 49152, "matrix": "wgmma"}
    return SimpleNamespace(kernel=kernel, variant=variant, dtype=dtype, arch=arch, **(known | fields))


ROWS = [
    row("first", "a, b 1x2", "bfloat16", 80, matrix="mma"),
    row("first_sum", "1x2", "bfloat16", 80, matrix="", shared=512),
    row("first", "1x1", "bfloat16", 80, matrix="mma", registers=255, shared=0),
    row("first_sum", "1x1", "bfloat16", 80, matrix="mma", shared=0),
    row("first", "a, b 1x2", "bfloat16", 100, shared=82960),
    row("first", "a, b 1x2", "bfloat16", 90),
    row("first_sum", "1x2", "bfloat16", 90, matrix="", local=8),
    row("first", "1x1", "bfloat16", 90, matrix="mma+wgmma", local=16),
    row("first_sum", "1x1", "bfloat16", 90, matrix="", registers=100, local=0),
]


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "kernels.md"
    path.write_text(PAGE)
    return path


def test_a_line_for_each_variant_and_architecture(page):
    aot_table.update(page, {"first": ROWS})
    assert aot_table.data(page).read_text().splitlines() == [
        "file,kernel,variant,dtype,arch,registers,shared_kib,matrix,local",
        'first,first,"a, b 1x2",bfloat16,80,96,48,mma,0',
        'first,first,"a, b 1x2",bfloat16,90,96,48,wgmma,0',
        'first,first,"a, b 1x2",bfloat16,100,96,81.0156,wgmma,0',
        "first,first_sum,1x2,bfloat16,80,96,0.5,,0",
        "first,first_sum,1x2,bfloat16,90,96,48,,8",
        "first,first,1x1,bfloat16,80,255,0,mma,0",
        "first,first,1x1,bfloat16,90,96,48,mma+wgmma,16",
        "first,first_sum,1x1,bfloat16,80,96,0,mma,0",
        "first,first_sum,1x1,bfloat16,90,100,48,,0",
    ]
    names = ("first", "a, b 1x2"), ("first", "1x1"), ("first_sum", "1x2"), ("first_sum", "1x1")
    lines = aot_table.read(aot_table.data(page))
    assert aot_table.documented(lines) == {("first", *name, "bfloat16") for name in names}


def test_only_the_files_and_architectures_that_were_compiled_are_replaced(page):
    aot_table.update(page, {"second": [row("second", "1x1", "float32", 90)], "first": ROWS})
    before = aot_table.read(aot_table.data(page))
    assert [line.file for line in before] == ["first"] * len(ROWS) + ["second"]
    aot_table.update(page, {"first": [row("first", "9x9", "float16", 80, registers=7), row("first", "1x1", "bfloat16", 80)]})
    after = aot_table.read(aot_table.data(page))
    assert after[0] == ("first", "first", "9x9", "float16", 80, 7, 48.0, "wgmma", 0)
    assert [(line.variant, line.arch) for line in after[1:3]] == [("1x1", 80), ("1x1", 90)]
    assert set(after[2:]) == {line for line in before if line.arch != 80}
    aot_table.update(page, {"first": [row("first", "1x1", "bfloat16", arch) for arch in (80, 90, 100)]})
    assert [(line.file, line.arch) for line in aot_table.read(aot_table.data(page))] == [
        ("first", 80),
        ("first", 90),
        ("first", 100),
        ("second", 90),
    ]


def test_the_worst_case_of_each_kernel_stands_in_the_page(page):
    aot_table.update(page, {"first": ROWS})
    assert page.read_text().splitlines() == [
        "# Kernels",
        "",
        "<!-- kernels:begin worst -->",
        "",
        "| kernel | variants | sm_80 | sm_90 | sm_100 |",
        "| --- | --- | --- | --- | --- |",
        "| first | 2 | 255, 48, mma | 96, 48, mma+wgmma or wgmma, 16 B local | 96, 81.02, wgmma |",
        "| first_sum | 2 | 96, 0.5, mma or none | 100, 48, 8 B local |  |",
        "",
        "<!-- kernels:end -->",
        "after",
    ]
    lines = aot_table.read(aot_table.data(page))
    assert aot_table.rewritten(page.read_text(), lines) == page.read_text()


def test_refuses_a_page_without_a_place_and_other_columns(page):
    page.write_text("# Kernels\n")
    with pytest.raises(ValueError, match="expected one pair of <!-- kernels:begin worst -->"):
        aot_table.update(page, {"first": ROWS})
    assert not aot_table.data(page).exists()
    aot_table.data(page).write_text("kernel,registers\n")
    with pytest.raises(ValueError, match=r"kernels\.csv: expected the columns file,kernel,.*, got kernel,registers"):
        aot_table.read(aot_table.data(page))


def test_the_data_has_every_file_of_kernels_and_the_page_its_worst_cases():
    page = ROOT / "docs" / "kernels.md"
    lines = aot_table.read(aot_table.data(page))
    kernels = {path.stem for path in (ROOT / "kernels").glob("*.py") if "def aot_variants" in path.read_text()}
    assert {line.file for line in lines} == kernels
    assert len(set(lines)) == len({line[:5] for line in lines}) == len(lines)
    assert aot_table.rewritten(page.read_text(), lines) == page.read_text()


def test_a_profile_tells_kernels_apart():
    """No two files have kernels of one name: each is called after its file."""
    lines = aot_table.documented(aot_table.read(ROOT / "docs" / "kernels.csv"))
    kernels = {(kernel, file) for file, kernel, _, _ in lines}
    assert len(dict(kernels)) == len(kernels) > 15
    assert all(kernel == file or kernel.startswith(f"{file}_") for kernel, file in kernels)
