"""A cache of compiled Triton kernels as one file, to be carried to a machine where GPU time is scarce.

Triton's cache names its files by absolute paths, and keeps every stage of the compilation; the file has machine code and metadata
alone, and unpacking writes the paths anew. Triton finds an entry by a key that knows nothing of where the cache lies: sources of
the kernel and of Triton, ptxas, architecture, options and environment.
"""

import io
import json
import tarfile
from pathlib import Path

NAME = "triton-cache.tar.xz"
_GROUP = "__grp__"
KEPT = (".cubin", ".json")


def pack(cache: Path, archive: Path) -> int:
    """Write the kernels of a Triton cache into a .tar.xz; returns how many there are."""
    count = 0
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz") as packed:
        for group in sorted(cache.glob(f"*/{_GROUP}*.json")):
            names = [name for name in json.loads(group.read_text())["child_paths"] if name.endswith(KEPT)]
            if not all((group.parent / name).is_file() for name in names) or len(names) < len(KEPT):
                continue  # of a process that was stopped while it wrote
            for name in names:
                packed.add(group.parent / name, f"{group.parent.name}/{name}")
            text = json.dumps(names).encode()
            entry = tarfile.TarInfo(f"{group.parent.name}/{group.name}")
            entry.size = len(text)
            packed.addfile(entry, io.BytesIO(text))
            count += 1
    return count


def unpack(archive: Path, cache: Path) -> int:
    """Add what `pack` wrote to a Triton cache; returns how many kernels that are."""
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as packed:
        packed.extractall(cache, filter="data")
        groups = [cache / name for name in packed.getnames() if Path(name).name.startswith(_GROUP)]
    for group in groups:
        paths = {name: str(group.parent.resolve() / name) for name in json.loads(group.read_text())}
        group.write_text(json.dumps({"child_paths": paths}))
    return len(groups)
