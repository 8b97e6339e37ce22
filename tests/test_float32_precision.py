"""Which precision the kernels and the choice of a convolution see, however torch was told: by its old switch or by its new one."""

import pytest
import torch

from fused_res.primitives.choice import switches

GPU = torch.device("cuda")


@pytest.fixture
def cudnn():
    """Its switches, put back by the old one: that sets all, where the new ones leave it at odds with them."""
    library = torch.backends.cudnn
    before = library.allow_tf32
    yield library
    library.allow_tf32 = before


def kernels():
    """The precision of products on a GPU; a tensor without data stands for one there."""
    tiling = pytest.importorskip("fused_res.kernels.tiling")
    return tiling.dot_precision(torch.empty(1, device="meta"))


def test_the_old_switch(cudnn):
    for allowed, precision in ((True, "tf32"), (False, "ieee")):
        cudnn.allow_tf32 = allowed
        assert kernels() == precision
        assert (switches(GPU)[0] == "tf32") == allowed
    with cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
        assert kernels() == "tf32"
    assert kernels() == "ieee"


def test_the_new_switch(cudnn):
    for precision in ("ieee", "tf32"):
        cudnn.conv.fp32_precision = precision
        assert kernels() == switches(GPU)[0] == precision


def test_the_new_switch_after_the_old_one(cudnn):
    """After both, torch refuses to read its old switch: nothing here may."""
    cudnn.allow_tf32 = False
    cudnn.conv.fp32_precision = "tf32"
    assert kernels() == switches(GPU)[0] == "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        _ = cudnn.allow_tf32
