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


_PASSED = pytest.StashKey[set[str]]()


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_configure_node(node) -> None:
    """Workers leave out the same tests, one that replaces another included: pytest-xdist gives nothing to one that differs."""
    node.workerinput["passed"] = sorted(node.config.stash.get(_PASSED, set()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("outcomes") is None:
        return
    passed = config.stash[_PASSED]
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
    if path is None:
        return
    if hasattr(config, "workerinput"):
        config.stash[_PASSED] = set(config.workerinput["passed"])
        return
    config.stash[_PASSED] = {name for name, found in load(path).items() if found["outcome"] in ("passed", "skipped")}
    config.pluginmanager.register(_Writer(path), "outcomes-writer")  # of many processes, the one that hears of all tests
