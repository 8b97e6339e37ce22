"""Compile csrc/ against the headers of every torch that we take, without installing any: `make headers`.

python .ci/check_headers.py [VERSION ...]

A wheel of torch is a zip file of half a gigabyte or more. pip downloads one after the other, and only torch/include is kept, in
build/headers. C++ is compiled as far as its syntax; CUDA C++, where there is nvcc, for one architecture.
"""

import os
import runpy
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("2.10.0", "2.11.0", "2.13.0", "2.14.1", "2.15.0")
ARCH = "9.0"

setup = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def download(version: str, include: Path) -> None:
    """Leave the headers of a torch in a folder."""
    with TemporaryDirectory(dir=include.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, f"torch=={version}"]
        # What may be installed on this machine does not limit what is only read.
        subprocess.run(command, check=True, env={**os.environ, "PIP_CONSTRAINT": os.devnull})
        (wheel,) = Path(folder).glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("torch/include/")]
            archive.extractall(Path(folder, "headers"), names)
        Path(folder, "headers").rename(include)


def commands(include: Path) -> dict[str, list]:
    """Of each source, how it is compiled: with the flags of setup.py."""
    headers = ["-isystem", include / "torch/include"]
    found = {}
    for source in sorted((ROOT / "csrc").rglob("*.cpp")):
        variant = [*setup.VARIANT_FLAGS, "-DFUSED_RES_VARIANT=plain"] if source.stem == "variant" else []
        found[source.name] = [setup.compiler(), *setup.CXX_FLAGS, *headers, *variant, "-fsyntax-only", source]
    nvcc = setup.find_nvcc()
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) if nvcc else ():
        flags = ["-ccbin", setup.compiler(), *setup.NVCC_FLAGS, *headers, *setup.gencode([ARCH])]
        found[source.name] = [nvcc, *flags, "-c", source, "-o", os.devnull]
    return found


def refused(command: list) -> str:
    """What the compiler says where a file does not compile; nothing where it does."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stderr or f"exit code {done.returncode}" if done.returncode else ""


def main(versions: list[str]) -> int:
    if setup.compiler() is None:
        print("there is no C++ compiler here", file=sys.stderr)
        return 2
    folder, failed = ROOT / "build/headers", False
    folder.mkdir(parents=True, exist_ok=True)
    for version in versions or VERSIONS:
        include = folder / version
        if not include.is_dir():
            print(f"torch {version}: downloading its headers ...", flush=True)
            download(version, include)
        found = commands(include)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            said = {name: words for name, words in zip(found, pool.map(refused, found.values()), strict=True) if words}
        cuda = sum(name.endswith(".cu") for name in found)
        print(f"torch {version}: {len(found) - cuda} files of C++, {cuda} of CUDA C++, {len(said)} do not compile", flush=True)
        for name, words in said.items():
            print(f"{name}:", *words.splitlines()[:20], sep="\n", file=sys.stderr, flush=True)
        failed |= bool(said)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
