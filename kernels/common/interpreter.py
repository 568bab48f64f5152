"""Triton's interpreter, mended where it is wrong or slow; importable without Triton.

Under ``TRITON_INTERPRET=1`` Triton multiplies bf16 operands of `tl.dot` as integers, truncates fp32 to bf16 where a GPU
rounds, and writes raw integers into bf16. Blocks of a comparison of scalars are int32, which version 3.9 refuses as a
mask. Version 3.6 needs numpy < 2.4 for loops with a loaded bound. Arithmetic on bf16 blocks outside `tl.dot` stays
wrong: kernels load, convert to fp32, compute and convert back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from math import prod
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from .backend import triton

if triton is not None or TYPE_CHECKING:
    import triton.language as tl
    import triton.runtime.interpreter as interpreter


def mend() -> None:
    """Mend the interpreter for every kernel of this process, of other packages too.

    Call this once, before any kernel runs, and only under ``TRITON_INTERPRET=1``: nothing can be compiled afterwards.
    """
    builder = interpreter.InterpreterBuilder
    for owner, name, mended in (
        (interpreter, "_patch_lang_tensor", _patch_tensor),
        (interpreter, "_convert_float", _convert_float),
        (builder, "create_dot", _dot),
        (builder, "cast_impl", _cast),
        (builder, "create_splat", _splat),
        (interpreter, "_get_np_dtype", _numpy_dtype),
        (tl.block_type, "__init__", _make_block_type),
    ):
        setattr(owner, name, mended(getattr(owner, name)))
    # The rest is faster, to the same bits. Tuples, and so shapes, find their type when it is asked for.
    tl.tensor.__init__, tl.core.tuple.__init__ = _make_tensor, _make_tuple
    tl.core.tuple.type = cached_property(lambda self: tl.core._type_for_tuple_values(self.values))
    tl.core.tuple.type.__set_name__(tl.core.tuple, "type")
    # Without the 64-bit arithmetic for assertions of overflow, which are off.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    # Triton's language is patched here once and not at every call of a device function.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


def _patch_tensor(patch_tensor: Callable) -> Callable:
    def mended(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(np.asarray(scalar.handle.data).reshape(-1)[0]))

    return mended


def _convert_float(convert_float: Callable) -> Callable:
    def mended(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert_float(values, source, target, rounding)
        values = np.ascontiguousarray(values, dtype=np.float32)
        bits = values.view(np.uint32)
        rounded = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
        rounded[np.isnan(values)] = 0x7FC0
        return rounded.reshape(np.shape(values))

    return mended


def _dot(dot: Callable) -> Callable:
    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def mended(self: Any, a: Any, b: Any, accumulator: Any, *settings: Any) -> interpreter.TensorHandle:
        return dot(self, widened(a), widened(b), accumulator, *settings)

    return mended


def _cast(cast: Callable) -> Callable:
    def mended(self: Any, source: interpreter.TensorHandle, target: tl.dtype) -> interpreter.TensorHandle:
        if target.scalar == tl.bfloat16 and source.dtype.scalar not in (tl.float32, tl.bfloat16):
            source = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
        return cast(self, source, target)

    return mended


def _splat(splat: Callable) -> Callable:
    def mended(self: Any, block: tl.block_type, scalar: interpreter.TensorHandle) -> interpreter.TensorHandle:
        handle = splat(self, block, scalar)
        if block.scalar != tl.int1:
            return handle
        return interpreter.TensorHandle(handle.data.astype(np.bool_), tl.int1)

    return mended


def _numpy_dtype(numpy_dtype: Callable) -> Callable:
    """Remember numpy's equivalents of types."""
    known: dict[str, np.dtype] = {}

    def mended(dtype: tl.dtype) -> np.dtype:
        name = dtype.scalar.name
        if name not in known:
            known[name] = numpy_dtype(dtype)
        return known[name]

    return mended


def _make_block_type(make_block_type: Callable) -> Callable:
    """Remember what a block's type, and a tensor of it, find out about a shape."""
    known: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def mended(self: Any, element_ty: tl.dtype, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        key = element_ty.name, sizes
        if key not in known:
            make_block_type(self, element_ty, shape)
            self.of_tensors = _of_tensors(*sizes)
            known[key] = vars(self)
        self.__dict__.update(known[key])

    return mended


@cache
def _of_tensors(*sizes: int) -> tuple[tl.constexpr, tl.core.tuple]:
    """Return the attributes ``numel`` and ``shape`` of a tensor."""
    return tl.constexpr(prod(sizes)), tl.core.tuple([tl.constexpr(size) for size in sizes])


def _make_tensor(self: Any, handle: interpreter.TensorHandle, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = type.of_tensors if type.is_block() else _of_tensors()


def _make_tuple(self: Any, values: Any, type: tl.dtype | None = None) -> None:
    self.values = list(values)
    if type is not None:
        self.type = type if isinstance(type, tl.core.tuple_type) else tl.core.tuple_type(type)
