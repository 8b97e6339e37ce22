"""What tests of tuning share: a backend of plain formulas with planted faults, planted timings, and a cache that is empty."""

import pytest
import torch

from fused_res import backends, explain, plans
from fused_res.geometry import Geometry, numbers_of
from fused_res.primitives.conv_dgrad import conv_dgrad
from fused_res.primitives.conv_fprop import conv_fprop
from fused_res.primitives.conv_wgrad import conv_wgrad
from fused_res.primitives.run import PLAIN
from fused_res.tuning import files, tuner

CPU = torch.device("cpu")


@pytest.fixture
def nothing_known(monkeypatch, tmp_path):
    monkeypatch.setattr(tuner, "_known", {})
    monkeypatch.setattr(files, "_warned", set())
    monkeypatch.setenv("FUSED_RES_CACHE", str(tmp_path / "cache"))
    with plans.afresh():
        yield


class Planted:
    """A backend of plain formulas with convolutions of its own in two tiles, each of which may be made wrong, or crash."""

    def __init__(self):
        self.calls, self.spoil = [], {}

    def supports(self, device, dtype):
        return None

    def preference(self, device):
        return 9

    def level(self, device, dtype, geometry):
        return "bn_act"

    def tiles(self, primitive, weight, pixels, operands):
        return [(16, 4), (32, 4)]

    def tile(self, pixels, warps):
        return pixels, warps

    def find(self, primitive, device):
        return getattr(self, primitive, None)

    def conv_fprop(self, x, unit, statistics, output, *, config=None):
        return self.spoilt(config, conv_fprop(x, unit, statistics=statistics, output=output, run=PLAIN))

    def conv_dgrad(self, dy, like, unit, inner, add, *, config=None):
        return self.spoilt(config, conv_dgrad(dy, like, unit, inner=inner, add=add, run=PLAIN))

    def conv_wgrad(self, dy, x, unit, *, config=None):
        return self.spoilt(config, conv_wgrad(dy, x, unit, run=PLAIN))

    def spoilt(self, config, found):
        self.calls.append(config)
        spoil = self.spoil.get(config)
        if spoil == "crash":
            raise RuntimeError("no such instruction")
        if spoil == "deaf":
            image = found if isinstance(found, torch.Tensor) else found.image
            image.nan_to_num_(0, 0, 0)
        if spoil == "wrong":
            image = found if isinstance(found, torch.Tensor) else found.image
            image[0, 0, 0, 0] += image.norm() / 100
        return found


@pytest.fixture
def planted(monkeypatch):
    backend, load = Planted(), backends.load
    monkeypatch.setattr(backends, "load", lambda name: backend if name == "planted" else load(name))
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "planted"))
    return backend


class Timings:
    """Planted timings: by the name of a candidate, of two that run together the sum, 1 for the rest; notes what was asked."""

    def __init__(self, **seconds):
        self.seconds, self.asked = seconds, []

    def __call__(self, runs, device, queued):
        self.asked.append(list(runs))
        for run in runs.values():
            run(0)
            run(1)
        return {name: sum(self.seconds.get(part, 1.0) for part in name.split(" + ")) for name in runs}


@pytest.fixture
def timings(monkeypatch):
    monkeypatch.setenv("FUSED_RES_TUNE", "1")

    def install(**seconds):
        found = Timings(**seconds)
        monkeypatch.setattr(tuner, "measure", found)
        return found

    return install


def geometry_of(block, x):
    return Geometry.from_numbers(numbers_of(x, block.parts()))


def level_of(block, x):
    return explain(block, x).rows[0].level


def own_tiles(planted):
    """The tiles that the planted backend's kernels ran with since the last time, "-" for none of them."""
    found, planted.calls = planted.calls, []
    return set(found) or "-"
