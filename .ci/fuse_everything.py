"""A pytest plugin for other people's tests: every model that timm or torchvision makes is fused before they see it.

`pytest -p fuse_everything`, with this folder on PYTHONPATH. It counts the blocks that it has fused, and those that were left alone.
"""

import functools
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import fused_res
import torchvision_operators
from fused_res.fusing import Fused, find

_counts: Counter[str] = Counter()


def _fusing(make):
    @functools.wraps(make)
    def made(*args, **kwargs):
        model = make(*args, **kwargs)
        if isinstance(model, torch.nn.Module):
            fused_res.fuse(model)
            for module in model.modules():
                if isinstance(module, Fused):
                    _counts["fused"] += 1
                elif find(module)[1] is not None:
                    _counts["left alone"] += 1
        return model

    return made


def pytest_configure():
    warnings.filterwarnings("ignore", message="fused_res")
    torchvision_operators.load()
    import timm
    import torchvision.models._api

    for module in (timm, timm.models, timm.models._factory):
        module.create_model = _fusing(module.create_model)
    for name, make in torchvision.models._api.BUILTIN_MODELS.items():
        torchvision.models._api.BUILTIN_MODELS[name] = _fusing(make)


def pytest_terminal_summary(terminalreporter):
    if _counts:  # with pytest-xdist they are those of other processes
        terminalreporter.write_line(f"fused_res: {_counts['fused']} blocks fused, {_counts['left alone']} left alone")
