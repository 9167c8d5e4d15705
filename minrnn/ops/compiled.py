"""What the CPU kernels are made of: numba's options and cache, loads and stores, the exponential, threads.

A kernel takes the address of a tensor's first element and its strides, so that views cost nothing (and numpy has no
bfloat16), and is specialised by the type of a tag for the elements.
"""

import contextlib
import hashlib
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.extending import intrinsic, overload

# The files of all kernels.
SOURCES = ("cells.py", "compiled.py", "cpu_cells.py", "cpu.py", "selective_cpu.py")

# "contract" allows fused multiply-add, but no reordering of sums and no assumption that there is no NaN.
_OPTIONS = dict(nogil=True, error_model="numpy", fastmath={"contract"})
# A call left in an inner loop would keep the compiler from vectorising it.
jit = njit(forceinline=True, **_OPTIONS)
inline_overload = partial(overload, jit_options=dict(forceinline=True, **_OPTIONS))


def _sources() -> str:
    """Returns a digest of all kernels' sources: numba itself checks only the file of the outermost function."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


class _Cache(FunctionCache):
    """numba's disk cache, tied to all sources; it only warns where it is damaged or cannot be written."""

    def __init__(self, function):
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(self._cache_path, self._impl.filename_base, _sources())

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # a damaged pickle raises anything
            warnings.warn(
                f"{self._cache_path}: a compiled CPU kernel there is damaged ({type(error).__name__}: {error}); "
                "it is compiled anew, which takes seconds",
                stacklevel=2,
            )
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError as error:
            warnings.warn(
                f"{self._cache_path}: a compiled CPU kernel could not be kept there, so other processes compile it "
                f"anew, which takes seconds: {error}",
                stacklevel=2,
            )


def cached_jit(function):
    kernel = njit(**_OPTIONS)(function)
    try:
        kernel._cache = _Cache(function)
    except (RuntimeError, OSError) as error:
        warnings.warn(
            f"the CPU kernels are compiled anew in this process, which takes seconds: {error}; "
            "set NUMBA_CACHE_DIR to a folder that can be written",
            stacklevel=2,
        )
    return kernel


# --- element types ---------------------------------------------------------------------------------------

# numba has no float16 or bfloat16 on a CPU: int16 and uint16 represent them.
ELEMENT_TAGS = {
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
    torch.float16: np.int16(0),
    torch.bfloat16: np.uint16(0),
}
_STORAGE = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.int16: ir.HalfType(),
    types.uint16: ir.IntType(16),
}
REGIONS = 10
_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _compute_type(element):
    return types.float64 if element == types.float64 else types.float32


def _element_pointer(builder, element, address, index):
    return builder.gep(builder.inttoptr(address, _STORAGE[element].as_pointer()), [index])


def _declare_no_overlap(module, instruction, region):
    """Declares that regions of memory, 0 to 9, never overlap.

    The compiler then vectorises without run-time checks, for which there would be too many regions.
    """
    domain = module.add_metadata(["minrnn"])
    scopes = [module.add_metadata([f"minrnn region {i}", domain]) for i in range(REGIONS)]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[region]]))
    instruction.set_metadata("noalias", module.add_metadata(scopes[:region] + scopes[region + 1 :]))


@intrinsic(prefer_literal=True)
def load(typingctx, region, element, address, index):
    """Returns the element at `address` + `index` elements, in the compute type."""

    def codegen(context, builder, signature, args):
        value = builder.load(_element_pointer(builder, element, args[2], args[3]))
        _declare_no_overlap(builder.module, value, region.literal_value)
        if element == types.int16:
            return builder.fpext(value, ir.FloatType())
        if element == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(value, _I32), _I32(16)), ir.FloatType())
        return value

    return _compute_type(element)(region, element, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def store(typingctx, region, element, address, index, value):
    """Writes a value of the compute type, rounded to nearest even where the element is narrower."""

    def codegen(context, builder, signature, args):
        value = args[4]
        if element == types.int16:
            value = builder.fptrunc(value, ir.HalfType())
        elif element == types.uint16:
            bits = builder.bitcast(value, _I32)
            odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
            rounded = builder.lshr(builder.add(builder.add(bits, odd), _I32(0x7FFF)), _I32(16))
            is_nan = builder.fcmp_unordered("uno", value, value)
            value = builder.trunc(builder.select(is_nan, _I32(0x7FC0), rounded), ir.IntType(16))
        written = builder.store(value, _element_pointer(builder, element, args[2], args[3]))
        _declare_no_overlap(builder.module, written, region.literal_value)
        return context.get_dummy_value()

    return types.void(region, element, types.int64, types.int64, _compute_type(element)), codegen


@intrinsic
def load_bool(typingctx, address):
    def codegen(context, builder, signature, args):
        byte = builder.load(builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return builder.icmp_unsigned("!=", byte, ir.IntType(8)(0))

    return types.boolean(types.int64), codegen


@intrinsic
def copy_element(typingctx, element, source, source_index, target, target_index):
    def codegen(context, builder, signature, args):
        value = builder.load(_element_pointer(builder, element, args[1], args[2]))
        builder.store(value, _element_pointer(builder, element, args[3], args[4]))
        return context.get_dummy_value()

    return types.void(element, types.int64, types.int64, types.int64, types.int64), codegen


def zero_of(element):
    raise NotImplementedError("compiled only")


@inline_overload(zero_of)
def _(element):
    """Returns zero in the compute type."""
    zero = np.float64(0) if element == types.float64 else np.float32(0)
    return lambda element: zero


@jit
def row_at(stream, b, t):
    return stream[0] + b * stream[1] + t * stream[2]


# --- the exponential ---------------------------------------------------------------------------------------
# exp(x) = 2^n p(r), n = round(x / ln 2), r = x - n ln 2. Adding 1.5 * 2^23 (2^52 in float64) rounds to an
# integer and leaves n in the low bits; a shift moves it into the exponent. At the lower bound n is -127 (-1023),
# whose exponent bits are all zero, so the result is 0, as it should be.


@intrinsic
def _times_power_of_two(typingctx, p, shifted):
    """Returns p * 2^n, where n is in the low bits of `shifted`."""

    def codegen(context, builder, signature, args):
        integer, mantissa, bias = (_I64, 52, 1023) if p == types.float64 else (_I32, 23, 127)
        exponent = builder.shl(builder.bitcast(args[1], integer), integer(mantissa))
        scale = builder.bitcast(builder.add(exponent, integer(bias << mantissa)), args[0].type)
        return builder.fmul(args[0], scale, flags=["contract"])

    return p(p, shifted), codegen


def bounded_exp(x):
    """Returns exp(x) for x between the lower bound and 0."""
    raise NotImplementedError("compiled only")


@inline_overload(bounded_exp)
def _(x):
    if x == types.float64:
        inverse_ln2, round_shift = 1 / math.log(2), 1.5 * 2**52
        ln2_high, ln2_low = 6.93147180369123816490e-01, 1.90821492927058770002e-10
        taylor = tuple(1 / math.factorial(k) for k in range(12, -1, -1))
        highest = 1 / math.factorial(13)

        def bounded_exp(x):
            shifted = x * inverse_ln2 + round_shift
            n = shifted - round_shift
            r = (x - n * ln2_high) - n * ln2_low
            p = highest
            for c in taylor:
                p = p * r + c
            return _times_power_of_two(p, shifted)

        return bounded_exp

    f = np.float32
    inverse_ln2, round_shift = f(1 / math.log(2)), f(1.5 * 2**23)
    ln2_high, ln2_low = f(0.693145751953125), f(1.428606765330187e-06)
    # Minimax on [-ln2 / 2, ln2 / 2] with p(0) = 1: relative error 2e-9.
    c6, c5, c4 = f(0.0013843607), f(0.008374196), f(0.041668005)
    c3, c2, one = f(0.1666643), f(0.49999994), f(1)

    def bounded_exp(x):
        shifted = x * inverse_ln2 + round_shift
        n = shifted - round_shift
        r = (x - n * ln2_high) - n * ln2_low
        p = ((((c6 * r + c5) * r + c4) * r + c3) * r + c2) * r + one
        return _times_power_of_two(p * r + one, shifted)

    return bounded_exp


def _lower_bound(x):
    raise NotImplementedError("compiled only")


@inline_overload(_lower_bound)
def _(x):
    bound = -709.0 if x == types.float64 else np.float32(-88)
    return lambda x: bound


@jit
def exp_minus_abs(x):
    """Returns exp(-|x|); NaN stays NaN."""
    y = -abs(x)
    bound = _lower_bound(x)
    return bounded_exp(bound if y < bound else y)


@jit
def exp_minus_abs_finite(x):
    """Returns exp(-|x|), or 0 for NaN, so that NaN does not spread to values computed with it."""
    y = -abs(x)
    bound = _lower_bound(x)
    return bounded_exp(y if y > bound else bound)


def constant(x, value):
    raise NotImplementedError("compiled only")


@inline_overload(constant)
def _(x, value):
    """Returns the constant in x's type: a Python number would widen float32 to float64."""
    if x == types.float64:
        return lambda x, value: np.float64(value)
    return lambda x, value: np.float32(value)


# --- threads -----------------------------------------------------------------------------------------------


def in_threads(run, shares: list[tuple]) -> None:
    """Calls `run(*share)` for every share: the first in this thread, the others in the process's pool."""
    futures = []
    for share in shares[1:]:
        try:
            futures.append(_threads(os.getpid()).submit(run, *share))
        except RuntimeError:  # the interpreter is shutting down and starts no more threads
            run(*share)
    run(*shares[0])
    for future in futures:
        future.result()


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Returns the process's pool, which starts threads when needed; a forked child has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), "minrnn")
