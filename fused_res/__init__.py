"""fused_res: whole residual blocks as one PyTorch autograd operator."""

from pathlib import Path

from fused_res.anatomy import Anatomy
from fused_res.chains import Chain, Residual
from fused_res.explain import Explanation, explain
from fused_res.folds import refresh
from fused_res.functional import AvgPool, ConvBN, residual_block
from fused_res.fusing import fuse, unfuse
from fused_res.identity import zero_init_residual
from fused_res.modules import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck
from fused_res.planner import use_backend
from fused_res.tuned import Tuning, tune
from fused_res.version import __version__

# Python started in a source folder imports the package from there, where kernels and benchmarks lie beside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__all__ = [
    "Anatomy",
    "AvgPool",
    "BasicBlock",
    "Bottleneck",
    "Chain",
    "ConvBN",
    "Explanation",
    "PreActBasicBlock",
    "PreActBottleneck",
    "Residual",
    "Tuning",
    "__version__",
    "explain",
    "fuse",
    "refresh",
    "residual_block",
    "tune",
    "unfuse",
    "use_backend",
    "zero_init_residual",
]
