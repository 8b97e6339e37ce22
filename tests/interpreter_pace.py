"""Triton's CPU interpreter with less bookkeeping: the same values, checks and errors in less time.

On small tiles nearly all of its time goes into Python around NumPy. What it finds again for each operation and each call of a
device function (which functions are built in, the type of a block, the attributes of a tensor of that type) is kept here instead.
The hooks are private to Triton (3.6 to 3.9), and as in `interpreter.py` one that is missing is an error.
"""

import inspect
from functools import cache

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_Scope = interpreter._LangPatchScope
_patch_lang = interpreter._patch_lang
_np_dtype = interpreter._get_np_dtype
_block_init = tl.block_type.__init__
_tensor_init = tl.tensor.__init__
_check_types = TritonSemantic.binary_op_type_checking_impl

_INTEGERS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
# Of triton.language and its core, those that are patched for the kernel that runs.
_patched: set[int] = set()
_numpy_types: dict[str, np.dtype] = {}
_blocks: dict[tuple, dict] = {}


class _OuterScope(_Scope):
    def restore(self) -> None:
        _patched.clear()
        super().restore()


@cache
def _builtins(package) -> tuple:
    return tuple((name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member))


def _patch_builtins(package, builder, scope) -> None:
    for name, member in _builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)


def _patch_attribute(owner, name, member, builder, scope) -> None:
    def interpreted(*args, **kwargs):
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return member(*args, **kwargs)

    scope.set_attr(owner, name, interpreted)


def _patch_once(function):
    """A device function finds patched what the kernel that calls it has had patched: Triton patches it again for each call."""
    seen = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
    if seen and seen <= _patched:
        return _Scope()
    scope = _patch_lang(function)
    if not _patched:
        outer = _OuterScope()
        outer._changes = scope._changes
        scope = outer
    _patched.update(seen)
    return scope


def _numpy_type(dtype):
    element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    found = _numpy_types.get(element.name)
    if found is None:
        found = _numpy_types[element.name] = _np_dtype(dtype)
    return found


def _make_block(self, element_ty, shape):
    key = element_ty.name, *[size.value if isinstance(size, tl.constexpr) else size for size in shape]
    known = _blocks.get(key)
    if known is None:
        _block_init(self, element_ty, shape)
        known = _blocks[key] = vars(self) | {"_of_tensors": {}}
    vars(self).update(known)


def _make_tensor(self, handle, type):
    """What is the same for all tensors of a type is made once for it."""
    known = vars(type).setdefault("_of_tensors", {})
    if not known:
        _tensor_init(self, None, type)
        known.update(vars(self))
    vars(self).update(known)
    self.handle = handle


def _check_types_of_two(semantic, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
    """Two tensors of one type, which are most, are as they should be: only a division widens, and only pointers are refused."""
    if not div_or_mod and isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor):
        left, right = lhs.type, rhs.type
        if left.name == right.name and not left.scalar.is_ptr():
            return lhs, rhs
    return _check_types(semantic, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)


def _check_overflow(semantic, lhs, rhs, binary_op):
    """In NumPy, where Triton interprets seven operations more for it."""
    dtype = lhs.type.scalar
    if dtype.int_bitwidth >= 64 or not semantic.builder.options.sanitize_overflow:
        return
    name = binary_op.__name__
    wide = _INTEGERS[name](lhs.handle.data, rhs.handle.data, dtype=np.int64)
    if wide.min() < dtype.get_int_min_value() or wide.max() > dtype.get_int_max_value():
        raise AssertionError(f"int{dtype.int_bitwidth} overflow detected for operation {name}")


def install() -> None:
    """Patch the interpreter; any number of times."""
    interpreter._patch_lang, interpreter._patch_builtin, interpreter._patch_attr = _patch_once, _patch_builtins, _patch_attribute
    interpreter._get_np_dtype = _numpy_type
    tl.block_type.__init__, tl.tensor.__init__ = _make_block, _make_tensor
    TritonSemantic.binary_op_type_checking_impl = _check_types_of_two
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
