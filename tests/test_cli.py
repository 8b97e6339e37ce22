"""The command line: exit codes, JSON, and what it says where something is missing."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from fused_res import accuracy, check, cli, console, environment
from fused_res.benchmarks import peers, results, suite

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
# conftest.py may have switched this process to Triton's interpreter; a user's has not.
VARIABLES = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ONLY = ["--backend", "reference", "--dtype", "fp32", "--device", "cpu"]


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(check, "SHAPES", check.SHAPES[:1])


def test_info_names_every_backend(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert all(name in text for name in cli.backends.NAMES)


def test_info_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = document["backends"]
    assert {row["backend"] for row in rows} == set(cli.backends.NAMES)
    assert {row["dtype"] for row in rows} == set(environment.DTYPES)
    assert [row["reason"] for row in rows if row["backend"] == "reference"] == [None] * len(environment.DTYPES)


def test_info_needs_no_extra(fresh):
    """Without rich, matplotlib and scikit-learn, as after a plain installation."""
    hide = "import sys; sys.modules.update(rich=None, matplotlib=None, sklearn=None)"
    run = f"{hide}; from fused_res.cli import main; print(main(['info'])); print(main(['bench']), file=sys.stderr)"
    done = fresh.run(run)
    assert done.stdout.endswith("\n0\n"), done.stderr
    assert "pip install 'fused-res[bench]'" in done.stderr
    assert done.stderr.endswith("\n2\n")


@pytest.mark.usefixtures("few_shapes")
def test_check_passes(capsys):
    assert cli.main(["check", *ONLY]) == 0
    assert "All passed" in capsys.readouterr().out


@pytest.mark.usefixtures("few_shapes")
def test_check_json_has_every_quantity(capsys):
    assert cli.main(["check", *ONLY, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    quantities = {row["quantity"] for row in document["rows"]}
    assert {"out", "dx", "dconv1.weight", "dbn2.bias", "bn1.running_var"} <= quantities
    assert {row["mode"] for row in document["rows"]} == {"train", "eval"}
    assert document["passed"]


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("wrong", [1e-5, float("nan")])
def test_check_fails_where_a_result_is_wrong(monkeypatch, capsys, wrong):
    step = accuracy.step

    def spoiled(block, x, dout, dtype, backend, *rest, **more):
        result = step(block, x, dout, dtype, backend, *rest, **more)
        if backend == "reference":
            result.tensors["dbn1.weight"] = result.tensors["dbn1.weight"] * (1 + wrong)
        return result

    monkeypatch.setattr(accuracy, "step", spoiled)
    if wrong == wrong:  # NaN's row is in the document
        assert cli.main(["check", *ONLY]) == 1
        assert "FAIL" in capsys.readouterr().out
    assert cli.main(["check", *ONLY, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert {row["quantity"] for row in document["rows"] if not row["passed"]} == {"dbn1.weight"}


@pytest.mark.usefixtures("few_shapes")
def test_nothing_checked_is_not_a_pass(monkeypatch, capsys):
    monkeypatch.setattr(cli.backends, "supports", lambda name, device, dtype: "not today")
    assert cli.main(["check", *ONLY]) == 1
    text = capsys.readouterr().out
    assert "not run: not today" in text
    assert "Nothing could run" in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["check", "--dtype", "int8"],
        ["check", "--seeds", "0"],
        ["check", "--device", "cuda:99"],
        ["check", "--device", "moon"],
        ["bench", "--suite", "all"],
        ["bench", "--batch", "-1"],
    ],
    ids=" ".join,
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "error" in capsys.readouterr().err


def test_unknown_peer(capsys):
    assert cli.main(["bench", "--peers", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err


@pytest.fixture
def small_suite(monkeypatch):
    from fused_res.benchmarks import ceiling
    from fused_res.benchmarks.cases import Case

    monkeypatch.setitem(ceiling.BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(ceiling.SIDE, "cpu", 64)
    monkeypatch.setitem(suite.SUITES, "resnet18", (Case("small.identity", "basic", 8, 8, 6),))
    return ["bench", "--suite", "resnet18", "--device", "cpu", "--batch", "2", "--rounds", "5", "--mode", "forward"]


def test_bench_writes_result_and_plot_and_resumes(small_suite, tmp_path, capsys):
    arguments = [*small_suite, "--output", str(tmp_path), "--peers", "eager channels_last", "bare convolutions", "fused_res"]
    assert cli.main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    written = tmp_path / "resnet18-forward-fp32.jsonl"
    assert results.load(written)["rows"] == document["rows"]
    assert [row["peer"] for row in document["sums"]] == ["fused_res"]
    assert written.with_suffix(".png").stat().st_size > 10_000
    assert str(tmp_path) not in written.read_text()
    assert cli.main([*arguments, "--resume"]) == 0
    assert results.load(written)["rows"] == document["rows"]
    assert "fused_res" in capsys.readouterr().out
    written.write_text(written.read_text().replace('"source": "', '"source": "0'))
    assert cli.main([*arguments, "--resume"]) == 2
    assert "source differ" in capsys.readouterr().err


def test_results_go_to_a_folder_of_the_current_one_that_git_ignores(small_suite, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*small_suite, "--peers", "eager channels_last", "bare convolutions", "fused_res"]) == 0
    names = [f"fused-res-results/cpu/resnet18-forward-fp32.{ending}" for ending in ("jsonl", "png")]
    assert all((tmp_path / name).is_file() for name in names)
    assert capsys.readouterr().out.endswith(f"written: {', '.join(names)}\n")
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"fused-res-results/", ".venv/", "build/"} <= set(ignored)


def test_bench_fails_loudly_on_wrong_results(small_suite, tmp_path, monkeypatch, capsys):
    def wrong(setup):
        module = setup.module("channels_last")
        return peers.block_peer(setup, module, "channels_last", lambda x: 2 * module(x))

    monkeypatch.setitem(peers.REGISTRY, "fused_res", peers.REGISTRY["fused_res"]._replace(make=wrong))
    assert cli.main([*small_suite, "--output", str(tmp_path), "--peers", "eager channels_last", "fused_res"]) == 1
    captured = capsys.readouterr()
    assert "FAILED: small.identity, batch 2: fused_res differs from eager channels_last" in captured.err
    assert "fused_res not run anywhere: differs from eager" in " ".join(captured.out.split())


HEAD = ("one", "two", "three")
ROWS = [("a", "b" * 20, "c" * 10), ("a", "d", "e f " * 10), ("g", "", "h")]


@pytest.mark.parametrize(("columns", "shared"), [(100, 2), (60, 1), (50, 2), (50, 0), (30, 2)])
def test_tables_fit_the_terminal(columns, shared, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = console.table(HEAD, ROWS, shared=shared)
    assert max(map(len, text.splitlines())) <= columns
    shown = Counter(text.replace(",", "").split())
    assert all(word in shown for row in ROWS for cell in row for word in cell.split())
    assert (shown["e"], shown["f"]) == (10, 10)


def test_columns_that_rows_share_stand_above_them(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert console.table(HEAD, [("a", "b", "c" * 14), ("a", "d", "e"), ("f", "g", "h")], shared=1).splitlines() == [
        "two  three",
        "---  --------------",
        "",
        "a",
        "b    cccccccccccccc",
        "d    e",
        "",
        "f",
        "g    h",
    ]
    monkeypatch.setenv("COLUMNS", "200")
    assert console.table(HEAD, ROWS, shared=1) == console.table(HEAD, ROWS)


@pytest.mark.usefixtures("few_shapes")
def test_commands_fit_80_columns(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    check = ["check", *ONLY, "--seeds", "1"]
    for arguments in (["info"], check, [*check, "--all"], ["bench", "model"]):
        cli.main(arguments)
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80, arguments


def test_missing_module_of_an_installed_package_is_not_hidden():
    with pytest.raises(ModuleNotFoundError, match=r"json\.nothing"):
        console.require("json.nothing")


def test_package_runs_as_a_module():
    command = [sys.executable, "-m", "fused_res", "info", "--json"]
    done = subprocess.run(command, env=VARIABLES, cwd=ROOT / "tests", capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["versions"]["torch"] == torch.__version__
