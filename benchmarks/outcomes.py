"""A pytest plugin for tests that may be cut off: every outcome is written down as soon as it is known, a JSON line each.

`-p fused_res.benchmarks.outcomes --outcomes FILE`. Tests that passed in the run that FILE is of are left out; the others come in an
order that mixes files, so that whatever time allows says something about all of them.
"""

import hashlib
import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="write every outcome there; leave out what passed by it")


def load(path: Path) -> dict[str, dict]:
    """The last outcome of every test in a file: `outcome` (passed, failed or skipped), `seconds`, and `message` where it failed."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {line.pop("test"): line for line in lines}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("outcomes")
    if path is None:
        return
    passed = {name for name, found in load(path).items() if found["outcome"] in ("passed", "skipped")}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    kept = [item for item in items if item.nodeid not in passed]
    items[:] = sorted(kept, key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            line["message"] = "\n".join(str(report.longrepr).splitlines()[-12:])
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("outcomes")
    if path is not None and not hasattr(config, "workerinput"):  # of many processes, the one that hears of all tests
        config.pluginmanager.register(_Writer(path), "outcomes-writer")
