"""A pytest plugin for tests that may be cut off: every outcome is written down as soon as it is known, a JSON line each.

`-p fused_res.benchmarks.outcomes --outcomes FILE`. Tests that passed by FILE are left out; those that failed come last, and the
others in an order that mixes files, so that whatever time allows says something about all of them.
"""

import hashlib
import json
from pathlib import Path

import pytest

from fused_res.benchmarks import lines

_BEFORE = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="write every outcome there; leave out what passed by it")


def load(path: Path) -> dict[str, dict]:
    """The last outcome of every test in a file: `outcome` (passed, failed or skipped), `seconds`, and `message` where it failed."""
    return {line.pop("test"): line for line in lines.read(path)}


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("outcomes")
    if path is None:
        return
    # All processes must leave out the same tests, also one that takes a crashed one's place when more have passed.
    workers = getattr(config, "workerinput", None)
    if workers is not None:
        config.stash[_BEFORE] = workers["outcomes"]
        return
    lines.mend(path)
    config.stash[_BEFORE] = {name: found["outcome"] for name, found in load(path).items()}
    config.pluginmanager.register(_Writer(path), "outcomes-writer")
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_Workers(config.stash[_BEFORE]), "outcomes-workers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    before = config.stash.get(_BEFORE, None)
    if before is None:
        return
    kept = [item for item in items if before.get(item.nodeid) not in ("passed", "skipped")]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = sorted(kept, key=lambda item: (item.nodeid in before, hashlib.sha256(item.nodeid.encode()).digest()))


class _Workers:
    def __init__(self, before: dict[str, str]) -> None:
        self.before = before

    def pytest_configure_node(self, node: object) -> None:
        node.workerinput["outcomes"] = self.before


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

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """No test left to run is a success where all have passed before."""
        found = load(self.path).values()
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and found and all(line["outcome"] != "failed" for line in found):
            session.exitstatus = pytest.ExitCode.OK
