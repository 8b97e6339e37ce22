"""Who may import whom: data flows one way, and what torch does not document is used in one file."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the bottom to the top: a file imports from lines above its own alone, a folder also from itself.
ORDER = (
    "version tolerance settings spec layout internals console notices aot_table shipped",
    "plans folds geometry reference originals derived kernels",
    "known aot",
    "backends reading standing",
    "primitives environment eligibility",
    "block",
    "tuning cost",
    "planner",
    "call recompute",
    "again",
    "functional anatomy",
    "fusible traced",
    "chains serial",
    "identity network",
    "modules fusing",
    "explain accuracy",
    "tuned",
    "__init__ check",
    "benchmarks",
    "cli",
    "__main__",
)
RANK = {name: rank for rank, line in enumerate(ORDER) for name in line.split()}
GLUE = {("fused_res/backends/_native_calls.py", "primitives")}
"""How primitives call compiled operators: imported by the name that the backend gives, when a primitive is first asked for."""

FILES = [path for folder in ("fused_res", "kernels", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]


def layer(module):
    """The line's name for a module such as "fused_res.block.op"."""
    parts = module.split(".")[1:]
    return parts[0] if parts else "__init__"


def own(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] != "fused_res" else parts[1]


def imported(path):
    """The modules that a file imports, wherever in it, each with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def against_the_order(path):
    """A file's imports that go against it."""
    name, here = str(path.relative_to(ROOT)), own(path)
    wrong = []
    for module, line in imported(path):
        if not module.startswith("fused_res"):
            continue
        other = layer(module)
        if other not in RANK:  # a name of the package itself
            other = "__init__"
        allowed = other == here or RANK[other] < RANK[here] or (name, other) in GLUE
        wrong += [] if allowed else [f"{name}:{line}: {module}"]
    return wrong


def test_imports_go_one_way():
    assert len(FILES) > 100
    assert not [found for path in FILES for found in against_the_order(path)]


def undocumented(tree):
    """The names with an underscore in front that a file takes from torch, each with its line."""
    modules = {"torch"}
    for node in ast.walk(tree):
        names = node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ()
        of_torch = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch"
        for alias in names:
            if of_torch or alias.name.split(".")[0] == "torch":
                modules.add((alias.asname or alias.name).split(".")[0])
                if of_torch and (alias.name.startswith("_") or "._" in node.module):
                    yield f"{node.module}.{alias.name}", node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            start = node
            while isinstance(start, ast.Attribute):
                start = start.value
            if isinstance(start, ast.Name) and start.id in modules:
                yield ast.unparse(node), node.lineno


def test_undocumented_names_are_found():
    source = (
        "import torch\nfrom torch.utils import _pytree as tree\nfrom torch import nn\ntorch._C._f()\nnn.a._b\ntree.c._d\nself._e\n"
    )
    found = {name for name, _ in undocumented(ast.parse(source))}
    assert found == {"torch.utils._pytree", "torch._C", "torch._C._f", "nn.a._b", "tree.c._d"}


ALLOWED = {
    # An annotation; torch's own methods, which others replace.
    "fused_res/block/program.py": {"torch._ops"},
    "fused_res/originals.py": {"torch._C", "torch._C._nn", "batchnorm._BatchNorm"},
}


def beyond_internals(path):
    """The undocumented names that a file may not use."""
    name = str(path.relative_to(ROOT))
    # Python's dispatch is what torch's notes on extending it describe.
    allowed = {"torch.utils._python_dispatch.TorchDispatchMode"} | ALLOWED.get(name, set())
    return [f"{name}:{line}: {what}" for what, line in undocumented(ast.parse(path.read_text())) if what not in allowed]


def test_what_torch_does_not_document_is_used_in_one_file():
    internals = ROOT / "fused_res" / "internals.py"
    assert beyond_internals(internals)
    assert not [found for path in FILES if path != internals for found in beyond_internals(path)]


def test_importing_the_package_brings_neither_kernels_nor_tuning_nor_a_compiler(fresh):
    code = (
        "import sys, fused_res\n"
        "heavy = ('triton', 'torch._dynamo', 'torch._inductor', 'fused_res.tuning', 'fused_res.kernels', 'fused_res.benchmarks')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    found = fresh.run(code)
    assert found.stdout.strip() == "[]", found.stderr
