"""Has torchvision import where its compiled operators cannot be loaded: a build for CUDA beside a CPU torch."""

import importlib.util
from pathlib import Path

import torch

_placeholders = []  # kept alive


def load():
    """Load them, or define the two that its import asks for. Its models need none."""
    package = importlib.util.find_spec("torchvision").submodule_search_locations[0]
    for path in Path(package).glob("_C*.so"):
        try:
            torch.ops.load_library(path)
        except OSError:
            continue
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _placeholders.append(library)
