"""Triton's interpreter, mended where it is wrong or slow; import this before any kernel, in a process of its own.

Triton 3.6 multiplies bf16 operands of `tl.dot` as integers, truncates fp32 to bf16 where a GPU rounds, writes raw
integers into bf16, and needs numpy < 2.4 for loops with a loaded bound. Arithmetic on bf16 blocks outside `tl.dot`
stays wrong: kernels load, convert to fp32, compute and convert back.
"""

from __future__ import annotations

import os
from functools import cached_property
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
# With AMX, oneDNN's bfloat16 products read what lies between a matrix's rows, times zero: NaN from `torch.empty`.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
patch_tensor, dot, cast = interpreter._patch_lang_tensor, Builder.create_dot, Builder.cast_impl
convert_float = interpreter._convert_float


def _widened(handle: Handle) -> Handle:
    if handle.dtype != tl.bfloat16:
        return handle
    return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _patch_tensor(tensor, scope):
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda scalar: int(np.asarray(scalar.handle.data).reshape(-1)[0]))


def _dot(self, a, b, accumulator, *settings):
    return dot(self, _widened(a), _widened(b), accumulator, *settings)


def _convert_float(values, source, target, rounding):
    if (source, target) != (tl.float32, tl.bfloat16):
        return convert_float(values, source, target, rounding)
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded.reshape(np.shape(values))


def _cast(self, source, target):
    if target.scalar == tl.bfloat16 and source.dtype.scalar not in (tl.float32, tl.bfloat16):
        source = Handle(source.data.astype(np.float32), tl.float32)
    return cast(self, source, target)


interpreter._patch_lang_tensor = _patch_tensor
interpreter._convert_float = _convert_float
Builder.create_dot, Builder.cast_impl = _dot, _cast

# Faster, to the same bits: patched once and not at every call of a device function; without the 64-bit arithmetic for
# assertions of overflow, which are off; numpy's equivalents of types are remembered, and so is what a block's type and
# a tensor find out about a shape; tuples, and so shapes, find their type when it is asked for.
numpy_dtype, numpy_dtypes = interpreter._get_np_dtype, {}
make_block_type, block_types = tl.block_type.__init__, {}


def _numpy_dtype(dtype: tl.dtype) -> np.dtype:
    name = dtype.scalar.name
    if name not in numpy_dtypes:
        numpy_dtypes[name] = numpy_dtype(dtype)
    return numpy_dtypes[name]


def _make_tuple(self, values, type=None):
    self.values = list(values)
    if type is not None:
        self.type = type if isinstance(type, tl.core.tuple_type) else tl.core.tuple_type(type)


def _make_block_type(self, element_ty, shape):
    sizes = tuple(getattr(size, "value", size) for size in shape)
    key = element_ty.name, sizes
    if key not in block_types:
        make_block_type(self, element_ty, shape)
        self.of_tensors = tl.constexpr(self.numel), tl.core.tuple([tl.constexpr(size) for size in sizes])
        block_types[key] = vars(self)
    self.__dict__.update(block_types[key])


def _make_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = type.of_tensors if type.is_block() else OF_SCALARS


OF_SCALARS = tl.constexpr(1), tl.core.tuple([])
tl.block_type.__init__, tl.tensor.__init__ = _make_block_type, _make_tensor
interpreter._get_np_dtype = _numpy_dtype
tl.core.tuple.__init__ = _make_tuple
tl.core.tuple.type = cached_property(lambda self: tl.core._type_for_tuple_values(self.values))
tl.core.tuple.type.__set_name__(tl.core.tuple, "type")
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
