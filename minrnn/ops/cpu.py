"""The scans on a CPU: gates fused with the recurrence, compiled with numba, forward and backward.

What decides the speed is memory: minGRU in float32 needs 12 bytes an element forward (read gate and
candidate, write h) and 24 backward (read gate, candidate, h and its gradient, write two gradients); nothing
else is saved or moved. Next come two exponentials and one division an element in either direction, so the
exponential is a polynomial that the compiler vectorises.

A kernel walks time in the outer loop and a row of channels in the inner one, in blocks of 16 or 32. The last
block of a row overlaps the one before it instead of falling into a scalar remainder: it computes a few
channels twice, from a carried state of its own, and writes the same values again. Rows shorter than a block
are copied into one.

Tensors enter as the address of their first element and their strides, so that views cost nothing (and numpy
has no bfloat16). A kernel is specialised by the types of two tags, the cell and the element type. Threads are
torch's number of threads, each with a fixed share of the batch or the channels, so that results do not depend
on timing.
"""

import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

# Channels of a block. A block of the linear scan is so short a loop that the compiler unrolls one of 16 before it
# comes to vectorise it, and then does that badly; with 32 it does not. The gated ones lose by more than 16.
LANES, LINEAR_LANES = 16, 32
# Bytes of a block of the widest element, and how many a row shorter than a block is worked on in.
SLOT = LINEAR_LANES * 8
SCRATCH_SLOTS = 8
# Below this many elements a further thread costs more than it saves.
MIN_ELEMENTS_PER_THREAD = 1 << 18
# Channels are divided among threads in pieces no smaller than this: threads that walk side by side through
# the same rows disturb each other's prefetching (at D = 64 two threads took three times as long as one).
MIN_PIECE = 1 << 12
# Rows of one time step that are walked together, where time is the outermost dimension: their carried
# states stay in the nearest cache.
CARRY_ELEMENTS = 1 << 12

# "contract" allows fused multiply-add; nothing that would reorder sums or assume NaN away.
_OPTIONS = dict(nogil=True, error_model="numpy", fastmath={"contract"})
# A call left in an inner loop would keep the compiler from vectorising it.
_jit = njit(forceinline=True, **_OPTIONS)
_overload = partial(overload, jit_options=dict(forceinline=True, **_OPTIONS))


def _cached_jit(function):
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError as error:
        warnings.warn(
            f"the CPU kernels are compiled anew in this process, which takes seconds: {error}; "
            "set NUMBA_CACHE_DIR to a folder that can be written",
            stacklevel=2,
        )
        return njit(**_OPTIONS)(function)


# --- element types ---------------------------------------------------------------------------------------

# numba has no float16 and bfloat16 on a CPU: int16 and uint16 stand for them.
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
    """Streams never overlap: what is read (0), the carried state (1), each tensor written (2, 3, 4).

    The compiler then vectorises without checks at run time, of which it would accept too few.
    """
    domain = module.add_metadata(["minrnn"])
    scopes = [module.add_metadata([f"minrnn stream {i}", domain]) for i in range(5)]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[stream]]))
    instruction.set_metadata("noalias", module.add_metadata(scopes[:stream] + scopes[stream + 1 :]))


@intrinsic(prefer_literal=True)
def _load(typingctx, stream, element, address, index):
    """The element at `address` + `index` elements, in the compute type."""

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
# integer and leaves n in the low bits, whence a shift brings it into the exponent. At the lower bound n is
# -127 (-1023), whose exponent bits are all zero: the result is 0 there, as it should be.


@intrinsic
def _times_power_of_two(typingctx, p, shifted):
    """p * 2^n, n being in the low bits of `shifted`."""

    def codegen(context, builder, signature, args):
        integer, mantissa, bias = (_I64, 52, 1023) if p == types.float64 else (_I32, 23, 127)
        exponent = builder.shl(builder.bitcast(args[1], integer), integer(mantissa))
        scale = builder.bitcast(builder.add(exponent, integer(bias << mantissa)), args[0].type)
        return builder.fmul(args[0], scale, flags=["contract"])

    return p(p, shifted), codegen


def _bounded_exp(x):
    """exp(x) for x between the lower bound and 0."""
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
    """exp(-|x|); NaN stays NaN."""
    y = -abs(x)
    bound = _lower_bound(x)
    return _bounded_exp(bound if y < bound else y)


@_jit
def _exp_minus_abs_finite(x):
    """exp(-|x|); 0 for NaN, so that it cannot spoil what is computed beside it."""
    y = -abs(x)
    bound = _lower_bound(x)
    return _bounded_exp(y if y > bound else bound)


def _like(x, value):
    raise NotImplementedError("compiled only")


@_overload(_like)
def _(x, value):
    """The constant in x's type: a Python number would widen float32 to float64."""
    if x == types.float64:
        return lambda x, value: np.float64(value)
    return lambda x, value: np.float32(value)


# --- the cells ---------------------------------------------------------------------------------------------
# A cell's tag is a type of its own. `_coefficients` gives (a, b); `_gradients` gives, for the gradient s that
# reaches a state and the state `previous` to it, the gradient that goes on to `previous` (a s) and those of
# the three inputs (a dummy where there is no third). The formulas are those of cells.py.


class _Linear(NamedTuple):
    pass


class _MinGRU(NamedTuple):
    pass


class _MinGRUIdentity(NamedTuple):
    pass


class _MinLSTM(NamedTuple):
    pass


class _MinLSTMIdentity(NamedTuple):
    pass


class _MinLSTMUnnormalized(NamedTuple):
    pass


class _MinLSTMUnnormalizedIdentity(NamedTuple):
    pass


_CELL_TAGS = {
    "linear": _Linear(),
    "mingru_g": _MinGRU(),
    "mingru_identity": _MinGRUIdentity(),
    "minlstm_g": _MinLSTM(),
    "minlstm_identity": _MinLSTMIdentity(),
    "minlstm_unnormalized_g": _MinLSTMUnnormalized(),
    "minlstm_unnormalized_identity": _MinLSTMUnnormalizedIdentity(),
}


@_jit
def _sigmoids(x, e, reciprocal):
    """sigmoid(x) and sigmoid(-x) from e = exp(-|x|) and 1 / (1 + e): both to full relative precision."""
    small = e * reciprocal
    return (reciprocal, small) if x >= _like(x, 0.0) else (small, reciprocal)


@_jit
def _g(x, e, reciprocal):
    return e * reciprocal if x < _like(x, 0.0) else x + _like(x, 0.5)


@_jit
def _g_slope(x, g):
    """dg/dx, given g(x)."""
    one = _like(x, 1.0)
    return one if x >= _like(x, 0.0) else g * (one - g)


@_jit
def _times_difference(s, x, y):
    """s x - s y. Factored it is more precise where x is near y; unfactored it is NaN or infinite as it should be."""
    return s * (x - y) if abs(s) < _like(s, np.inf) else s * x - s * y


@_jit
def _mingru_parts(gate, candidate):
    """z, 1 - z, g(candidate): the two divisions are made one."""
    one = _like(gate, 1.0)
    e_gate, e_candidate = _exp_minus_abs(gate), _exp_minus_abs_finite(candidate)
    gate_sum, candidate_sum = one + e_gate, one + e_candidate
    reciprocal = one / (gate_sum * candidate_sum)
    z, keep = _sigmoids(gate, e_gate, reciprocal * candidate_sum)
    return z, keep, _g(candidate, e_candidate, reciprocal * gate_sum)


@_jit
def _mingru_identity_parts(gate, candidate):
    one = _like(gate, 1.0)
    e = _exp_minus_abs(gate)
    z, keep = _sigmoids(gate, e, one / (one + e))
    return z, keep, candidate


@_jit
def _g_of(x):
    one = _like(x, 1.0)
    e = _exp_minus_abs_finite(x)
    return _g(x, e, one / (one + e))


@_jit
def _normalized_gates(forget_gate, input_gate):
    """f' = f / (f + i), i' = i / (f + i), sigmoid(-forget_gate), sigmoid(-input_gate).

    sigmoid(x) = exp(min(x, 0)) / (1 + exp(-|x|)); of the two exp(min(x, 0)) only the ratio is formed, so that
    two gates far below zero do not become 0 / 0.
    """
    zero, one = _like(forget_gate, 0.0), _like(forget_gate, 1.0)
    e_forget, e_input = _exp_minus_abs(forget_gate), _exp_minus_abs(input_gate)
    ratio = min(forget_gate, zero) - min(input_gate, zero)
    e_ratio = _exp_minus_abs(ratio)
    forget_sum, input_sum = one + e_forget, one + e_input
    forget = (e_ratio if ratio < zero else one) * input_sum
    input_ = (one if ratio < zero else e_ratio) * forget_sum
    share = one / (forget + input_)
    _, forget_slope = _sigmoids(forget_gate, e_forget, one / forget_sum)
    _, input_slope = _sigmoids(input_gate, e_input, one / input_sum)
    return forget * share, input_ * share, forget_slope, input_slope


def _coefficients(cell, x0, x1, x2):
    raise NotImplementedError("compiled only")


def _gradients(cell, x0, x1, x2, s, previous):
    raise NotImplementedError("compiled only")


@_overload(_coefficients)
def _(cell, x0, x1, x2):
    tag = cell.instance_class
    if tag is _Linear:
        return lambda cell, x0, x1, x2: (x0, x1)
    if tag in (_MinGRU, _MinGRUIdentity):
        parts = _mingru_parts if tag is _MinGRU else _mingru_identity_parts

        def mingru(cell, x0, x1, x2):
            z, keep, c = parts(x0, x1)
            return keep, z * c

        return mingru
    has_g = tag in (_MinLSTM, _MinLSTMUnnormalized)
    if tag in (_MinLSTM, _MinLSTMIdentity):

        def minlstm(cell, x0, x1, x2):
            f, i, _, _ = _normalized_gates(x0, x1)
            return f, i * (_g_of(x2) if has_g else x2)

        return minlstm

    def minlstm_unnormalized(cell, x0, x1, x2):
        f, _, i, _ = _unnormalized_gates(x0, x1)
        return f, i * (_g_of(x2) if has_g else x2)

    return minlstm_unnormalized


@_jit
def _unnormalized_gates(forget_gate, input_gate):
    """sigmoid(forget_gate), sigmoid(-forget_gate), sigmoid(input_gate), sigmoid(-input_gate)."""
    one = _like(forget_gate, 1.0)
    e_forget, e_input = _exp_minus_abs(forget_gate), _exp_minus_abs(input_gate)
    f, forget_slope = _sigmoids(forget_gate, e_forget, one / (one + e_forget))
    i, input_slope = _sigmoids(input_gate, e_input, one / (one + e_input))
    return f, forget_slope, i, input_slope


@_overload(_gradients)
def _(cell, x0, x1, x2, s, previous):
    tag = cell.instance_class
    if tag is _Linear:
        return lambda cell, x0, x1, x2, s, previous: (x0 * s, s * previous, s, s)
    if tag in (_MinGRU, _MinGRUIdentity):
        parts = _mingru_parts if tag is _MinGRU else _mingru_identity_parts
        has_g = tag is _MinGRU

        def mingru(cell, x0, x1, x2, s, previous):
            z, keep, c = parts(x0, x1)
            dc = s * z
            return keep * s, keep * _times_difference(dc, c, previous), dc * _g_slope(x1, c) if has_g else dc, s

        return mingru
    has_g = tag in (_MinLSTM, _MinLSTMUnnormalized)
    if tag in (_MinLSTM, _MinLSTMIdentity):

        def minlstm(cell, x0, x1, x2, s, previous):
            f, i, forget_slope, input_slope = _normalized_gates(x0, x1)
            c = _g_of(x2) if has_g else x2
            dc = s * i
            balance = f * _times_difference(dc, previous, c)
            return f * s, balance * forget_slope, -balance * input_slope, dc * _g_slope(x2, c) if has_g else dc

        return minlstm

    def minlstm_unnormalized(cell, x0, x1, x2, s, previous):
        f, forget_slope, i, input_slope = _unnormalized_gates(x0, x1)
        c = _g_of(x2) if has_g else x2
        dc = s * i
        return f * s, s * previous * f * forget_slope, dc * c * input_slope, dc * _g_slope(x2, c) if has_g else dc

    return minlstm_unnormalized


def _lanes(cell):
    return LINEAR_LANES if isinstance(cell, _Linear) else LANES


@_overload(_lanes)
def _(cell):
    lanes = LINEAR_LANES if cell.instance_class is _Linear else LANES
    return lambda cell: lanes


# --- kernels -----------------------------------------------------------------------------------------------
# A stream is (address of its first element, stride over the batch, stride over time), in bytes, its rows
# contiguous. `carry` holds the carried states of the rows walked together, each padded to whole blocks.


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
    """Zero in the compute type."""
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
def _forward_block(cell, element, x0, x1, x2, out, start, carry, carry_start):
    zero = _zero(element)
    for k in range(_lanes(cell)):
        i = start + k
        a, b = _coefficients(cell, _load(0, element, x0, i), _load(0, element, x1, i), _load(0, element, x2, i))
        h = a * _load(1, zero, carry, carry_start + k) + b
        _store(1, zero, carry, carry_start + k, h)
        _store(2, element, out, i, h)


@_cached_jit
def _forward(cell, element, x0, x1, x2, h0, resets, out, T, b_start, b_stop, together, width, carry, scratch):
    lanes = _lanes(cell)
    blocks = (width + lanes - 1) // lanes
    padded = blocks * lanes
    for b_first in range(b_start, b_stop, together):
        b_last = min(b_first + together, b_stop)
        for b in range(b_first, b_last):
            _begin_carry(element, h0, b, lanes, width, carry, (b - b_first) * padded, blocks)
        for t in range(T):
            for b in range(b_first, b_last):
                carry_start = (b - b_first) * padded
                if _reset_at(resets, b, t):
                    _clear_carry(element, carry, carry_start, padded)
                r0, r1, r2, r_out = _at(x0, b, t), _at(x1, b, t), _at(x2, b, t), _at(out, b, t)
                if width < lanes:
                    s0, s1, s2, s_out = scratch, scratch + SLOT, scratch + 2 * SLOT, scratch + 3 * SLOT
                    _copy_row(element, r0, s0, width)
                    _copy_row(element, r1, s1, width)
                    _copy_row(element, r2, s2, width)
                    _forward_block(cell, element, s0, s1, s2, s_out, 0, carry, carry_start)
                    _copy_row(element, s_out, r_out, width)
                else:
                    for j in range(blocks):
                        start = _block_start(j, lanes, width)
                        _forward_block(cell, element, r0, r1, r2, r_out, start, carry, carry_start + j * lanes)


@_jit
def _backward_block(cell, element, x0, x1, x2, previous, grad, dx0, dx1, dx2, start, carry, carry_start):
    zero = _zero(element)
    for k in range(_lanes(cell)):
        i = start + k
        onward, d0, d1, d2 = _gradients(
            cell,
            _load(0, element, x0, i),
            _load(0, element, x1, i),
            _load(0, element, x2, i),
            _load(0, element, grad, i) + _load(1, zero, carry, carry_start + k),
            _load(0, element, previous, i),
        )
        _store(1, zero, carry, carry_start + k, onward)
        _store(2, element, dx0, i, d0)
        _store(3, element, dx1, i, d1)
        _store_third(cell, element, dx2, i, d2)


def _store_third(cell, element, address, index, value):
    raise NotImplementedError("compiled only")


@_overload(_store_third)
def _(cell, element, address, index, value):
    if cell.instance_class in (_Linear, _MinGRU, _MinGRUIdentity):
        return lambda cell, element, address, index, value: None
    return lambda cell, element, address, index, value: _store(4, element, address, index, value)


@_cached_jit
def _backward(
    cell, element, x0, x1, x2, h0, resets, h, grad, dx0, dx1, dx2, grad_h0,
    T, b_start, b_stop, together, width, carry, scratch,
):  # fmt: skip
    lanes = _lanes(cell)
    blocks = (width + lanes - 1) // lanes
    padded = blocks * lanes
    zeros = scratch + SCRATCH_SLOTS * SLOT
    for b_first in range(b_start, b_stop, together):
        b_last = min(b_first + together, b_stop)
        _clear_carry(element, carry, 0, (b_last - b_first) * padded)
        for t in range(T - 1, -1, -1):
            for b in range(b_last - 1, b_first - 1, -1):
                carry_start = (b - b_first) * padded
                reset = _reset_at(resets, b, t)
                if reset or (t == 0 and h0[0] == 0):
                    previous = zeros
                elif t == 0:
                    previous = _at(h0, b, 0)
                else:
                    previous = _at(h, b, t - 1)
                r0, r1, r2, r_grad = _at(x0, b, t), _at(x1, b, t), _at(x2, b, t), _at(grad, b, t)
                w0, w1, w2 = _at(dx0, b, t), _at(dx1, b, t), _at(dx2, b, t)
                if width < lanes:
                    s0, s1, s2, s_grad = scratch, scratch + SLOT, scratch + 2 * SLOT, scratch + 3 * SLOT
                    s_previous, v0, v1, v2 = s_grad + SLOT, s_grad + 2 * SLOT, s_grad + 3 * SLOT, s_grad + 4 * SLOT
                    _copy_row(element, r0, s0, width)
                    _copy_row(element, r1, s1, width)
                    _copy_row(element, r2, s2, width)
                    _copy_row(element, r_grad, s_grad, width)
                    _copy_row(element, previous, s_previous, width)
                    _backward_block(cell, element, s0, s1, s2, s_previous, s_grad, v0, v1, v2, 0, carry, carry_start)
                    _copy_row(element, v0, w0, width)
                    _copy_row(element, v1, w1, width)
                    if w2 != 0:
                        _copy_row(element, v2, w2, width)
                else:
                    for j in range(blocks - 1, -1, -1):
                        _backward_block(
                            cell, element, r0, r1, r2, previous, r_grad, w0, w1, w2,
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


def forward(cell, inputs, h0, resets, reverse, out) -> None:
    """Fills `out` (B, T, D). Every tensor has its channels contiguous, any other stride, and one dtype."""
    _launch(_forward, cell, (*_three(inputs, inputs[1]), h0, resets, out), reverse)


def backward(cell, inputs, h0, resets, reverse, h, grad, grads, grad_h0) -> None:
    """Fills `grads`, one for each input, and `grad_h0` (B, D) where there is an h0."""
    tensors = (*_three(inputs, inputs[1]), h0, resets, h, grad, *_three(grads, None), grad_h0)
    _launch(_backward, cell, tensors, reverse)


def _three(tensors, third):
    return tensors if len(tensors) == 3 else (*tensors, third)


def _launch(kernel, cell, tensors, reverse: bool) -> None:
    like = tensors[0]
    B, T, D = like.shape
    compute = np.float64 if like.dtype == torch.float64 else np.float32
    time_outermost = like.stride(1) > like.stride(0)

    tag = _CELL_TAGS[cell]
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
            T, b_start, b_stop, together, width, carry.ctypes.data, scratch.ctypes.data,
        )  # fmt: skip

    first, *rest = _shares(B, T, D)
    futures = [_threads(os.getpid()).submit(run, *share) for share in rest]
    run(*first)
    for future in futures:
        future.result()


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    """One pool a process, whose threads start when they are needed; a forked child has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), "minrnn")


def _shares(B: int, T: int, D: int) -> list[tuple[int, int, int, int]]:
    """(b_start, b_stop, d_start, d_stop) for each thread; channels are divided where the batch does not suffice."""
    threads = max(1, min(torch.get_num_threads(), B * T * D // MIN_ELEMENTS_PER_THREAD))
    pieces = 1 if B >= 4 * threads else max(1, min(threads // math.gcd(B, threads), D // MIN_PIECE))
    rows = min(B, threads // pieces)
    blocks = -(-D // LINEAR_LANES)
    b_edges = [i * B // rows for i in range(rows + 1)]
    d_edges = [min(D, i * blocks // pieces * LINEAR_LANES) for i in range(pieces + 1)]
    return [(*b, *d) for b in pairwise(b_edges) for d in pairwise(d_edges)]


def _stream(x: Tensor | None, d: int, reverse: bool) -> tuple[int, int, int]:
    """A (B, T, D) or (B, D) tensor from channel `d` on, or (B, T) resets, as the kernels take it."""
    if x is None:
        return 0, 0, 0
    size = x.element_size()
    b_stride = x.stride(0) * size
    if x.dtype == torch.bool:
        address, t_stride = x.data_ptr(), x.stride(1) * size
    else:
        address, t_stride = x.data_ptr() + d * size, x.stride(1) * size if x.dim() == 3 else 0
    if reverse and t_stride:
        return address + (x.shape[1] - 1) * t_stride, b_stride, -t_stride
    return address, b_stride, t_stride
