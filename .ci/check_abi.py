"""Check that compiled libraries need of torch only its stable ABI, as the oldest torch that we take has it, and nothing of Python.

python .ci/check_abi.py fused_res/_native.so dist/*.whl
"""

import re
import sys
import tempfile
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile
from packaging.version import Version
from torch_abi_audit import inspect_extension

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
# What comes with torch, and what auditwheel finds on every system. The CUDA runtime is in the library, and opens the driver.
LIBRARIES = re.compile(r"lib(torch|torch_cpu|c10)\.so|lib(stdc\+\+|gcc_s|m|c|dl|rt|pthread)\.so\.\d+|ld-linux-.+\.so\.\d")


def complaints(library: Path) -> list[str]:
    """What is wrong with a library, a line each."""
    oldest = re.search(r'"torch>=([\d.]+)"', PROJECT.read_text())[1]
    report = inspect_extension(library)
    with library.open("rb") as file:
        elf = ELFFile(file)
        needed = [tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]
        undefined = [s.name for s in elf.get_section_by_name(".dynsym").iter_symbols() if s["st_shndx"] == "SHN_UNDEF"]
    found = [report.error] if report.error else []
    found += [] if report.torch.uses_torch else ["uses nothing of torch"]
    found += [f"uses {name}, which is not in torch's stable ABI" for name in report.torch.unstable_symbols]
    found += [f"uses {name}, which no torch is known to have" for name in report.torch.unknown_shim_symbols]
    if Version(report.torch.min_torch_version or "0") > Version(oldest):
        names = ", ".join(report.torch.version_defining_symbols)
        found.append(f"needs torch {report.torch.min_torch_version} for {names}, but we take torch {oldest}")
    found += [f"uses {name} of Python" for name in undefined if re.match("_?Py", name)]
    found += [f"needs {name}" for name in needed if not LIBRARIES.fullmatch(name)]
    # libtorch_cpu.so alone does not bring the library that defines aoti_torch_get_current_cuda_stream, a weak symbol of ours.
    found += [] if "libtorch.so" in needed else ["does not need libtorch.so, without which it finds no CUDA of torch's"]
    return found


def main(paths: list[str]) -> int:
    failed = False
    for path in map(Path, paths):
        with tempfile.TemporaryDirectory() as folder:
            if path.suffix == ".whl":
                zipfile.ZipFile(path).extractall(folder)
            libraries = sorted(Path(folder).rglob("*.so")) if path.suffix == ".whl" else [path]
            found = [f"{library.name} {what}" for library in libraries for what in complaints(library)]
        found += [] if libraries else ["holds no library"]
        failed |= bool(found)
        print(f"{path}: {'; '.join(found) or 'stable ABI only'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
