"""The scans on a CPU: gates fused with the recurrence, compiled with numba, forward and backward.

Memory bandwidth limits the speed: minGRU in float32 moves 12 bytes per element forward (read gate and candidate,
write h) and 24 backward (read gate, candidate, h and its gradient, write two gradients); nothing else is saved or
moved. Next come two exponentials and one division per element in either direction, so the exponential is a
polynomial that the compiler vectorises.

A kernel loops over time outside and over a row of channels inside, in blocks of 16 or 32. The last block of a row
overlaps the one before it, which avoids a scalar remainder: it computes a few channels twice, from its own carried
state, and writes the same values again. Rows shorter than a block are copied into one.

Kernels take the address of a tensor's first element and its strides, so that views cost nothing (and numpy has no
bfloat16). A kernel is specialised by the types of two tags, the cell and the element type. There are as many threads
as torch uses, each with a fixed share of the batch or the channels, so that results do not depend on timing.
"""

import contextlib
import hashlib
import math
import os
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.extending import intrinsic, overload
from torch import Tensor

from .cells import CELLS, LINEAR, Cell

# Channels per block. The linear scan's loop over a block is so short that the compiler unrolls one of 16 before
# vectorising it, and then vectorises badly; with 32 it does not. The gated cells are slower with more than 16.
LANES, LINEAR_LANES = 16, 32
# Bytes of a block of the widest element, and the number of such slots for rows shorter than a block.
SLOT = LINEAR_LANES * 8
SCRATCH_SLOTS = 8
# Below this many elements per thread another thread costs more than it saves.
MIN_ELEMENTS_PER_THREAD = 1 << 18
# The least number of channels per thread: threads that work side by side on the same rows disturb each other's
# prefetching (at D = 64 two threads took three times as long as one).
MIN_PIECE = 1 << 12
# Elements of one time step that are processed together if time is the outermost dimension: their carried states stay
# in the L1 cache.
CARRY_ELEMENTS = 1 << 12

# "contract" allows fused multiply-add, but no reordering of sums and no assumption that there is no NaN.
_OPTIONS = dict(nogil=True, error_model="numpy", fastmath={"contract"})
# A call left in an inner loop would keep the compiler from vectorising it.
_jit = njit(forceinline=True, **_OPTIONS)
_overload = partial(overload, jit_options=dict(forceinline=True, **_OPTIONS))


def _sources() -> str:
    """Returns a digest of all kernels' sources: numba itself checks only the file of the outermost function."""
    digest = hashlib.sha256()
    for name in ("cells.py", "cpu.py", "selective_cpu.py"):
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


def _cached_jit(function):
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
_ELEMENT_TAGS = {
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
_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _compute_type(element):
    return types.float64 if element == types.float64 else types.float32


def _element_pointer(builder, element, address, index):
    return builder.gep(builder.inttoptr(address, _STORAGE[element].as_pointer()), [index])


def _declare_no_overlap(module, instruction, stream):
    """Declares that streams never overlap: inputs (0), the carried state (1), each tensor written (2, 3, 4).

    The compiler then vectorises without run-time checks, for which there would be too many streams.
    """
    domain = module.add_metadata(["minrnn"])
    scopes = [module.add_metadata([f"minrnn stream {i}", domain]) for i in range(5)]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[stream]]))
    instruction.set_metadata("noalias", module.add_metadata(scopes[:stream] + scopes[stream + 1 :]))


@intrinsic(prefer_literal=True)
def _load(typingctx, stream, element, address, index):
    """Returns the element at `address` + `index` elements, in the compute type."""

    def codegen(context, builder, signature, args):
        value = builder.load(_element_pointer(builder, element, args[2], args[3]))
        _declare_no_overlap(builder.module, value, stream.literal_value)
        if element == types.int16:
            return builder.fpext(value, ir.FloatType())
        if element == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(value, _I32), _I32(16)), ir.FloatType())
        return value

    return _compute_type(element)(stream, element, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def _store(typingctx, stream, element, address, index, value):
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
        store = builder.store(value, _element_pointer(builder, element, args[2], args[3]))
        _declare_no_overlap(builder.module, store, stream.literal_value)
        return context.get_dummy_value()

    return types.void(stream, element, types.int64, types.int64, _compute_type(element)), codegen


@intrinsic
def _copy_element(typingctx, element, source, source_index, target, target_index):
    def codegen(context, builder, signature, args):
        value = builder.load(_element_pointer(builder, element, args[1], args[2]))
        builder.store(value, _element_pointer(builder, element, args[3], args[4]))
        return context.get_dummy_value()

    return types.void(element, types.int64, types.int64, types.int64, types.int64), codegen


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


def _bounded_exp(x):
    """Returns exp(x) for x between the lower bound and 0."""
    raise NotImplementedError("compiled only")


@_overload(_bounded_exp)
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


@_overload(_lower_bound)
def _(x):
    bound = -709.0 if x == types.float64 else np.float32(-88)
    return lambda x: bound


@_jit
def _exp_minus_abs(x):
    """Returns exp(-|x|); NaN stays NaN."""
    y = -abs(x)
    bound = _lower_bound(x)
    return _bounded_exp(bound if y < bound else y)


@_jit
def _exp_minus_abs_finite(x):
    """Returns exp(-|x|), or 0 for NaN, so that NaN does not spread to values computed with it."""
    y = -abs(x)
    bound = _lower_bound(x)
    return _bounded_exp(y if y > bound else bound)


def _like(x, value):
    raise NotImplementedError("compiled only")


@_overload(_like)
def _(x, value):
    """Returns the constant in x's type: a Python number would widen float32 to float64."""
    if x == types.float64:
        return lambda x, value: np.float64(value)
    return lambda x, value: np.float32(value)


# --- the cells ---------------------------------------------------------------------------------------------
# `_coefficients` returns (a, b). `_gradients` takes the gradient s that reaches a state and the `previous` state;
# it returns the gradient passed on to `previous` (a s) and those of gate, input_gate (a dummy if there is none) and
# candidate. For the linear scan, a and b replace gate and candidate; for minLSTM, gate is the forget gate. The
# formulas are those of cells.py.

# One type per cell: numba specialises by type, and its cache on disk finds a type by its name in this module.
_CELLS = {namedtuple(f"_{name}", (), module=__name__): cell for name, cell in CELLS.items()}
globals().update({tag.__name__: tag for tag in _CELLS})
_TAGS = {cell: tag() for tag, cell in _CELLS.items()}


@_jit
def _sigmoids(x, e, reciprocal):
    """Returns sigmoid(x), sigmoid(-x) from e = exp(-|x|) and 1 / (1 + e), both to full relative precision."""
    small = e * reciprocal
    return (reciprocal, small) if x >= _like(x, 0.0) else (small, reciprocal)


@_jit
def _g(x, e, reciprocal):
    return e * reciprocal if x < _like(x, 0.0) else x + _like(x, 0.5)


@_jit
def _g_slope(x, g):
    """Returns dg/dx, given g(x)."""
    one = _like(x, 1.0)
    return one if x >= _like(x, 0.0) else g * (one - g)


@_jit
def _times_difference(s, x, y):
    """Returns s x - s y: factored for precision where x is near y, unfactored if s is not finite."""
    return s * (x - y) if abs(s) < _like(s, np.inf) else s * x - s * y


@_jit
def _mingru_parts(gate, candidate):
    """Returns 1 - z, z, g(candidate), with one division instead of two."""
    one = _like(gate, 1.0)
    e_gate, e_candidate = _exp_minus_abs(gate), _exp_minus_abs_finite(candidate)
    gate_sum, candidate_sum = one + e_gate, one + e_candidate
    reciprocal = one / (gate_sum * candidate_sum)
    take, a = _sigmoids(gate, e_gate, reciprocal * candidate_sum)
    return a, take, _g(candidate, e_candidate, reciprocal * gate_sum)


@_jit
def _mingru_identity_parts(gate, candidate):
    one = _like(gate, 1.0)
    e = _exp_minus_abs(gate)
    take, a = _sigmoids(gate, e, one / (one + e))
    return a, take, candidate


@_jit
def _g_of(x):
    one = _like(x, 1.0)
    e = _exp_minus_abs_finite(x)
    return _g(x, e, one / (one + e))


@_jit
def _normalized_gates(forget_gate, input_gate):
    """Returns f / (f + i), i / (f + i), 1 - f, 1 - i, where f and i are the gates' sigmoids.

    sigmoid(x) = exp(min(x, 0)) / (1 + exp(-|x|)). Only the ratio of the two exp(min(x, 0)) is computed, so that two
    gates far below zero do not give 0 / 0.
    """
    zero, one = _like(forget_gate, 0.0), _like(forget_gate, 1.0)
    e_forget, e_input = _exp_minus_abs(forget_gate), _exp_minus_abs(input_gate)
    ratio = min(forget_gate, zero) - min(input_gate, zero)
    e_ratio = _exp_minus_abs(ratio)
    forget_sum, input_sum = one + e_forget, one + e_input
    forget = (e_ratio if ratio < zero else one) * input_sum
    take = (one if ratio < zero else e_ratio) * forget_sum
    r = one / (forget + take)
    _, not_forget = _sigmoids(forget_gate, e_forget, one / forget_sum)
    _, not_input = _sigmoids(input_gate, e_input, one / input_sum)
    return forget * r, take * r, not_forget, not_input


@_jit
def _unnormalized_gates(forget_gate, input_gate):
    """Returns f, i, 1 - f, 1 - i, where f and i are the gates' sigmoids."""
    one = _like(forget_gate, 1.0)
    e_forget, e_input = _exp_minus_abs(forget_gate), _exp_minus_abs(input_gate)
    a, not_forget = _sigmoids(forget_gate, e_forget, one / (one + e_forget))
    take, not_input = _sigmoids(input_gate, e_input, one / (one + e_input))
    return a, take, not_forget, not_input


@_jit
def _signed(a, take):
    """Returns 2 a - 1, 1 - |2 a - 1| and the sign of 2 a - 1, for a + take = 1.

    The gates must not share a division with the candidate as in `_mingru_parts`: rounding would move a from 1 to
    1 - 6e-8, and a state that only flips its sign would decay.
    """
    zero, one = _like(a, 0.0), _like(a, 1.0)
    keep = a - take
    return keep, _like(a, 2.0) * min(a, take), one if keep > zero else (-one if keep < zero else zero)


def _coefficients(tag, gate, input_gate, candidate):
    raise NotImplementedError("compiled only")


def _gradients(tag, gate, input_gate, candidate, s, previous):
    raise NotImplementedError("compiled only")


@_overload(_coefficients)
def _(tag, gate, input_gate, candidate):
    cell = _CELLS[tag.instance_class]
    has_g, signed, normalize = cell.activation == "g", cell.signed, cell.normalize
    if cell.kind == "linear":
        return lambda tag, gate, input_gate, candidate: (gate, candidate)
    if cell.kind == "mingru":
        parts = _mingru_parts if has_g and not signed else _mingru_identity_parts

        def mingru(tag, gate, input_gate, candidate):
            a, take, c = parts(gate, candidate)
            if signed:
                a, take, _ = _signed(a, take)
                c = _g_of(candidate) if has_g else c
            return a, take * c

        return mingru
    gates = _normalized_gates if normalize else _unnormalized_gates

    def minlstm(tag, gate, input_gate, candidate):
        a, take, not_forget, _ = gates(gate, input_gate)
        if signed:
            if normalize:
                a, take, _ = _signed(a, take)
            else:
                a = a - not_forget
        return a, take * (_g_of(candidate) if has_g else candidate)

    return minlstm


@_overload(_gradients)
def _(tag, gate, input_gate, candidate, s, previous):
    cell = _CELLS[tag.instance_class]
    has_g, signed, normalize = cell.activation == "g", cell.signed, cell.normalize
    if cell.kind == "linear":
        return lambda tag, gate, input_gate, candidate, s, previous: (gate * s, s * previous, s, s)
    if cell.kind == "mingru":
        parts = _mingru_parts if has_g and not signed else _mingru_identity_parts

        def mingru(tag, gate, input_gate, candidate, s, previous):
            a, take, c = parts(gate, candidate)
            if signed:
                c = _g_of(candidate) if has_g else c
                keep, left, sign = _signed(a, take)
                d_c = s * left
                d_gate = _like(a, 2.0) * a * _times_difference(s * take, sign * c, previous)
                return keep * s, d_gate, d_gate, d_c * _g_slope(candidate, c) if has_g else d_c
            d_c = s * take
            d_gate = a * _times_difference(d_c, c, previous)
            return a * s, d_gate, d_gate, d_c * _g_slope(candidate, c) if has_g else d_c

        return mingru
    gates = _normalized_gates if normalize else _unnormalized_gates

    def minlstm(tag, gate, input_gate, candidate, s, previous):
        a, take, not_forget, not_input = gates(gate, input_gate)
        c = _g_of(candidate) if has_g else candidate
        d_c = s * take
        if signed and normalize:
            keep, left, sign = _signed(a, take)
            d_balance = _like(a, 2.0) * a * _times_difference(d_c, previous, sign * c)
            d_c = s * left
            d_gate, d_input_gate = d_balance * not_forget, -d_balance * not_input
            a = keep
        elif signed:
            d_gate, d_input_gate = _like(a, 2.0) * s * previous * a * not_forget, d_c * c * not_input
            a = a - not_forget
        elif normalize:
            d_balance = a * _times_difference(d_c, previous, c)
            d_gate, d_input_gate = d_balance * not_forget, -d_balance * not_input
        else:
            d_gate, d_input_gate = s * previous * a * not_forget, d_c * c * not_input
        return a * s, d_gate, d_input_gate, d_c * _g_slope(candidate, c) if has_g else d_c

    return minlstm


def _lanes(tag):
    return LINEAR_LANES if _CELLS[type(tag)] == LINEAR else LANES


@_overload(_lanes)
def _(tag):
    lanes = LINEAR_LANES if _CELLS[tag.instance_class] == LINEAR else LANES
    return lambda tag: lanes


# --- kernels -----------------------------------------------------------------------------------------------
# A stream is (address of its first element, stride over the batch, stride over time), in bytes; its rows are
# contiguous. `carry` holds the carried states of the rows processed together, each padded to whole blocks.


@_jit
def _at(stream, b, t):
    return stream[0] + b * stream[1] + t * stream[2]


@_jit
def _block_start(block, lanes, width):
    return max(0, min(block * lanes, width - lanes))


@_jit
def _begin_carry(element, h0, b, lanes, width, carry, carry_start, blocks):
    zero = _zero(element)
    for j in range(blocks):
        start = _block_start(j, lanes, width)
        for k in range(min(lanes, width)):
            state = _load(0, element, _at(h0, b, 0), start + k) if h0[0] != 0 else zero
            _store(1, zero, carry, carry_start + j * lanes + k, state)


@_jit
def _clear_carry(element, carry, carry_start, count):
    zero = _zero(element)
    for k in range(count):
        _store(1, zero, carry, carry_start + k, zero)


def _zero(element):
    raise NotImplementedError("compiled only")


@_overload(_zero)
def _(element):
    """Returns zero in the compute type."""
    zero = np.float64(0) if element == types.float64 else np.float32(0)
    return lambda element: zero


@_jit
def _reset_at(resets, b, t):
    return resets[0] != 0 and _load_bool(_at(resets, b, t))


@intrinsic
def _load_bool(typingctx, address):
    def codegen(context, builder, signature, args):
        byte = builder.load(builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return builder.icmp_unsigned("!=", byte, ir.IntType(8)(0))

    return types.boolean(types.int64), codegen


@_jit
def _copy_row(element, source, target, width):
    for i in range(width):
        _copy_element(element, source, i, target, i)


@_jit
def _forward_block(tag, element, gate, input_gate, candidate, out, start, carry, carry_start):
    zero = _zero(element)
    for k in range(_lanes(tag)):
        i = start + k
        a, b = _coefficients(
            tag, _load(0, element, gate, i), _load(0, element, input_gate, i), _load(0, element, candidate, i)
        )
        h = a * _load(1, zero, carry, carry_start + k) + b
        _store(1, zero, carry, carry_start + k, h)
        _store(2, element, out, i, h)


@_cached_jit
def _forward(
    tag, element, gate, input_gate, candidate, h0, resets, out,
    bounds, b_start, b_stop, together, width, carry, scratch,
):  # fmt: skip
    lanes = _lanes(tag)
    blocks = (width + lanes - 1) // lanes
    padded = blocks * lanes
    for b_first in range(b_start, b_stop, together):
        b_last = min(b_first + together, b_stop)
        for b in range(b_first, b_last):
            _begin_carry(element, h0, b, lanes, width, carry, (b - b_first) * padded, blocks)
        for t in range(bounds[b_first, 0], bounds[b_first, 1]):
            for b in range(b_first, b_last):
                carry_start = (b - b_first) * padded
                if _reset_at(resets, b, t):
                    _clear_carry(element, carry, carry_start, padded)
                r_gate, r_input_gate, r_candidate = _at(gate, b, t), _at(input_gate, b, t), _at(candidate, b, t)
                r_out = _at(out, b, t)
                if width < lanes:
                    s_gate, s_input_gate, s_candidate = scratch, scratch + SLOT, scratch + 2 * SLOT
                    s_out = scratch + 3 * SLOT
                    _copy_row(element, r_gate, s_gate, width)
                    _copy_row(element, r_input_gate, s_input_gate, width)
                    _copy_row(element, r_candidate, s_candidate, width)
                    _forward_block(tag, element, s_gate, s_input_gate, s_candidate, s_out, 0, carry, carry_start)
                    _copy_row(element, s_out, r_out, width)
                else:
                    for j in range(blocks):
                        start = _block_start(j, lanes, width)
                        _forward_block(
                            tag, element, r_gate, r_input_gate, r_candidate, r_out,
                            start, carry, carry_start + j * lanes,
                        )  # fmt: skip


@_jit
def _backward_block(
    tag, element, gate, input_gate, candidate, previous, grad, grad_gate, grad_input_gate, grad_candidate,
    start, carry, carry_start,
):  # fmt: skip
    zero = _zero(element)
    for k in range(_lanes(tag)):
        i = start + k
        onward, d_gate, d_input_gate, d_candidate = _gradients(
            tag,
            _load(0, element, gate, i),
            _load(0, element, input_gate, i),
            _load(0, element, candidate, i),
            _load(0, element, grad, i) + _load(1, zero, carry, carry_start + k),
            _load(0, element, previous, i),
        )
        _store(1, zero, carry, carry_start + k, onward)
        _store(2, element, grad_gate, i, d_gate)
        _store_input_gate(tag, element, grad_input_gate, i, d_input_gate)
        _store(4, element, grad_candidate, i, d_candidate)


def _store_input_gate(tag, element, address, index, value):
    raise NotImplementedError("compiled only")


@_overload(_store_input_gate)
def _(tag, element, address, index, value):
    if "input_gate" in _CELLS[tag.instance_class].inputs:
        return lambda tag, element, address, index, value: _store(3, element, address, index, value)
    return lambda tag, element, address, index, value: None


@_cached_jit
def _backward(
    tag, element, gate, input_gate, candidate, h0, resets, h, grad,
    grad_gate, grad_input_gate, grad_candidate, grad_h0,
    bounds, b_start, b_stop, together, width, carry, scratch,
):  # fmt: skip
    lanes = _lanes(tag)
    blocks = (width + lanes - 1) // lanes
    padded = blocks * lanes
    zeros = scratch + SCRATCH_SLOTS * SLOT
    for b_first in range(b_start, b_stop, together):
        b_last = min(b_first + together, b_stop)
        _clear_carry(element, carry, 0, (b_last - b_first) * padded)
        first_t = bounds[b_first, 0]
        for t in range(bounds[b_first, 1] - 1, first_t - 1, -1):
            for b in range(b_last - 1, b_first - 1, -1):
                carry_start = (b - b_first) * padded
                reset = _reset_at(resets, b, t)
                if reset or (t == first_t and h0[0] == 0):
                    previous = zeros
                elif t == first_t:
                    previous = _at(h0, b, 0)
                else:
                    previous = _at(h, b, t - 1)
                r_gate, r_input_gate, r_candidate = _at(gate, b, t), _at(input_gate, b, t), _at(candidate, b, t)
                r_grad, r_grad_gate = _at(grad, b, t), _at(grad_gate, b, t)
                r_grad_input_gate, r_grad_candidate = _at(grad_input_gate, b, t), _at(grad_candidate, b, t)
                if width < lanes:
                    s_gate, s_input_gate, s_candidate = scratch, scratch + SLOT, scratch + 2 * SLOT
                    s_grad, s_previous, s_grad_gate = scratch + 3 * SLOT, scratch + 4 * SLOT, scratch + 5 * SLOT
                    s_grad_input_gate, s_grad_candidate = scratch + 6 * SLOT, scratch + 7 * SLOT
                    _copy_row(element, r_gate, s_gate, width)
                    _copy_row(element, r_input_gate, s_input_gate, width)
                    _copy_row(element, r_candidate, s_candidate, width)
                    _copy_row(element, r_grad, s_grad, width)
                    _copy_row(element, previous, s_previous, width)
                    _backward_block(
                        tag, element, s_gate, s_input_gate, s_candidate, s_previous, s_grad,
                        s_grad_gate, s_grad_input_gate, s_grad_candidate, 0, carry, carry_start,
                    )  # fmt: skip
                    _copy_row(element, s_grad_gate, r_grad_gate, width)
                    if r_grad_input_gate != 0:
                        _copy_row(element, s_grad_input_gate, r_grad_input_gate, width)
                    _copy_row(element, s_grad_candidate, r_grad_candidate, width)
                else:
                    for j in range(blocks - 1, -1, -1):
                        _backward_block(
                            tag, element, r_gate, r_input_gate, r_candidate, previous, r_grad,
                            r_grad_gate, r_grad_input_gate, r_grad_candidate,
                            _block_start(j, lanes, width), carry, carry_start + j * lanes,
                        )  # fmt: skip
                if reset:
                    _clear_carry(element, carry, carry_start, padded)
        if grad_h0[0] != 0:
            for b in range(b_first, b_last):
                _end_carry(element, grad_h0, b, lanes, width, carry, (b - b_first) * padded, blocks)


@_jit
def _end_carry(element, grad_h0, b, lanes, width, carry, carry_start, blocks):
    for j in range(blocks):
        start = _block_start(j, lanes, width)
        for k in range(min(lanes, width)):
            state = _load(1, _zero(element), carry, carry_start + j * lanes + k)
            _store(2, element, _at(grad_h0, b, 0), start + k, state)


# --- launch ------------------------------------------------------------------------------------------------


def forward(cell: Cell, inputs, h0, resets, cu_seqlens, reverse, out) -> None:
    """Fills `out` (B, T, D) with the states. Tensors share a dtype, with contiguous channels and any other strides."""
    _launch(_forward, cell, (*_three(inputs, inputs[-1]), h0, resets, out), cu_seqlens, reverse)


def backward(cell: Cell, inputs, h0, resets, cu_seqlens, reverse, h, grad, grads, grad_h0) -> None:
    """Fills `grads`, one for each input, and `grad_h0` (B, D) if there is an h0."""
    tensors = (*_three(inputs, inputs[-1]), h0, resets, h, grad, *_three(grads, None), grad_h0)
    _launch(_backward, cell, tensors, cu_seqlens, reverse)


def _three(tensors, input_gate):
    """Returns gate, input_gate and candidate; `input_gate` replaces that of a cell without one."""
    return tensors if len(tensors) == 3 else (tensors[0], input_gate, tensors[1])


def _launch(kernel, cell, tensors, cu_seqlens: Tensor | None, reverse: bool) -> None:
    like = tensors[0]
    B, T, D = like.shape
    compute = np.float64 if like.dtype == torch.float64 else np.float32
    time_outermost = cu_seqlens is None and like.stride(1) > like.stride(0)
    if cu_seqlens is not None:
        # The first step of each sequence and the one after its last; reversal is by negative strides.
        edges = cu_seqlens.numpy()
        bounds = np.stack([edges[:-1], edges[1:]], 1) if not reverse else T - np.stack([edges[1:], edges[:-1]], 1)
        shares = _shares(edges, D)
    else:
        bounds = np.tile(np.array([[0, T]]), (B, 1))
        shares = _shares(np.arange(B + 1) * T, D)

    tag = _TAGS[cell]
    lanes = _lanes(tag)

    def run(b_start, b_stop, d_start, d_stop):
        width = d_stop - d_start
        padded = -(-width // lanes) * lanes
        together = max(1, min(b_stop - b_start, CARRY_ELEMENTS // padded)) if time_outermost else 1
        carry = np.empty(together * padded, compute)
        scratch = np.zeros(SCRATCH_SLOTS * SLOT + padded * 8, np.uint8)
        streams = (_stream(x, d_start, reverse) for x in tensors)
        kernel(
            tag, _ELEMENT_TAGS[like.dtype], *streams,
            bounds, b_start, b_stop, together, width, carry.ctypes.data, scratch.ctypes.data,
        )  # fmt: skip

    in_threads(run, shares)


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


def _shares(edges: np.ndarray, D: int) -> list[tuple[int, int, int, int]]:
    """Returns (b_start, b_stop, d_start, d_stop) per thread; channels are divided if the batch is too small.

    `edges` (B + 1,) holds the number of steps before each sequence, and the total.
    """
    B, steps = len(edges) - 1, int(edges[-1])
    threads = max(1, min(torch.get_num_threads(), steps * D // MIN_ELEMENTS_PER_THREAD))
    pieces = 1 if B >= 4 * threads else max(1, min(threads // math.gcd(B, threads), D // MIN_PIECE))
    rows = min(B, threads // pieces)
    blocks = -(-D // LINEAR_LANES)
    b_edges = [int(b) for b in np.searchsorted(edges, [i * steps / rows for i in range(rows + 1)])]
    d_edges = [min(D, i * blocks // pieces * LINEAR_LANES) for i in range(pieces + 1)]
    return [(*b, *d) for b in pairwise(b_edges) if b[0] < b[1] for d in pairwise(d_edges)]


def _stream(x: Tensor | None, d: int, reverse: bool) -> tuple[int, int, int]:
    """Returns the stream of a (B, T, D) or (B, D) tensor from channel `d` on, or of (B, T) resets.

    A batch of 1 has stride 0, because packed sequences share its row.
    """
    if x is None:
        return 0, 0, 0
    size = x.element_size()
    if x.dtype == torch.bool:
        address, t_stride = x.data_ptr(), x.stride(1) * size
    else:
        address, t_stride = x.data_ptr() + d * size, x.stride(1) * size if x.dim() == 3 else 0
    b_stride = 0 if x.shape[0] == 1 else x.stride(0) * size
    if reverse and t_stride:
        return address + (x.shape[1] - 1) * t_stride, b_stride, -t_stride
    return address, b_stride, t_stride
