"""The package as installed: what it exports, what it needs, and that its parts are named alike."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fused_res
from fused_res import backends
from fused_res.backends import triton
from fused_res.cost import recorded

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAYS = triton.pays  # conftest.py replaces it in every test by one that says yes
STEMS = ["bn_stats", "bn_finalize", "bn_act", "bn_act_backward", "conv_fprop", "conv_dgrad", "conv_wgrad", "masked_add"]


def test_public_names_exist_and_are_documented():
    for name in fused_res.__all__:
        assert getattr(fused_res, name).__doc__, name


def test_folders_are_installed_inside_the_package_only(fresh):
    done = fresh.run(
        "import importlib.util as u, fused_res.kernels, fused_res.benchmarks;"
        "assert u.find_spec('kernels') is None and u.find_spec('benchmarks') is None"
    )
    assert done.returncode == 0, done.stderr


def test_importing_loads_neither_triton_nor_the_benchmark(fresh):
    done = fresh.run("import sys, fused_res; print([m for m in sys.modules if m in ('triton', 'matplotlib', 'sklearn', 'rich')])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_without_triton_blocks_run_and_its_backend_says_why(fresh):
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] == "triton" else find_spec(name, package)
sys.meta_path.insert(0, Absent())
import torch, fused_res
block, x = fused_res.BasicBlock(4, 4), torch.randn(2, 4, 3, 3)
block(x).sum().backward()
try:
    with fused_res.use_backend("triton"):
        block(x)
except RuntimeError as error:
    print(error)
"""
    done = fresh.run(code)
    assert "the package triton is not installed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("stem", STEMS)
def test_one_stem_names_one_thing_everywhere(stem):
    for path in (f"fused_res/primitives/{stem}.py", f"kernels/{stem}.py", f"tests/test_{stem}.py"):
        assert (ROOT / path).is_file(), path


def test_every_backend_answers_the_same_questions():
    assert {"native", "reference", "triton"} <= set(backends.NAMES)
    for name in backends.NAMES:
        module = backends.load(name)
        assert all(callable(getattr(module, f)) for f in ("supports", "preference", "level", "find")), name


def test_readme_examples_run(torchvision_resnet):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for code in blocks:
        exec(code, namespace)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_figures_match_their_result_files(document, monkeypatch):
    from fused_res.benchmarks.readme import main

    monkeypatch.setattr(triton, "pays", PAYS)  # models tell who runs what by the rule
    recorded.clear()
    assert main(["--check", str(document)]) == 0


def test_figures_of_a_machine_come_from_one_commit():
    """Of different commits, tables would contradict each other."""
    from fused_res.benchmarks import readme, results

    files = {file.resolve() for document in DOCUMENTS for file in readme.shown(document.read_text(), document.parent)}
    commits: dict[Path, set[str]] = {}
    for file in files:
        git = results.load(file)["git"]
        assert git["dirty"] is False, file
        commits.setdefault(file.parent, set()).add(git["commit"])
    assert RESULTS / "cpu" in commits
    assert all(len(found) == 1 for found in commits.values()), commits
    assert set((RESULTS / "cpu").glob("*.jsonl")) <= files, "a result file that no document shows"


def test_links_between_documents_lead_somewhere():
    for document in DOCUMENTS:
        text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            found = (document.parent / path).resolve() if path else document
            assert found.exists(), (document.name, target)
            if anchor:
                heads = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, (document.name, target)


def test_files_that_documents_name_are_there():
    named = re.compile(r"`((?:fused_res|kernels|csrc|tests|benchmarks|examples|docs)/[\w./-]+\.(?:py|md|csv|h|cpp|cu|cuh))`")
    missing = {
        (document.name, path)
        for document in DOCUMENTS
        for path in named.findall(document.read_text())
        if not (ROOT / path).exists()
    }
    assert not missing


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_benchmark_installs_no_more_than_it_needs(tmp_path):
    def planned(target):
        command = ["make", "--dry-run", target, f"VENV={tmp_path / 'none'}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    bench, tests = planned("bench"), planned("test")
    assert '--editable ".[bench]"' in bench
    assert "[dev]" not in bench
    assert tests.index('--editable ".[bench]"') < tests.index('"fused-res[dev]"') < tests.index("--numprocesses")


def test_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
