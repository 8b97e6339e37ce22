"""A kernel that breaks the process's CUDA context costs the test that launched it, and no other.

After an illegal access, every further call to CUDA fails in that process. A worker of pytest-xdist then ends, within the test,
which is reported as the one that crashed it, and another takes its place; without workers, the run stops.
"""

import os
import sys

import pytest


def breakage() -> str | None:
    """Why the process can no longer use its GPU; None if it can, or has not begun to."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    reason = breakage()
    if reason is None:
        return
    message = f"{item.nodeid} leaves a CUDA context that is broken: {reason}"
    if not hasattr(item.config, "workerinput"):
        pytest.exit(message, returncode=pytest.ExitCode.INTERNAL_ERROR)
    capture = item.config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    print(message, file=sys.__stderr__, flush=True)
    os._exit(1)
