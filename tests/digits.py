"""scikit-learn's digits, read once: it reads them from a file of text."""

import functools
import importlib


@functools.cache
def read(**options):
    return importlib.import_module("sklearn.datasets._base").load_digits(**options)
