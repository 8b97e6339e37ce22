"""The version of the package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fused-res")
except PackageNotFoundError:  # run from a source tree
    __version__ = "0+unknown"
