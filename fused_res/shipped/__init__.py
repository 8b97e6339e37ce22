"""Plans that come with the package: the levels that were measured to be the fastest, one JSON file for each GPU.

`python -m fused_res.benchmarks.shipping` writes them from the result files of `make gpu`. A plan holds for the GPU's name, the
versions of what its kernels are made with, the dtype, and a block with its images: for any other the rules decide.

    {"format": 1, "gpu": "NVIDIA H200", "versions": {"fused_res": "0.1", "triton": "3.6", "cudnn": 9}, "source": {...},
     "plans": [{"dtype": "bfloat16", "block": [...], "level": "moment", "ms": {"bn_act": 3.0, "moment": 2.6}}, ...]}
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

FORMAT = 1
FOLDER = Path(__file__).parent


def matters(versions: Mapping) -> dict:
    """What a plan is kept for, of the versions of a result file or of this process: another patch release changes no plan."""

    def short(version: str | None) -> str | None:
        return None if version is None else ".".join(version.split("+")[0].split(".")[:2])

    cudnn = versions.get("cudnn")
    return {
        "fused_res": short(versions.get("fused_res")),
        "triton": short(versions.get("triton")),
        "cudnn": None if cudnn is None else int(cudnn) // 10000,
    }


def file_name(gpu: str) -> str:
    """ "NVIDIA H200" as a file's name."""
    return f"{'-'.join(gpu.lower().split())}.json"


def _frozen(value: object) -> object:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


@functools.cache
def _plans(folder: Path, gpu: str) -> tuple[dict, dict]:
    """Of a GPU: the versions, and levels by dtype and block; nothing where no file is for it.

    Raises:
        ValueError: the file is not what it should be, which an installed package's never is.
    """
    path = folder / file_name(gpu)
    if not path.is_file():
        return {}, {}
    document = json.loads(path.read_text())
    if document.get("format") != FORMAT or document.get("gpu") != gpu:
        raise ValueError(f"{path}: expected format {FORMAT} and {gpu!r}, got {document.get('format')} and {document.get('gpu')!r}")
    return document["versions"], {(plan["dtype"], _frozen(plan["block"])): plan["level"] for plan in document["plans"]}


def level(gpu: str, versions: Mapping, dtype: str, numbers: Sequence, folder: Path = FOLDER) -> str | None:
    """The level that was measured to be the fastest, or None where nobody has measured.

    Args:
        gpu: its name, as torch gives it.
        versions: as `fused_res.environment.versions` gives them.
        dtype: "bfloat16" and so on.
        numbers: as `fused_res.geometry.numbers_of` gives them.
    """
    kept_for, plans = _plans(folder, gpu)
    return plans.get((dtype, _frozen(numbers))) if plans and kept_for == matters(versions) else None
