"""Triton's CPU interpreter, made to behave like a GPU where it silently does not (Triton 3.6 to 3.9).

Out of the box it multiplies the raw bits of bfloat16, truncates float32 to bfloat16, rounds twice in `tl.fma`, keeps NaN in a
plain `tl.maximum` (3.6, 3.7), never overflows int32, reads and writes anywhere, and runs programs in order. After `install()`
it does as the hardware does, or fails loudly. In a pipelined loop an address outside of the tensors fails even where it is masked:
compilers have been seen to lose the mask of an asynchronous copy (https://github.com/pytorch/pytorch/issues/186440). The hooks are
private to Triton: `prove()` checks that each still works.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

import interpreter_pace

_Builder = interpreter.InterpreterBuilder
_random = np.random.default_rng(0)
# Address ranges that the running kernel was given: (first byte, one past the last byte).
_spans: list[tuple[int, int]] = []
# Whether the running kernel is in a loop with stages.
_pipelined = False

_run = interpreter.InterpretedFunction.run
_convert_float = interpreter._convert_float
_binary_op = _Builder.binary_op
_create_dot = _Builder.create_dot
_create_fma = _Builder.create_fma
_masked_load = _Builder.create_masked_load
_masked_store = _Builder.create_masked_store
_patch_lang_core = interpreter._patch_lang_core
_patch_lang_tensor = interpreter._patch_lang_tensor
_set_grid_dim = _Builder.set_grid_dim
_set_grid_idx = _Builder.set_grid_idx


def _convert(values, source, target, rounding):
    if source == tl.float32 and target == tl.bfloat16 and "RTZ" not in str(rounding).upper():
        exact = torch.from_numpy(np.ascontiguousarray(values).view(np.float32).copy())
        return exact.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(exact.shape)
    if source == tl.bfloat16 and target == tl.float32:
        return (np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return _convert_float(values, source, target, rounding)


def _checked_binary_op(builder, left, right, operation):
    if "bf16" in (left.dtype.scalar.name, right.dtype.scalar.name):
        raise TypeError(f"{operation.__name__} of bfloat16: widen to float32 first, the interpreter would take the raw bits")
    return _binary_op(builder, left, right, operation)


def _dot(builder, a, b, *rest):
    def widen(t):
        if t.dtype.scalar != tl.bfloat16:
            return t
        return interpreter.TensorHandle(_convert(t.data, tl.bfloat16, tl.float32, None), tl.float32)

    return _create_dot(builder, widen(a), widen(b), *rest)


def _fma(builder, x, y, z):
    if z.dtype.scalar != tl.float32:
        return _create_fma(builder, x, y, z)
    wide = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(wide.astype(np.float32), tl.float32)


def _patch_tensor(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    # NumPy 2.4 refuses int() of the arrays of one element that Triton 3.6 has for scalars.
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _in_pipeline(steps):
    global _pipelined
    for step in steps:
        outer, _pipelined = _pipelined, True
        try:
            yield step
        finally:
            _pipelined = outer


def _patch_core(lang, scope):
    _patch_lang_core(lang, scope)
    plain = lang.range

    def staged(*bounds, num_stages=None, **options):
        steps = plain(*bounds, **options)
        return steps if num_stages is None else _in_pipeline(steps)

    scope.set_attr(lang, "range", staged)


def _shuffled_dim(builder, nx, ny, nz):
    _set_grid_dim(builder, nx, ny, nz)
    builder._order = _random.permutation(nx * ny * nz)


def _shuffled_idx(builder, x, y, z):
    _, ny, nz = builder.grid_dim
    at = int(builder._order[(x * ny + y) * nz + z])
    _set_grid_idx(builder, at // (ny * nz), at // nz % ny, at % nz)


def _span(tensor):
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else -1
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _tensors(values):
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, TensorDescriptor):
            yield value.base
        elif isinstance(value, torch.Tensor):
            yield value


def _bounded_run(function, *args, **kwargs):
    global _spans, _pipelined
    outer, _pipelined = _spans, False
    _spans = [_span(t) for t in _tensors((*args, *kwargs.values()))]
    try:
        return _run(function, *args, **kwargs)
    finally:
        _spans = outer


def _check_addresses(pointers, mask):
    at = pointers.data.ravel() if mask is True else pointers.data[np.broadcast_to(mask, pointers.data.shape)]
    if not at.size:
        return
    at, size = at.astype(np.uint64, copy=False), max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    first, last = int(at.min()), int(at.max()) + size
    # Mostly all of them lie in one tensor.
    if any(start <= first and last <= end for start, end in _spans):
        return
    spans = np.array(_spans, np.uint64).reshape(-1, 2)
    if not ((at[:, None] >= spans[:, 0]) & (at[:, None] + np.uint64(size) <= spans[:, 1])).any(1).all():
        raise IndexError("access outside of the kernel's tensors")


def _bounded_load(builder, pointers, mask, *rest):
    _check_addresses(pointers, True if _pipelined else mask.data)
    return _masked_load(builder, pointers, mask, *rest)


def _bounded_store(builder, pointers, value, mask, *rest):
    _check_addresses(pointers, mask.data)
    return _masked_store(builder, pointers, value, mask, *rest)


def install() -> None:
    """Patch the interpreter; any number of times."""
    interpreter._convert_float = _convert
    interpreter._patch_lang_core, interpreter._patch_lang_tensor = _patch_core, _patch_tensor
    interpreter.InterpretedFunction.run = _bounded_run
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)  # int32 overflow, device_assert
    _Builder.binary_op = _checked_binary_op
    _Builder.create_dot = _dot
    _Builder.create_fma = _fma
    _Builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    _Builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    _Builder.create_masked_load, _Builder.create_masked_store = _bounded_load, _bounded_store
    _Builder.set_grid_dim, _Builder.set_grid_idx = _shuffled_dim, _shuffled_idx
    interpreter_pace.install()


@triton.jit
def _dot_kernel(a, b, c, M: tl.constexpr):
    r = tl.arange(0, M)
    at = r[:, None] * M + r[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _relu_kernel(x, y, KEEP_NAN: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    NAN: tl.constexpr = tl.PropagateNan.ALL if KEEP_NAN else tl.PropagateNan.NONE
    tl.store(y + i, tl.maximum(tl.load(x + i), 0.0, propagate_nan=NAN))


@triton.jit
def _fma_kernel(x, y, z, out):
    tl.store(out, tl.fma(tl.load(x), tl.load(y), tl.load(z)))


@triton.jit
def _double_kernel(x, WIDE: tl.constexpr):
    v = tl.load(x)
    if WIDE:
        v = v.to(tl.float32)
    tl.store(x, v + v)


@triton.jit
def _offset_kernel(o, stride, WIDE: tl.constexpr):
    p = tl.program_id(0)
    if WIDE:
        tl.store(o + p, p.to(tl.int64) * stride)
    else:
        tl.store(o + p, p * stride)


@triton.jit
def _count_kernel(o, n):
    for i in range(n):
        tl.store(o + i, i)


@triton.jit
def _chain_kernel(o):
    p = tl.program_id(0)
    tl.store(o + p + 1, tl.load(o + p) + 1)


@triton.jit
def _copy_kernel(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + i), mask=i < n)


@triton.jit
def _sum_kernel(x, y, n, FOLD: tl.constexpr, STAGES: tl.constexpr, B: tl.constexpr):
    i, total = tl.arange(0, B), tl.zeros((B,), tl.float32)
    for first in tl.range(0, n, B, num_stages=STAGES):
        at = first + i
        total += tl.load(x + (tl.minimum(at, n - 1) if FOLD else at), mask=at < n, other=0.0)
    tl.store(y + i, total)


def _refuses(text, kernel, grid, *args) -> bool:
    try:
        kernel[grid](*args)
    except Exception as error:
        return text in str(error)
    return False


def prove() -> None:
    """Raise unless every patch takes effect on the Triton that is installed."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in "ab")
    c = torch.zeros(16, 16)
    _dot_kernel[(1,)](a, b, c, 16)
    assert (c - a.float() @ b.float()).abs().max() < 1e-5, "tl.dot takes the values of bfloat16"

    x = torch.cat([torch.randn(4090, generator=generator), torch.tensor([1e-40, 3.4e38, float("inf"), float("nan"), -0.0, -1.0])])
    y = torch.zeros(4096, dtype=torch.bfloat16)
    _relu_kernel[(1,)](x, y, True, 4096)
    assert torch.equal(y.nan_to_num(7.0), x.relu().bfloat16().nan_to_num(7.0)), "float32 rounds to the nearest bfloat16"
    x, y = torch.tensor([float("nan"), -1.0, 1.0, 0.0]), torch.zeros(4)
    _relu_kernel[(1,)](x, y, False, 4)
    assert y[0] == 0, "a plain tl.maximum drops NaN, as max.f32 does"
    _relu_kernel[(1,)](x, y, True, 4)
    assert y[0].isnan(), "a propagating tl.maximum keeps NaN, as max.NaN.f32 does"

    x, out = torch.tensor([1 + 2.0**-12]), torch.zeros(1)
    _fma_kernel[(1,)](x, x, -(1 + 2.0**-11) * torch.ones(1), out)
    assert out.item() == 2.0**-24, "tl.fma rounds once"

    bf16 = torch.full((1,), 1e-40, dtype=torch.bfloat16)
    doubled = 2 * bf16
    _double_kernel[(1,)](bf16, True)
    assert torch.equal(bf16, doubled), "subnormal bfloat16 widens exactly"
    assert _refuses("bfloat16", _double_kernel, (1,), bf16, False), "bfloat16 arithmetic fails"

    o = torch.zeros(4, dtype=torch.int64)
    _offset_kernel[(4,)](o, 2**31 - 1, True)
    assert o.max() == 3 * (2**31 - 1), "int64 holds what int32 does not"
    assert _refuses("overflow", _offset_kernel, (4,), o, 2**31 - 1, False), "int32 overflow fails"

    o = torch.zeros(4, dtype=torch.int64)
    _count_kernel[(1,)](o, 4)
    assert o.tolist() == [0, 1, 2, 3], "loops take their bounds from arguments"

    o = torch.zeros(65)
    _chain_kernel[(64,)](o)
    assert not torch.equal(o, torch.arange(65.0)), "programs run in no particular order"

    x, y = torch.zeros(8), torch.zeros(8)
    _copy_kernel[(1,)](x, y, 8, 8)
    assert _refuses("outside", _copy_kernel, (1,), x[:7], y, 7, 8), "reads out of bounds fail"
    assert _refuses("outside", _copy_kernel, (1,), x, y[:7], 8, 8), "writes out of bounds fail"

    _sum_kernel[(1,)](x[:7], y, 7, False, None, 4)
    _sum_kernel[(1,)](x[:7], y, 7, True, 3, 4)
    assert _refuses("outside", _sum_kernel, (1,), x[:7], y, 7, False, 3, 4), "a pipelined loop points inside where it masks, too"
    _sum_kernel[(1,)](x[:7], y, 7, False, None, 4)  # and what fails in a loop leaves nothing behind


if __name__ == "__main__":
    install()
    prove()
    print(f"triton {triton.__version__}: the hardened interpreter holds")
