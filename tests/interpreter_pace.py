"""Triton's CPU interpreter with less bookkeeping: the same values, checks and errors in less time.

On small tiles nearly all of its time goes into Python around NumPy. What it finds again for each operation and each call of a
device function (which functions are built in, the type of a block, the attributes of a tensor of that type, what two types become
in an operation) is kept here instead, by the names of the types. Operands of an operation are left to NumPy to bring to one shape.
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
_unwrap = tl.core._unwrap_if_constexpr
_equal_types = tl.dtype.__eq__
_fits = interpreter._validate_np_data_size
_broadcast = TritonSemantic.broadcast_impl_value
_expand = TritonSemantic.expand_dims
_cast = TritonSemantic.cast

_INTEGERS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
# Of triton.language and its core, those that are patched for the kernel that runs.
_patched: set[int] = set()
_numpy_types: dict[str, np.dtype] = {}
_blocks: dict[tuple, dict] = {}
# Bytes of NumPy's elements that a type has been found to hold.
_fitting: set[tuple] = set()
# By the types of two operands: what either becomes in an operation, and of which type it is where both are to have one shape.
_joined: dict[tuple, tuple] = {}
_broadcasted: dict[tuple, tuple] = {}
_constants: dict[tuple, tl.tensor] = {}
_expanded: dict[tuple, tl.dtype] = {}
# Between these NumPy converts as hardware does.
_INTEGRAL = frozenset(("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"))
# What `_unwrap` gives back as it is.
_BARE = frozenset((tl.tensor, tl.dtype, int, float, bool, str, type(None)))
# Types for which a number of a kind that `_kind` names is never out of range.
_WIDE = frozenset(("int32", "uint32", "int64", "uint64", "fp16", "bf16", "fp32", "fp64"))


class _OuterScope(_Scope):
    def restore(self) -> None:
        _patched.clear()
        super().restore()


def _interpreted(member):
    """Without the wrapper that asks whether there is a `_semantic`."""
    function = getattr(member, "__wrapped__", member)

    def interpreted(*args, **kwargs):
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return function(*args, **kwargs)

    return interpreted


@cache
def _builtins(package) -> tuple:
    return tuple((name, _interpreted(member)) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member))


def _patch_builtins(package, builder, scope) -> None:
    for name, interpreted in _builtins(package):
        scope.set_attr(package, name, interpreted)


@cache
def _languages(function) -> frozenset:
    return frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)


def _patch_once(function):
    """A device function finds patched what the kernel that calls it has had patched: Triton patches it again for each call."""
    seen = _languages(function)
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
    known = type.__dict__.get("_of_tensors")
    if not known:
        _tensor_init(self, None, type)
        known = type.__dict__.setdefault("_of_tensors", {})
        known.update(vars(self))
    self.__dict__.update(known)
    self.handle = handle


def _unwrap_bare(value):
    return value if type(value) in _BARE else _unwrap(value)


def _are_equal_types(self, other):
    return self.name == other.name if type(other) is tl.dtype else _equal_types(self, other)


def _fits_once(data, dtype):
    held = data.itemsize, dtype.name
    if held in _fitting:
        return True
    if _fits(data, dtype):
        _fitting.add(held)
        return True
    return False


def _make_handle(self, data, dtype, attr=None):
    if not _fits_once(data, dtype):
        raise ValueError(f"elements of {data.itemsize} bytes for {dtype}")
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr


def _with_element(self, element_ty):
    """Block types are never written to: one for all tensors that have it."""
    known = vars(self).setdefault("_with_elements", {})
    if element_ty.name not in known:
        known[element_ty.name] = tl.block_type(element_ty, self.shape)
    return known[element_ty.name]


def _kind(value):
    """What operands have in common that an operation treats alike; None where that is not known."""
    if isinstance(value, tl.tensor):
        return value.type.name
    if type(value) is int:
        return "natural" if 0 <= value < 2**31 else "negative" if -(2**31) <= value < 0 else None
    if type(value) is float:
        return "real" if value == 0 or 2**-126 <= abs(value) < 2**127 else None
    return None


def _constant(semantic, value, element):
    known = _constants.get((value, element.name))
    if known is None:
        known = _constants[value, element.name] = semantic.scalar_constant(value, element)
        known.handle.data.flags.writeable = False
    return known


def _joining(value, joined):
    """The type of a joined operand, and what it is cast to, if it is."""
    element = joined.type.scalar
    cast = not isinstance(value, tl.tensor) or value.type.scalar.name != element.name
    return joined.type, element if cast else None


def _join(semantic, value, joining):
    type, element = joining
    if element is not None:
        value = semantic.cast(value, element) if isinstance(value, tl.tensor) else _constant(semantic, value, element)
    return value if value.type.name == type.name else tl.tensor(value.handle, type)


def _check_types_of_two(semantic, lhs, rhs, *options, **named):
    """Types are checked once, and operands keep their shapes, which NumPy makes one of."""
    left, right = _kind(lhs), _kind(rhs)
    key = left, right, options, *named.items()
    known = _joined.get(key)
    if known is None:
        two = _check_types(semantic, lhs, rhs, *options, **named)
        if left and right and ((isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor)) or two[0].type.scalar.name in _WIDE):
            _joined[key] = _joining(lhs, two[0]), _joining(rhs, two[1])
        return two
    return _join(semantic, lhs, known[0]), _join(semantic, rhs, known[1])


def _spread(value, type):
    if type is None:
        return value
    data = np.empty(type.shape, value.handle.data.dtype)
    data[...] = value.handle.data
    return tl.tensor(interpreter.TensorHandle(data, value.handle.dtype.scalar), type)


def _broadcast_two(semantic, lhs, rhs):
    key = lhs.type.name, rhs.type.name
    known = _broadcasted.get(key)
    if known is None:
        two = _broadcast(semantic, lhs, rhs)
        _broadcasted[key] = tuple(None if new.type.name == old else new.type for new, old in zip(two, key, strict=True))
        return two
    return _spread(lhs, known[0]), _spread(rhs, known[1])


def _expand_dims(semantic, value, axis):
    key = value.type.name, axis
    type = _expanded.get(key)
    if type is None:
        found = _expand(semantic, value, axis)
        if value.type.is_block() and axis >= 0:
            _expanded[key] = found.type
        return found
    handle = value.handle
    return tl.tensor(interpreter.TensorHandle(handle.data[(slice(None),) * axis + (None,)], handle.dtype.scalar), type)


def _cast_at_once(semantic, value, type, *rounding, **named):
    old, new = value.type.scalar, type.scalar
    if old.name == new.name:
        return value
    if old.name in _INTEGRAL and new.name in _INTEGRAL and not rounding and not named:
        handle = interpreter.TensorHandle(value.handle.data.astype(_numpy_type(new)), new)
        return tl.tensor(handle, value.type.with_element_ty(new))
    return _cast(semantic, value, type, *rounding, **named)


def _check_overflow(semantic, lhs, rhs, binary_op):
    """In NumPy, where Triton interprets seven operations more for it."""
    dtype = lhs.type.scalar
    if dtype.int_bitwidth >= 64 or not semantic.builder.options.sanitize_overflow:
        return
    name = binary_op.__name__
    wide = _INTEGERS[name](lhs.handle.data, rhs.handle.data, dtype=np.int64)
    least, most = (wide.item(),) * 2 if wide.size == 1 else (wide.min(), wide.max())
    if least < dtype.get_int_min_value() or most > dtype.get_int_max_value():
        raise AssertionError(f"int{dtype.int_bitwidth} overflow detected for operation {name}")


def install() -> None:
    """Patch the interpreter; any number of times."""
    interpreter._patch_lang, interpreter._patch_builtin = _patch_once, _patch_builtins
    interpreter._get_np_dtype, interpreter._validate_np_data_size = _numpy_type, _fits_once
    interpreter.TensorHandle.__init__ = _make_handle
    tl.block_type.__init__, tl.tensor.__init__ = _make_block, _make_tensor
    tl.block_type.with_element_ty, tl.dtype.__eq__, tl.core._unwrap_if_constexpr = _with_element, _are_equal_types, _unwrap_bare
    TritonSemantic.binary_op_type_checking_impl = _check_types_of_two
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
    TritonSemantic.broadcast_impl_value, TritonSemantic.expand_dims = _broadcast_two, _expand_dims
    TritonSemantic.cast = _cast_at_once
