"""How kernels are compiled, and the few machine operations that numba does not offer by itself."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.cpython.unsafe import numbers
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

int64: Any = np.int64
"""Converts to int64 in a kernel; to a type checker the result is an int like any other."""
int32: Any = np.int32
"""The same for int32: the low 32 bits."""
trailing_zeros: Any = cast(Any, numbers).trailing_zeros
"""``trailing_zeros(word)``: number of the lowest bit that is set in a word that is not 0."""

_njit = cast(Any, numba.njit)
# _nrt=False: kernels allocate nothing, and counting references to arrays would cost more than most of the work.
_OPTIONS = {"cache": True, "nogil": True, "boundscheck": False, "error_model": "numpy", "_nrt": False}

kernel: Callable[[F], F] = _njit(**_OPTIONS)
"""Decorator of every hot loop: compiled once, cached, without the GIL."""

inline: Callable[[F], F] = _njit(**_OPTIONS, inline="always")
"""Decorator of a kernel's inner function: merged into its caller before compilation, as array arguments are dear."""


def _prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    signature = types.void(array, index)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array_value = context.make_array(sig.args[0])(context, builder, args[0])
        pointer = builder.gep(array_value.data, [args[1]])
        pointer = builder.bitcast(pointer, cgutils.voidptr_t)
        int32 = cgutils.int32_t
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [cgutils.voidptr_t], fnty=_prefetch_type(cgutils.voidptr_t, int32)
        )
        builder.call(function, [pointer, int32(0), int32(3), int32(1)])
        return context.get_dummy_value()

    return signature, codegen


prefetch: Callable[[Any, int], None] = cast(Any, intrinsic(_prefetch))
"""``prefetch(array, index)``: ask for the cache line of an element (to read, all levels); it changes no result."""


def _assume(typingctx: Any, condition: Any) -> Any:
    signature = types.void(types.boolean)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        from llvmlite import ir

        bit = ir.IntType(1)
        function = builder.module.declare_intrinsic("llvm.assume", [], fnty=ir.FunctionType(ir.VoidType(), [bit]))
        builder.call(function, [context.cast(builder, args[0], types.boolean, types.boolean)])
        return context.get_dummy_value()

    return signature, codegen


assume: Callable[[bool], None] = cast(Any, intrinsic(_assume))
"""``assume(condition)``: a promise to the compiler. ``assume(index >= 0)`` spares it the wrap-around of negative
indices, which costs three instructions an access and turns a vector load into a gather."""


def _prefetch_type(pointer: Any, int32: Any) -> Any:
    from llvmlite import ir

    return ir.FunctionType(ir.VoidType(), [pointer, int32, int32, int32])


def _match(lanes: int) -> Callable[[Any, int, Any], int]:
    def typed(typingctx: Any, array: Any, index: Any, key: Any) -> Any:
        signature = types.int64(array, types.int64, types.int32)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            from llvmlite import ir

            int32, bits = ir.IntType(32), ir.IntType(lanes)
            vector = ir.VectorType(int32, lanes)
            pointer = builder.gep(context.make_array(sig.args[0])(context, builder, args[0]).data, [args[1]])
            tags = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=4)
            nothing = ir.Constant(vector, ir.Undefined)
            first = builder.insert_element(nothing, args[2], int32(0))
            keys = builder.shuffle_vector(first, nothing, ir.Constant(vector, [0] * lanes))
            return builder.zext(builder.bitcast(builder.icmp_signed("==", tags, keys), bits), ir.IntType(64))

        return signature, codegen

    return cast(Any, intrinsic(typed))


match8 = _match(8)
"""``match8(tags, index, key)``: bit i of the result is set where ``tags[index + i]`` (int32) equals ``key``, i < 8.

One vector comparison. A vector load does not see a scalar store of the last few accesses without waiting for it to
reach the cache, so this is for sets that are rarely written twice in a row.
"""
match16 = _match(16)
"""The same for sixteen tags."""


def _four(push: bool) -> Callable[..., int]:
    def typed(typingctx: Any, array: Any, index: Any, key: Any) -> Any:
        signature = types.int64(array, types.int64, types.int32)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            from llvmlite import ir

            int32, vector = ir.IntType(32), ir.VectorType(ir.IntType(32), 4)
            pointer = builder.gep(context.make_array(sig.args[0])(context, builder, args[0]).data, [args[1]])
            pointer = builder.bitcast(pointer, vector.as_pointer())
            tags = builder.load(pointer, align=4)
            nothing = ir.Constant(vector, ir.Undefined)
            keys = builder.insert_element(nothing, args[2], int32(0))
            everywhere = builder.shuffle_vector(keys, nothing, ir.Constant(vector, [0] * 4))
            matches = builder.bitcast(builder.icmp_signed("==", tags, everywhere), ir.IntType(4))
            found = builder.icmp_unsigned("!=", matches, ir.IntType(4)(0))
            if push:
                pushed = builder.shuffle_vector(keys, tags, ir.Constant(vector, [0, 4, 5, 6]))
                builder.store(builder.select(found, tags, pushed), pointer, align=4)
            return builder.zext(found, ir.IntType(64))

        return signature, codegen

    return cast(Any, intrinsic(typed))


holds4 = _four(push=False)
"""``holds4(tags, index, key)``: 1 if one of the four int32 from ``index`` on equals ``key``, else 0; no jump."""
push4 = _four(push=True)
"""The same; and if none does, ``key`` becomes the first, the others move on by one, and the last is dropped."""
